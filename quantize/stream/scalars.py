"""The scalars of a quantized matrix, from the record of its group: convert stores them, verify recomputes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.constants import E4M3_MAX, SCALE_RANGE
from ..format.fp8 import fp8_scale
from ..format.layouts import Layout
from ..format.schemes import INPUT_PARTS, Part, Scheme
from .manifest import CachedRecord, GroupRecord

CACHE_ROOM = 2.0  # over the amax that calibration observed: other texts may exceed it, and FP8's exponent has the room


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
        if part not in INPUT_PARTS and record.cast is not None and record.cast.exponent is not None:
            amaxes[part] = SCALE_RANGE * 2.0**record.cast.exponent  # whose global scale is this power in both layouts
        elif part not in INPUT_PARTS:
            amaxes[part] = record.weight_amax * headroom
        elif record.input is not None:
            amaxes[part] = record.input.calibrated_amax
        elif record.input_bound is not None:
            amaxes[part] = record.input_bound
    return amaxes


def cache_scale(record: CachedRecord) -> float:
    """The scale under which an FP8 KV cache stores keys or values: amax / 448, as a float32 value.

    It is 1 where the bound, or twice the observed amax, lies between 1 and 448. FP8 has an exponent, so another scale
    would not be more accurate there, and drafters that read the cache without its scales stay right.

    Args:
        record: with a bound or an observation.
    """
    amax = record.bound if record.bound is not None else CACHE_ROOM * (record.observed or 0.0)
    return 1.0 if 1 <= amax <= E4M3_MAX else float(fp8_scale(torch.tensor(amax)))


def clipped(record: CachedRecord, scale: float) -> bool:
    """Whether an FP8 KV cache clips the largest magnitude that is known of keys or values under a scale."""
    return max(record.bound or 0.0, record.observed or 0.0) > E4M3_MAX * scale
