"""The scalars of a quantized matrix, from the record of its group: convert stores them, verify recomputes them."""

from __future__ import annotations

from torch import Tensor

from ..format.layouts import Layout
from ..format.schemes import INPUT_PARTS, Part, Scheme
from .manifest import GroupRecord


def scalar_values(layout: Layout, scheme: Scheme, record: GroupRecord, headroom: float) -> dict[Part, Tensor]:
    """The scalars that every member of a fused group stores, float32 on the CPU, by part.

    Args:
        headroom: of the quantizer (`Claim.headroom`).
    """
    found = {}
    for part, spec in scheme.parts(1, scheme.divides).items():
        if spec.shape:
            continue
        if part not in INPUT_PARTS:
            found[part] = layout.stored_scalar(part, record.weight_amax * headroom)
        elif record.input is not None:
            found[part] = layout.stored_scalar(part, record.input.calibrated_amax)
    return found
