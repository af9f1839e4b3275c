"""A decoder layer of a quantizer that goes site after site: each fused group on the inputs that the quantized groups
before it in the same layer give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.quantized import QuantizedLayer, input_scales
from ..calibrate.statistics.moments import Moments, SecondMoments
from ..calibrate.statistics.ranges import InputStatistics
from ..checkpoint.headers import Header, read_header
from ..checkpoint.shard_bytes import read_range
from ..checkpoint.source import tensor_bytes, torch_dtype
from ..format.schemes import Part, Scheme
from ..plan.plan import Plan
from ..quantizers import quantizer_for
from ..quantizers.base import GroupInputs, Quantizer
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix, matrix_entries
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.manifest import GroupRecord, LayerRecord
from ..stream.memory import telling_of_full_gpu
from ..stream.reading import LoadedLayer
from ..stream.trace import Trace
from .folding import reshaping_of_layer
from .matrices import groups_of_layer, input_record, is_scalar, naming_damage, quantize_group, reshaped_weights
from .ranks import Ranks
from .walking import CalibrationWalk

_MUCH_FEWER = 2  # rows than columns: then the product with the weights is smaller than the moments


@dataclass(frozen=True)
class MadeGroups:
    """The fused groups of a layer.

    Attributes:
        tensors: see `GroupOutput`, of all groups.
        records: by group.
    """

    tensors: dict[str, Tensor]
    records: dict[str, GroupRecord]


class SiteBySite:
    """Quantizes layers site after site. Every rank sees its own batches, and all quantize alike."""

    def __init__(self, plan: Plan, quantizer: Quantizer, ranks: Ranks, trace: Trace) -> None:
        self._plan, self._quantizer, self._ranks, self._trace = plan, quantizer, ranks, trace

    def quantize(
        self,
        groups: Sequence[FusedGroup],
        loaded: LoadedLayer,
        walk: CalibrationWalk,
        inputs: Mapping[str, InputStatistics],
        order: Sequence[str],
        reshaping: Reshaping = UNCHANGED,
    ) -> MadeGroups:
        """Quantize the groups of a layer, and send both lanes through it.

        Args:
            inputs: of the groups that were observed in the source.
            order: their names as the layer reaches them. The other groups come first.
            reshaping: folds of the layer. `inputs` are those after them.
        Raises:
            NonFiniteError, InputError, CheckFailed: see `quantize_group` and `SecondMoments.result`.
        """
        place = {name: at for at, name in enumerate(order)}
        path = walk.quantized_layer(self._plan, loaded.layer, loaded.tensors, reshaping)
        made = MadeGroups({}, {})
        in_order = sorted(groups, key=lambda group: place.get(group.name, -1))
        solved = [group.name for group in in_order if group.name in inputs and self._is_solved(group)]
        for group in in_order:
            own = quantizer_for(self._scheme(group).name, self._quantizer)
            seen = inputs.get(group.name)
            statistics = None if seen is None else GroupInputs(seen)
            if seen is not None and group.name in solved:
                moments = self._moments(group, loaded, walk, path, seen, reshaping, group.name == solved[-1])
                statistics = GroupInputs(seen, moments)
            with (
                self._ranks.step(),
                self._trace.timed("quantize", group.name),
                telling_of_full_gpu(f"the quantization of {group.name}"),
            ):
                done = quantize_group(self._plan, group, loaded.tensors, statistics, self._quantizer, reshaping)
                made.tensors.update(done.tensors)
                made.records[group.name] = done.record
                matrices = [self._plan.matrices[module] for module in group.members]
                path.put(group, matrices, done.parts, done.record, own.claim.headroom)
        with self._ranks.step():
            walk.advance(loaded.layer, loaded.tensors, path)
        return made

    def _is_solved(self, group: FusedGroup) -> bool:
        return "moments" in quantizer_for(self._scheme(group).name, self._quantizer).needs

    def _moments(
        self,
        group: FusedGroup,
        loaded: LoadedLayer,
        walk: CalibrationWalk,
        path: QuantizedLayer,
        seen: InputStatistics,
        reshaping: Reshaping,
        is_last: bool,
    ) -> Moments:
        """Second moments of a group's input over the samples of all ranks. See `CalibrationWalk.observe_moments`."""
        scheme = self._scheme(group)
        device = next(iter(loaded.tensors.values())).device
        record = input_record(self._plan, scheme, seen) if scheme.inputs == "calibrated" else None
        scales = input_scales(self._plan.layout, scheme, None if record is None else record.calibrated_amax, device)
        members = [self._plan.matrices[module] for module in group.members]
        is_wide = _MUCH_FEWER * sum(matrix.rows for matrix in members) <= members[0].cols
        weights = reshaped_weights(members, loaded.tensors, reshaping) if is_wide else []
        weight = torch.cat([weight.float() for weight in weights]) if is_wide else None
        assert seen.mean_square is not None
        moments = SecondMoments(
            seen.mean_square,
            lambda inputs: scheme.round_inputs(inputs, scales),
            weight,
            source_factor=reshaping.input_factor(group.name),
        )
        with telling_of_full_gpu(f"the second moments of {group.name}"):
            with self._ranks.step():
                walk.observe_moments(loaded.layer, loaded.tensors, path, group, moments, is_last)
            with (
                self._trace.timed("moments", group.name),
                naming_damage(self._plan, loaded.layer, loaded.tensors),
            ):
                return self._ranks.merged(moments).result(group.name)

    def _scheme(self, group: FusedGroup) -> Scheme:
        return self._plan.matrices[group.members[0]].scheme


def path_from_shard(
    plan: Plan, quantizer: Quantizer, walk: CalibrationWalk, loaded: LoadedLayer, record: LayerRecord, shard: Path
) -> QuantizedLayer:
    """A layer of the quantized path that an earlier run wrote, equal bit for bit to the one that it computed with.

    Args:
        record: of the layer.
        shard: the file that contains it.
    Raises:
        InputError: the file vanished or cannot be read.
    """
    path = walk.quantized_layer(plan, loaded.layer, loaded.tensors, reshaping_of_layer(plan, record, loaded.tensors))
    header = read_header(shard)
    device = next(iter(loaded.tensors.values())).device
    for group in groups_of_layer(plan.groups, plan.prefix, loaded.layer):
        matrices = [plan.matrices[module] for module in group.members]
        headroom = quantizer_for(matrices[0].scheme.name, quantizer).claim.headroom
        parts = {matrix.name: _stored_parts(plan, matrix, header, device) for matrix in matrices}
        path.put(group, matrices, parts, record.groups[group.name], headroom)
    return path


def _stored_parts(plan: Plan, matrix: Matrix, header: Header, device: torch.device) -> dict[Part, Tensor]:
    """The tensors of a matrix but for scalars."""
    parts: dict[Part, Tensor] = {}
    for part, entry in matrix_entries(matrix, plan.layout).items():
        if not is_scalar(part, entry):
            info = header.tensors[entry.name]
            tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            read_range(header.path, info.begin, tensor_bytes(tensor), header)
            parts[part] = tensor.to(device)
    return parts
