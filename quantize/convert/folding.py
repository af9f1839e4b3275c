"""Folds of the layers of a conversion: every rank gets the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..plan.plan import Plan
from ..recipe.groups import FusedGroup
from ..recipe.roles import Role
from ..reshape.folding import FoldedLayer, fold_layer
from ..reshape.records import folding_record, folds_of, reshaping_of
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.manifest import FoldingRecord, LayerRecord
from ..stream.memory import telling_of_full_gpu
from ..stream.reading import LoadedLayer
from ..stream.trace import Trace
from .known_folds import KnownFolds
from .matrices import naming_damage
from .ranks import Ranks
from .walking import CalibrationWalk


class Folding:
    """Folds one layer after another.

    Args:
        ranks: those that go through each layer together.
        done: the layers that an earlier run made. With them, a run that is resumed makes the same folds.
    """

    def __init__(self, plan: Plan, ranks: Ranks, trace: Trace, done: Iterable[LayerRecord] = ()) -> None:
        self._plan, self._ranks, self._trace = plan, ranks, trace
        self._known = KnownFolds(plan)
        for one in done:
            if one.layer is not None and one.folding is not None:
                self._remember(one.layer, one.folding)

    def fold(self, groups: Sequence[FusedGroup], loaded: LoadedLayer, walk: CalibrationWalk) -> FoldedLayer:
        """The folds of a layer, chosen by the inputs of all ranks. The walk stays in front of the layer.

        Raises:
            CheckFailed: an input is not finite, or never reached.
        """
        ranks, plan = self._ranks, self._plan
        with ranks.step():
            sizes = walk.observe_sizes(loaded.layer, loaded.tensors, groups)
        with naming_damage(plan, loaded.layer, loaded.tensors):
            found = {name: ranks.merged(ranges).result(name).mean_square for name, ranges in sizes.items()}
        mean_squares = {name: square for name, square in found.items() if square is not None}
        chooser = ranks.exchange(walk.has_batches).index(True)  # a rank of several may have no sequences
        folded = None
        with (
            ranks.step(),
            self._trace.timed("fold", f"layer {loaded.layer}"),
            telling_of_full_gpu(f"the folds of layer {loaded.layer}"),
        ):
            if ranks.rank == chooser:
                trial, fixed = walk.trial(loaded.layer, loaded.tensors), self._fixed(groups)
                prefix, known = f"{walk.prefix}.{loaded.layer}.", self._known.find(loaded.layer)
                folded = fold_layer(trial, loaded.tensors, groups, plan.matrices, prefix, mean_squares, fixed, known)
        record = ranks.exchange(None if folded is None else folding_record(folded))[chooser]
        self._remember(loaded.layer, record)
        return _folded(plan, record, loaded.tensors)

    def _remember(self, layer: int, record: FoldingRecord) -> None:
        self._known.note(layer, folds_of(record, _members(self._plan)), record.unfolded)

    def _fixed(self, groups: Sequence[FusedGroup]) -> frozenset[str]:
        """Names of the matrices whose outputs keep their scale: those that an FP8 KV cache stores under scales of the
        source."""
        if self._plan.recipe.kv_cache.served != "fp8":
            return frozenset()
        members = (module for group in groups for module in group.members)
        roles, matrices = self._plan.selection.roles, self._plan.matrices
        return frozenset(module for module in members if roles[matrices[module].tensor] is Role.ATTENTION)


def reshaping_of_layer(plan: Plan, record: LayerRecord, tensors: Mapping[str, Tensor]) -> Reshaping:
    """The folds of a layer that an earlier run made.

    Args:
        tensors: of the source.
    """
    return UNCHANGED if record.folding is None else _folded(plan, record.folding, tensors).reshaping


def _folded(plan: Plan, record: FoldingRecord, tensors: Mapping[str, Tensor]) -> FoldedLayer:
    reshaping = reshaping_of([record], _members(plan), lambda name: tensors[name])
    return FoldedLayer(reshaping, record.unfolded, record.error)


def _members(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {group.name: group.members for group in plan.groups}
