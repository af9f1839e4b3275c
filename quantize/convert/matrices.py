"""Quantize the matrices of a fused group: one global scale for all, before any block scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibrate.statistics import InputStatistics, calibrated_amax
from ..errors import InputError
from ..format.blocks import weight_amax
from ..format.constants import SCALE_RANGE
from ..format.layouts import Layout
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..format.scales import global_scale
from ..plan.plan import Plan, matrix_entries
from ..quantizers.base import Quantizer
from ..recipe.groups import FusedGroup


@dataclass(frozen=True)
class QuantizedGroup:
    """A fused group's output.

    Attributes:
        tensors: by output name, on the CPU.
        record: what the manifest says of the group.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def quantize_group(
    plan: Plan, group: FusedGroup, weights: Mapping[str, Tensor], inputs: InputStatistics | None, quantizer: Quantizer
) -> QuantizedGroup:
    """Quantize a fused group.

    Args:
        weights: the members' weights by source name, in their stored dtype, on one device.
        inputs: statistics of the shared input; None for a weight-only scheme.
    Raises:
        NonFiniteError: a NaN or an infinity in a weight.
        InputError: weights so large that the quantizer's head-room leaves float32.
    """
    members = [plan.matrices[module] for module in group.members]
    amax = torch.stack([weight_amax(weights[member.source], member.source) for member in members]).amax()
    scale = global_scale(amax, quantizer.headroom)
    if not math.isfinite(float(amax * quantizer.headroom)):
        raise InputError(
            f"{members[0].source} holds values near the end of float32: use --quantizer rtn for this model."
        )
    mean_square = inputs.mean_square if inputs else None
    weight_scalar = stored_scalar(float(amax) * quantizer.headroom, plan.layout)
    record: dict[str, Any] = {"scheme": members[0].scheme, "members": list(group.members), "weight_amax": float(amax)}
    tensors: dict[str, Tensor] = {}
    histogram = torch.zeros(256, dtype=torch.int64)
    for member in members:
        entries = matrix_entries(member, plan.layout)
        quantized = quantizer.quantize(weights[member.source], scale, mean_square)
        histogram += scale_histogram(quantized.scales)
        tensors[entries["packed"].name] = quantized.packed.cpu()
        tensors[entries["scales"].name] = quantized.scales.cpu()
        tensors[entries["weight_global"].name] = weight_scalar
        if inputs is not None:
            calibrated = calibrated_amax(inputs.amax, inputs.low, plan.recipe.activations.headroom)
            tensors[entries["input_global"].name] = stored_scalar(calibrated, plan.layout)
            record["input"] = {
                "observed_amax": inputs.amax,
                "low_percentile": inputs.low,
                "calibrated_amax": calibrated,
                "tokens": inputs.tokens,
            }
    record["marlin_flushed_blocks"] = count_flushed_blocks(histogram)
    return QuantizedGroup(tensors, record)


def stored_scalar(amax: float, layout: Layout) -> Tensor:
    """The float32 global scale that a layout stores for an amax: 2688 / amax or amax / 2688, each from the amax
    itself; 1.0 for an amax of zero, and where the divisor would overflow."""
    value = torch.tensor(amax, dtype=torch.float32)
    divisor = global_scale(value)
    if layout.divisor:
        return divisor.reshape(layout.scalar_shape)
    is_usable = bool(torch.isfinite(SCALE_RANGE * (1.0 / value)))
    return (value / SCALE_RANGE if is_usable else torch.ones(())).reshape(layout.scalar_shape)


def groups_of_layer(groups: Iterable[FusedGroup], prefix: str, layer: int) -> list[FusedGroup]:
    """The fused groups that lie in one decoder layer."""
    start = f"{prefix}.{layer}."
    return [group for group in groups if group.name.startswith(start)]
