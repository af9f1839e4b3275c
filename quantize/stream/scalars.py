"""The scalars of a quantized matrix, from the record of its group: convert stores them, verify recomputes them."""

from __future__ import annotations

from torch import Tensor

from ..format.layouts import Layout
from ..format.schemes import INPUT_PARTS, Part, Scheme
from .manifest import GroupRecord


def scalar_values(layout: Layout, scheme: Scheme, record: GroupRecord, headroom: float) -> dict[Part, Tensor]:
    """The scalars that every member of a fused group stores, float32 on the CPU, by part. See `scalar_amaxes`."""
    amaxes = scalar_amaxes(scheme, record, headroom)
    return {part: layout.stored_scalar(part, amax) for part, amax in amaxes.items()}


def scalar_amaxes(scheme: Scheme, record: GroupRecord, headroom: float) -> dict[Part, float]:
    """The amaxes behind the scalars that every member of a fused group stores, by part.

    Args:
        headroom: of the quantizer (`Claim.headroom`).
    """
    amaxes = {}
    for part in scheme.shared:
        if part not in INPUT_PARTS:
            amaxes[part] = record.weight_amax * headroom
        elif record.input is not None:
            amaxes[part] = record.input.calibrated_amax
        elif record.input_bound is not None:
            amaxes[part] = record.input_bound
    return amaxes
