"""The folds that held in earlier layers of a model, for layers of the same tensors and fused groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..plan.plan import Plan
from ..reshape.folding import KnownPlaces
from ..reshape.folds import Fold
from .matrices import groups_of_layer

_Kind = frozenset[tuple[str, tuple[int, ...]]]


class KnownFolds:
    """Where the folds of a plan's layers lie, as far as they are known."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._infos, self._names = plan, plan.source.infos(), plan.tensors_by_layer()
        self._places: dict[int, KnownPlaces] = {}
        self._kinds: dict[int, _Kind] = {}

    def note(self, layer: int, folds: Iterable[Fold], reasons: Mapping[str, str]) -> None:
        """Remember the folds of a layer. A layer without a fold shows nothing that holds.

        Args:
            reasons: see `FoldedLayer`.
        """
        places = tuple(fold.place for fold in folds)
        if places:
            self._places[layer] = KnownPlaces(self._prefix(layer), places, reasons)

    def find(self, layer: int) -> KnownPlaces | None:
        """The places of the nearest layer before this one that is of its kind and has a fold, moved to this one."""
        for other in sorted((one for one in self._places if one < layer), reverse=True):
            if self._kind(other) == self._kind(layer):
                return self._places[other].moved(self._prefix(layer))
        return None

    def _kind(self, layer: int) -> _Kind:
        if layer not in self._kinds:
            prefix = self._prefix(layer)
            tensors = {(name.removeprefix(prefix), self._infos[name].shape) for name in self._names[layer]}
            groups = groups_of_layer(self._plan.groups, self._plan.prefix, layer)
            self._kinds[layer] = frozenset(tensors | {(group.name.removeprefix(prefix), ()) for group in groups})
        return self._kinds[layer]

    def _prefix(self, layer: int) -> str:
        return f"{self._plan.prefix}.{layer}."
