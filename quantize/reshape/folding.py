"""Fold a layer: find its exact folds, choose their factors, and prove the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix
from .folds import Fold, Place, solve
from .reshaping import Reshaping
from .structure import PROOF_TOLERANCE, Found, error_of, find_places
from .trial import LayerTrial

STRENGTH = 0.4


@dataclass(frozen=True)
class FoldedLayer:
    """The folds of a layer.

    Attributes:
        reshaping: with the folds that hold.
        reasons: for every fused group whose input is not folded, why not.
        error: of the folded layer's output in float32, relative to the layer's change of its input.
    """

    reshaping: Reshaping
    reasons: Mapping[str, str] = field(default_factory=dict)
    error: float = 0.0


@dataclass(frozen=True)
class KnownPlaces:
    """The places of the folds that held in a layer.

    Attributes:
        prefix: precedes the names of the layer's modules, with a final dot.
        reasons: see `FoldedLayer`.
    """

    prefix: str
    places: tuple[Place, ...]
    reasons: Mapping[str, str]

    def moved(self, prefix: str) -> KnownPlaces:
        """The same places in the layer of another prefix."""

        def name(old: str) -> str:
            return f"{prefix}{old.removeprefix(self.prefix)}"

        places = [
            replace(
                place,
                groups=tuple(map(name, place.groups)),
                readers=tuple(map(name, place.readers)),
                norm=None if place.norm is None else name(place.norm),
                maker=None if place.maker is None else name(place.maker),
            )
            for place in self.places
        ]
        return KnownPlaces(prefix, tuple(places), {name(group): reason for group, reason in self.reasons.items()})


def fold_layer(
    trial: LayerTrial,
    tensors: Mapping[str, Tensor],
    groups: Sequence[FusedGroup],
    matrices: Mapping[str, Matrix],
    prefix: str,
    mean_squares: Mapping[str, Tensor],
    fixed: Collection[str] = (),
    known: KnownPlaces | None = None,
) -> FoldedLayer:
    """Find the exact folds of a layer, choose their factors by the inputs and weights, and prove the layer with them.

    Args:
        mean_squares: float64 [cols], of each channel of the groups' inputs, by group. Groups without one keep theirs.
        tensors, groups, matrices, prefix, fixed: see `find_places`.
        known: places that held in a layer of the same shapes. The search begins only if their proof fails here, because
            it takes several times as long.
    """
    measured = [group for group in groups if group.name in mean_squares]
    found: Found | None = None
    if known is not None:
        found = Found(known.places, known.reasons, trial.run().output)
        folds, error = _proved(found, trial, tensors, matrices, mean_squares)
    if found is None or error > PROOF_TOLERANCE:
        found = find_places(trial, tensors, measured, matrices, prefix, fixed)
        folds, error = _proved(found, trial, tensors, matrices, mean_squares)
    if error <= PROOF_TOLERANCE:
        return FoldedLayer(Reshaping(folds, lambda name: tensors[name]), found.reasons, error)
    why = f"the folded layer's output differs by {error:.2g} of its change, more than {PROOF_TOLERANCE:g}"
    return FoldedLayer(Reshaping(), {**found.reasons, **{name: why for fold in folds for name in fold.place.groups}})


def _proved(
    found: Found,
    trial: LayerTrial,
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    mean_squares: Mapping[str, Tensor],
) -> tuple[list[Fold], float]:
    """Folds with their factors, and the error of the layer with all of them."""
    folds = [_solved(place, tensors, matrices, mean_squares) for place in found.places]
    reshaping = Reshaping(folds, lambda name: tensors[name])
    return folds, error_of(trial, found.output, tensors, matrices, reshaping) if folds else 0.0


def _solved(
    place: Place, tensors: Mapping[str, Tensor], matrices: Mapping[str, Matrix], mean_squares: Mapping[str, Tensor]
) -> Fold:
    readers = [matrices[reader] for reader in place.readers]
    squares = torch.stack([_column_squares(matrix.of(tensors)) for matrix in readers]).sum(0)
    weights = squares / sum(matrix.rows for matrix in readers)
    inputs = mean_squares[place.groups[0]].cpu()
    if place.heads is not None:
        inputs, weights = place.heads.gathered(inputs), place.heads.gathered(weights)
    return Fold(place, solve(inputs, weights, STRENGTH))


def _column_squares(weight: Tensor) -> Tensor:
    """The sum of squares of each column, float64 [cols] on the CPU."""
    return weight.float().square().sum(0, dtype=torch.float64).cpu()
