"""The record of a distillation in the manifest: its training, its judgement, and how far each tensor moved."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from .forms import Amax, CalibrationRecord, Line, Natural, RecordForm, Sha256, Word

MOST_SCALE_CHANGE = math.log(2)
"""The largest |ln(after / before)| of a block scale."""
MOST_NORM_CHANGE = 0.5
"""The largest |after / before - 1| of the factor of a norm's channel."""


class Divergences(RecordForm):
    """The mean KL divergence to the source on held-out text, in nats. None for no number.

    Attributes:
        error: the standard error of the difference, over sequences. None for one sequence.
    """

    before: Amax | None
    after: Amax | None
    error: Amax | None = None
    sequences: Natural
    tokens: Natural


class NormChange(RecordForm):
    """A norm whose weight changed.

    Attributes:
        adds_one: whether its factor is 1 + weight.
        largest: |after / before - 1| of the factor, over its channels.
    """

    adds_one: bool = False
    largest: Annotated[float, Field(ge=0, le=MOST_NORM_CHANGE, strict=True)]


class DistillationRecord(RecordForm):
    """A distillation.

    Attributes:
        tokens: of the training. Padding does not count.
        text: the training text.
        heldout_sha256: of the token ids that the gate measured, see `CalibrationSet.sha256`.
        heldout: by kind of text.
        total: over all of the held-out text.
        is_kept: whether the gate kept the trained tensors. If not, no tensor changed.
        reason: of the gate.
        scales: the largest |ln(after / before)| of the block scales by module, where any changed.
        norms: by the name of the tensor.
    """

    tokens: Natural
    steps: Natural
    seed: Natural
    text: CalibrationRecord
    device: Word
    dtype: Word
    heldout_sha256: Sha256
    heldout: dict[Line, Divergences]
    total: Divergences
    is_kept: bool
    reason: Line
    scales: dict[Line, Annotated[float, Field(ge=0, le=MOST_SCALE_CHANGE + 1e-6, strict=True)]] = Field(
        default_factory=dict
    )
    norms: dict[Line, NormChange] = Field(default_factory=dict)
