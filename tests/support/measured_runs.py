"""The conversions whose times are kept in benchmarks/results, each with what the forecast needs to know of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvquant.checkpoint.source import Checkpoint
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.conversion import Conversion, forecast_conversion
from nvquant.plan.machines import DISKS, Disk, Machine
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe

from .synthetic_dense import SMOLLM2_135M, headers_only
from .synthetic_gemma4 import config, tensor_shapes, text_config, text_shapes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SLICE, WHOLE = "gemma4_slice-h200.json", "served_31b-h200.json"
GPTQ = "gemma4_slice-gptq-h200.json"
HALF, SMOLLM2 = "data_free-intel-xeon-2-cores.json", "smollm2_cpu-intel-xeon-2-cores.json"
H100, H100_SLICE = "whole_31b-2-x-h100-80gb-hbm3.json", "scale_out-2-x-h100-80gb-hbm3.json"
ON_GPU, ON_CPU = Machine("H200", 1, DISKS["ram"]), Machine(None, 1, DISKS["nvme"])


@dataclass(frozen=True)
class MeasuredRun:
    """A run.

    Attributes:
        file, keys: where its document is.
        samples, sequence_length: of its calibration.
        has_budget: whether a memory budget changed where hidden states waited.
    """

    words: str
    file: str
    keys: tuple[str, str]
    model: str
    recipe: str
    quantizer: str
    machine: Machine
    samples: int
    sequence_length: int
    has_budget: bool = False

    def document(self) -> dict[str, Any]:
        """What `nvquant convert --json` said, with the seconds of the whole process."""
        found: dict[str, Any] = json.loads((RESULTS / self.file).read_text(encoding="utf-8"))
        return found[self.keys[0]][self.keys[1]]

    def plan(self) -> Plan:
        """Its plan, from headers alone."""
        recipe = load_recipe(self.recipe).model_copy(update={"quantizer": self.quantizer})
        return compute_plan(SOURCES[self.model], recipe, LAYOUTS["compressed-tensors"], self.model)

    def forecast(self) -> Conversion:
        """The forecast for the machine that it was made on."""
        return forecast_conversion(self.plan(), self.machine, self.samples, self.sequence_length)


SOURCES: dict[str, Checkpoint] = {
    "6 layers": headers_only(tensor_shapes(6), config(6)),
    "30 layers": headers_only(tensor_shapes(30), config(30)),
    "60 layers": headers_only(tensor_shapes(), config()),
    "60 layers, text": headers_only(text_shapes(), text_config()),
    "SmolLM2-135M": headers_only(SMOLLM2_135M.shapes(), SMOLLM2_135M.config()),
}


def _slice(quantizer: str) -> MeasuredRun:
    words = f"6 layers of Gemma 4 31B, nvfp4, {quantizer}, 128 x 2048 tokens, H200"
    return MeasuredRun(
        words, SLICE, ("runs", f"nvquant {quantizer}"), "6 layers", "nvfp4", quantizer, ON_GPU, 128, 2048
    )


def _solved() -> MeasuredRun:
    """In two lanes, with folds."""
    words = "6 layers of Gemma 4 31B, nvfp4-full, gptq, 64 x 2048 tokens, H200"
    keys = ("runs", "nvquant gptq")
    return MeasuredRun(words, GPTQ, keys, "6 layers", "nvfp4-full", "gptq", ON_GPU, 64, 2048, has_budget=True)


def _whole(recipe: str) -> MeasuredRun:
    words = f"60 layers of Gemma 4 31B, {recipe}, mse, 16 x 512 tokens, H200"
    return MeasuredRun(words, WHOLE, ("convert", recipe), "60 layers, text", recipe, "mse", ON_GPU, 16, 512)


def _half(quantizer: str) -> MeasuredRun:
    words = f"30 layers of Gemma 4 31B, nvfp4-a16, {quantizer}, no calibration, CPU"
    keys = ("runs", f"nvquant {quantizer}")
    return MeasuredRun(words, HALF, keys, "30 layers", "nvfp4-a16", quantizer, ON_CPU, 0, 0)


def _smollm2(quantizer: str) -> MeasuredRun:
    words = f"SmolLM2-135M, nvfp4-full, {quantizer}, 16 x 511 tokens, CPU"
    keys = ("runs", f"nvquant {quantizer}")
    return MeasuredRun(words, SMOLLM2, keys, "SmolLM2-135M", "nvfp4-full", quantizer, ON_CPU, 16, 511)


def _on_h100s(gpus: int) -> MeasuredRun:
    """From the disk that was measured there, into a RAM disk."""
    speeds = json.loads((RESULTS / H100).read_text(encoding="utf-8"))["speeds"]
    machine = Machine("H100 80 GB", gpus, Disk("measured", speeds["read GB/s"] * 1e9, speeds["write GB/s"] * 1e9))
    words = f"60 layers of Gemma 4 31B, nvfp4, mse, 128 x 2048 tokens, cold disk, {machine.words}"
    keys = ("runs", "nvquant mse" if gpus == 1 else f"nvquant mse, {gpus} GPUs")
    return MeasuredRun(words, H100, keys, "60 layers", "nvfp4", "mse", machine, 128, 2048)


def _slice_on_h100s(quantizer: str, gpus: int) -> MeasuredRun:
    machine = Machine("H100 80 GB", gpus, DISKS["ram"])
    words = f"6 layers of Gemma 4 31B, nvfp4, {quantizer}, 128 x 2048 tokens, {machine.words}"
    keys = ("runs", f"{quantizer}, {gpus}")
    return MeasuredRun(words, H100_SLICE, keys, "6 layers", "nvfp4", quantizer, machine, 128, 2048)


# Those that the constants come from.
RUNS = [
    *(_slice(quantizer) for quantizer in ("rtn", "mse")),
    _solved(),
    *(_whole(recipe) for recipe in ("nvfp4", "nvfp4-full")),
    *(_half(quantizer) for quantizer in ("rtn", "mse")),
    *(_smollm2(quantizer) for quantizer in ("rtn", "mse")),
]

# Those that no constant comes from: another GPU, and two of it.
APART = [
    *(_on_h100s(gpus) for gpus in (1, 2)),
    *(_slice_on_h100s(quantizer, gpus) for quantizer in ("rtn", "mse") for gpus in (1, 2)),
]
