"""Quantize the matrices of a fused group: one global scale for all, before any block scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.statistics.ranges import InputStatistics, calibrated_amax
from ..errors import InputError
from ..format.blocks import weight_amax
from ..format.constants import SCALE_RANGE, SMALLEST_WEIGHT_AMAX
from ..format.layouts import Layout
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..format.scales import global_scale
from ..plan.plan import Plan, matrix_entries
from ..quantizers.base import Quantizer
from ..recipe.groups import FusedGroup
from ..recipe.roles import Role
from ..stream.manifest import GroupRecord, InputRecord

_EMBEDDINGS = frozenset({Role.EMBEDDING, Role.PER_LAYER_INPUT})


@dataclass(frozen=True)
class QuantizedGroup:
    """A fused group's output.

    Attributes:
        tensors: packed codes and block scales by output name, uint8, on the weights' device.
        record: the manifest's entry for the group.
    """

    tensors: dict[str, Tensor]
    record: GroupRecord


def refuse_damaged(weights: Mapping[str, Tensor]) -> None:
    """Name the first tensor of a layer that contains a NaN or an infinity, if there is one.

    Raises:
        NonFiniteError: with the first row and column, counted from 0.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            weight_amax(tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1), name)


def refuse_damaged_before(plan: Plan, layer: int) -> None:
    """`refuse_damaged` for the tensors that a layer's input depends on and that no quantizer has looked at: embeddings,
    and the tensors of earlier layers that are copied.

    Raises:
        NonFiniteError: see there.
        InputError: a shard vanished, changed or cannot be read.
    """
    quantized = {matrix.source for matrix in plan.matrices.values()}
    embeddings = [name for name, role in plan.selection.roles.items() if role in _EMBEDDINGS]
    earlier = [name for number, names in plan.tensors_by_layer().items() if number < layer for name in names]
    for name in (*embeddings, *earlier):
        if name not in quantized:
            refuse_damaged({name: plan.source.read(name)})


def quantize_group(
    plan: Plan, group: FusedGroup, weights: Mapping[str, Tensor], inputs: InputStatistics | None, quantizer: Quantizer
) -> QuantizedGroup:
    """Quantize a fused group. Its global scales follow from the record (`group_scalars`).

    Args:
        weights: the members' weights by source name, in their stored dtype, on one device.
        inputs: statistics of the shared input, or None for a weight-only scheme.
    Raises:
        NonFiniteError: a NaN or an infinity in a weight.
        InputError: weights so large that the quantizer's headroom exceeds float32.
    """
    members = [plan.matrices[module] for module in group.members]
    amax = torch.stack([weight_amax(weights[member.source], member.source) for member in members]).amax()
    if 0 < float(amax) < SMALLEST_WEIGHT_AMAX:
        raise InputError(
            f"{members[0].source} contains no value above {float(amax):.3g}, which is too small for NVFP4: leave it "
            f"out of the recipe's quantize list."
        )
    scale = global_scale(amax, quantizer.headroom)
    if not math.isfinite(float(amax * quantizer.headroom)):
        raise InputError(
            f"{members[0].source} contains values near the limit of float32: use --quantizer rtn for this model."
        )
    mean_square = inputs.mean_square if inputs else None
    tensors: dict[str, Tensor] = {}
    histogram = torch.zeros(256, dtype=torch.int64)
    for member in members:
        entries = matrix_entries(member, plan.layout)
        quantized = quantizer.quantize(weights[member.source], scale, mean_square)
        histogram += scale_histogram(quantized.scales)
        tensors[entries["packed"].name] = quantized.packed
        tensors[entries["scales"].name] = quantized.scales.view(torch.uint8)
    record = GroupRecord(
        scheme=members[0].scheme,
        members=group.members,
        weight_amax=float(amax),
        marlin_flushed_blocks=count_flushed_blocks(histogram),
        **({} if inputs is None else {"input": _input_record(inputs, plan.recipe.activations.headroom)}),
    )
    return QuantizedGroup(tensors, record)


def _input_record(inputs: InputStatistics, headroom: float | str) -> InputRecord:
    return InputRecord(
        observed_amax=inputs.amax,
        low_percentile=inputs.low,
        calibrated_amax=calibrated_amax(inputs.amax, inputs.low, headroom),
        tokens=inputs.tokens,
    )


def group_scalars(plan: Plan, group: FusedGroup, record: GroupRecord, quantizer: Quantizer) -> dict[str, Tensor]:
    """The global scales that a fused group's members store, float32 on the CPU by output name, from its record."""
    tensors = {}
    for module in group.members:
        entries = matrix_entries(plan.matrices[module], plan.layout)
        amax = record.weight_amax * quantizer.headroom
        tensors[entries["weight_global"].name] = stored_scalar(amax, plan.layout)
        if record.input is not None:
            tensors[entries["input_global"].name] = stored_scalar(record.input.calibrated_amax, plan.layout)
    return tensors


def packed_shapes(plan: Plan, groups: Iterable[FusedGroup]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The outputs of `quantize_group` for some groups: output names, in order, to the group's name and uint8 shape."""
    shapes = {}
    for group in groups:
        for module in group.members:
            entries = matrix_entries(plan.matrices[module], plan.layout)
            for part in ("packed", "scales"):
                shapes[entries[part].name] = (group.name, entries[part].shape)
    return shapes


def stored_scalar(amax: float, layout: Layout) -> Tensor:
    """The float32 global scale that a layout stores for an amax: 2688 / amax or amax / 2688, each from the amax
    itself. It is 1.0 for an amax of zero, and where 2688 / amax would overflow."""
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
