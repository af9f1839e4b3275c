"""The size of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe.schema import DEFAULT_SAMPLES
from .plan import Plan

TOKENS_A_COLUMN = 20
"""With fewer, error feedback fits the calibration text more than the model: docs/recipes.md, "Quantizers"."""


@dataclass(frozen=True)
class CalibrationSize:
    """The number of calibration samples, and of tokens in each.

    Attributes:
        reason: words on where the number of samples comes from.
    """

    samples: int
    sequence_length: int
    reason: str

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.sequence_length

    @property
    def words(self) -> str:
        """The size and its reason, for reports."""
        return f"{self.samples} x {self.sequence_length} = {self.tokens:,} tokens, {self.reason}"


def calibration_size(plan: Plan, samples: int | None, sequence_length: int | None) -> CalibrationSize:
    """The size of the calibration of a plan.

    Args:
        samples, sequence_length: of the command line. None for the recipe's. Where that has no number of samples
            either, it is `DEFAULT_SAMPLES`. A quantizer on the quantized path gets at least `TOKENS_A_COLUMN` tokens
            for each column of the widest matrix that it quantizes.
    """
    recipe = plan.recipe.calibration
    length = sequence_length or recipe.sequence_length
    if samples is not None:
        return CalibrationSize(samples, length, "as --samples gives it")
    if recipe.samples is not None:
        return CalibrationSize(recipe.samples, length, f"as recipe {plan.recipe.name} gives it")
    widest = max((plan.matrices[group.members[0]].cols for group in plan.solved_groups), default=0)
    needed = -(-TOKENS_A_COLUMN * widest // length) if plan.has_two_lanes else 0
    if needed <= DEFAULT_SAMPLES:
        return CalibrationSize(DEFAULT_SAMPLES, length, "the default")
    reason = f"because {plan.quantizer} needs {TOKENS_A_COLUMN} for each of the {widest:,} columns of the widest matrix"
    return CalibrationSize(needed, length, reason)
