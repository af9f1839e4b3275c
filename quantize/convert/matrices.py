"""The matrices of a fused group: quantized parts, the record of the group, and the scalars that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..calibrate.input_scales import stored_amax
from ..calibrate.statistics.ranges import InputStatistics
from ..checkpoint.headers import DTYPE_BYTES
from ..checkpoint.writer import TensorEntry
from ..errors import CheckFailed
from ..format.blocks import weight_amax
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..format.schemes import Part, Scheme
from ..plan.plan import Plan
from ..quantizers import quantizer_for
from ..quantizers.base import GroupInputs, QuantizedGroup, Quantizer
from ..quantizers.casts import cast_group
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix, matrix_entries
from ..recipe.roles import Role
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.manifest import GroupRecord, InputRecord
from ..stream.scalars import scalar_values
from ..weights.encoded import encoded, group_form

_EMBEDDINGS = frozenset({Role.EMBEDDING, Role.PER_LAYER_INPUT})


@dataclass(frozen=True)
class GroupOutput:
    """A fused group's output.

    Attributes:
        tensors: the bytes of all tensors but scalars, by output name, uint8 [..., bytes of the last axis], on the
            weights' device.
        parts: the same by matrix and part, in their own dtypes.
        record: the manifest's entry for the group.
    """

    tensors: dict[str, Tensor]
    parts: Mapping[str, Mapping[Part, Tensor]]
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
    quantized = {matrix.tensor for matrix in plan.matrices.values() if matrix is not plan.head}
    embeddings = [name for name, role in plan.selection.roles.items() if role in _EMBEDDINGS]
    earlier = [name for number, names in plan.tensors_by_layer().items() if number < layer for name in names]
    for name in (*embeddings, *earlier):
        if name not in quantized:
            refuse_damaged({name: plan.source.read(name)})


@contextmanager
def naming_damage(plan: Plan, layer: int, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Name a damaged weight, if there is one, where an input is not finite: it is the cause.

    Args:
        tensors: of the layer in the source.
    Raises:
        NonFiniteError, InputError: see `refuse_damaged` and `refuse_damaged_before`.
        CheckFailed: of the block, without a damaged weight.
    """
    try:
        yield
    except CheckFailed:
        refuse_damaged(tensors)
        refuse_damaged_before(plan, layer)
        raise


def quantize_group(
    plan: Plan,
    group: FusedGroup,
    weights: Mapping[str, Tensor],
    inputs: GroupInputs | None,
    quantizer: Quantizer,
    reshaping: Reshaping = UNCHANGED,
) -> GroupOutput:
    """Quantize a fused group, or cast it where a quantized source has all of its codes. Its scalars follow from the
    record (`group_scalars`).

    Args:
        weights: the members' tensors by source name, in their stored dtype, on one device.
        inputs: statistics of the shared input, or None without calibration.
        quantizer: of the run. A scheme that it does not know has its own.
        reshaping: folds that the weights go through first. The statistics are those after them.
    Raises:
        NonFiniteError: a NaN or an infinity in a weight.
        InputError: weights that the scheme or the quantizer cannot represent.
    """
    members = [plan.matrices[module] for module in group.members]
    scheme = members[0].scheme
    given = reshaped_weights(members, weights, reshaping)
    made = None if any(map(reshaping.changes, group.members)) else _cast(plan, members, given)
    if made is None:
        made = quantizer_for(scheme.name, quantizer).quantize(members, given, inputs)
    tensors: dict[str, Tensor] = {}
    histogram = torch.zeros(256, dtype=torch.int64)
    for matrix in members:
        entries = matrix_entries(matrix, plan.layout)
        for part, tensor in made.parts[matrix.name].items():
            tensors[entries[part].name] = tensor.contiguous().view(torch.uint8)
        if scheme.has_block_scales:
            histogram += scale_histogram(made.parts[matrix.name]["scales"])
    facts: dict[str, Any] = {"scheme": scheme.name, "members": group.members, "weight_amax": made.amax}
    if inputs is not None and scheme.inputs == "calibrated":
        facts["input"] = input_record(plan, scheme, inputs.ranges)
    if scheme.has_block_scales:
        facts["marlin_flushed_blocks"] = count_flushed_blocks(histogram)
    if made.feedback is not None:
        facts["feedback"] = made.feedback
    if made.cast is not None:
        facts["cast"] = made.cast
    return GroupOutput(tensors, made.parts, GroupRecord(**facts))


def _cast(plan: Plan, members: Sequence[Matrix], weights: Sequence[Tensor]) -> QuantizedGroup | None:
    """The group with the codes of its source, or None where they cannot stay."""
    if group_form(plan.source, members) is None:
        return None
    scales = [encoded(plan.source, matrix) for matrix in members]
    return cast_group(members, weights, [own for own in scales if own is not None])


def reshaped_weights(matrices: Iterable[Matrix], weights: Mapping[str, Tensor], reshaping: Reshaping) -> list[Tensor]:
    """Matrices after folds, [rows, cols] each."""
    return [reshaping.weight(matrix.name, matrix.of(weights)) for matrix in matrices]


def input_record(plan: Plan, scheme: Scheme, inputs: InputStatistics) -> InputRecord:
    """The manifest's entry for the input of a group in a scheme with stored input scales."""
    headroom = plan.recipe.activations.headroom
    return InputRecord(
        observed_amax=inputs.amax,
        low_percentile=inputs.low,
        calibrated_amax=stored_amax(scheme, inputs.amax, inputs.low, headroom),
        tokens=inputs.tokens,
    )


def group_scalars(plan: Plan, group: FusedGroup, record: GroupRecord, quantizer: Quantizer) -> dict[str, Tensor]:
    """The scalars that a fused group's members store, float32 on the CPU by output name, from its record."""
    tensors = {}
    for module in group.members:
        matrix = plan.matrices[module]
        entries = matrix_entries(matrix, plan.layout)
        headroom = quantizer_for(matrix.scheme.name, quantizer).claim.headroom
        for part, value in scalar_values(plan.layout, matrix.scheme, record, headroom).items():
            tensors[entries[part].name] = value
    return tensors


def made_shapes(plan: Plan, groups: Iterable[FusedGroup]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The outputs of `quantize_group` for some groups: output names, in order, to the group's name and uint8 shape."""
    shapes = {}
    for group in groups:
        for module in group.members:
            for part, entry in matrix_entries(plan.matrices[module], plan.layout).items():
                if not is_scalar(part, entry):
                    *outer, last = entry.shape
                    shapes[entry.name] = (group.name, (*outer, last * DTYPE_BYTES[entry.dtype]))
    return shapes


def is_scalar(part: Part, entry: TensorEntry) -> bool:
    """Whether a stored part has one value, which follows from the record of its group."""
    return part != "codes" and prod(entry.shape) == 1 and len(entry.shape) < 2


def groups_of_layer(groups: Iterable[FusedGroup], prefix: str, layer: int) -> list[FusedGroup]:
    """The fused groups that lie in one decoder layer."""
    start = f"{prefix}.{layer}."
    return [group for group in groups if group.name.startswith(start)]
