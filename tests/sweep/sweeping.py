"""Sweeps of tiny models on given token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nvquant.calibrate.samples import CalibrationSet
from nvquant.convert.options import ConvertOptions
from nvquant.plan.plan import Plan
from nvquant.recipe.schema import Recipe
from nvquant.sweep.run import Sweep
from support.conversions import COMPRESSED_TENSORS, planned, random_samples
from torch import Tensor


def no_progress(_done: int, _total: int, _words: str) -> None:
    """Tell nobody."""


def text_of(samples: Sequence[Tensor]) -> CalibrationSet:
    """Token ids as a calibration."""
    return CalibrationSet("ids.jsonl", tuple(samples), sum(map(len, samples)), "0" * 64, "ids")


def sweep_of(
    source: Path,
    folder: Path,
    recipe: str | Recipe = "nvfp4-full",
    layout: str = COMPRESSED_TENSORS,
    quantizer: str = "mse",
    samples: Sequence[Tensor] | None = None,
    fold: bool = False,
    restart: bool = False,
    progress: Callable[[int, int, str], None] = no_progress,
) -> Sweep:
    """A sweep on `random_samples()` where no others are given."""
    plan: Plan = planned(source, recipe, layout, quantizer)
    options = ConvertOptions(folder, quantizer, fold=fold, restart=restart)
    return Sweep(plan, options, text_of(random_samples() if samples is None else samples), progress)
