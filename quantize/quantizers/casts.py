"""Fused groups that keep the codes of a quantized source: MXFP4 as NVFP4, FP8 as FP8."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..format.constants import SMALLEST_WEIGHT_AMAX
from ..format.fp8 import quantize_rows
from ..format.microscaling import LARGEST_CAST, cast_rows, largest_exponent
from ..format.schemes import Part
from ..recipe.matrices import Matrix
from ..stream.manifest import CastRecord
from ..weights.encoded import Encoded
from .base import QuantizedGroup
from .blocks import group_amax


def cast_group(group: Sequence[Matrix], weights: Sequence[Tensor], encoded: Sequence[Encoded]) -> QuantizedGroup | None:
    """A fused group with the codes of its source.

    Args:
        weights: decoded, [rows, cols] each, on one device.
        encoded: the scales of each matrix, all of one form.
    Returns:
        None for MXFP4 matrices of zeros, or so small that NVFP4 has no global scale for them.
    Raises:
        NonFiniteError: a NaN or an infinity in a weight.
    """
    amax = group_amax(group, weights)
    if encoded[0].form == "MXFP4":
        return _from_mxfp4(group, weights, encoded, float(amax))
    made: dict[str, dict[Part, Tensor]] = {}
    for matrix, weight, source in zip(group, weights, encoded, strict=True):
        scales = source.scales.to(weight.device)
        made[matrix.name] = {"codes": quantize_rows(weight, scales), "scales": scales}
    return QuantizedGroup(float(amax), made, cast=CastRecord(source=encoded[0].form))


def _from_mxfp4(
    group: Sequence[Matrix], weights: Sequence[Tensor], encoded: Sequence[Encoded], amax: float
) -> QuantizedGroup | None:
    exponents = [source.scales.to(weight.device) for source, weight in zip(encoded, weights, strict=True)]
    largest = [largest_exponent(*pair) for pair in zip(weights, exponents, strict=True)]
    used = [found for found in largest if found is not None]
    if not used or amax < SMALLEST_WEIGHT_AMAX:
        return None
    exponent = max(used) - LARGEST_CAST
    made: dict[str, dict[Part, Tensor]] = {}
    blocks = shifted = rounded = 0
    for matrix, weight, own in zip(group, weights, exponents, strict=True):
        rows = cast_rows(weight, own, exponent)
        made[matrix.name] = {"codes": rows.packed, "scales": rows.scales}
        blocks, shifted, rounded = blocks + rows.scales.numel(), shifted + rows.shifted, rounded + rows.rounded
    record = CastRecord(source="MXFP4", exponent=exponent, blocks=blocks, shifted=shifted, rounded=rounded)
    return QuantizedGroup(amax, made, cast=record)
