"""Folds of tiny models, found in a walk of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from nvquant.calibrate.statistics.ranges import InputRanges
from nvquant.calibrate.walk import make_batches
from nvquant.plan.plan import Plan
from nvquant.recipe.schema import Recipe
from nvquant.reshape.folding import FoldedLayer, KnownPlaces, fold_layer
from nvquant.reshape.trial import LayerTrial
from nvquant.stream.hidden import HiddenBudget
from support.conversions import layer_weights, planned, random_samples, skeleton_of
from support.walking import OneLane
from torch import Tensor


@dataclass(frozen=True)
class WalkedLayer:
    """A layer in front of which a walk stands."""

    number: int
    plan: Plan
    prefix: str
    tensors: dict[str, Tensor]
    trial: LayerTrial
    mean_squares: dict[str, Tensor]

    def fold(self, known: KnownPlaces | None = None) -> FoldedLayer:
        """The folds of the layer."""
        groups = [group for group in self.plan.groups if group.name in self.mean_squares]
        matrices, squares = self.plan.matrices, self.mean_squares
        return fold_layer(self.trial, self.tensors, groups, matrices, self.prefix, squares, known=known)


def walked_layers(folder: Path, recipe: str | Recipe = "nvfp4-full") -> Iterator[WalkedLayer]:
    """The layers of a model, with the source's hidden states in front of each."""
    plan, skeleton = planned(folder, recipe), skeleton_of(folder)
    samples: Sequence[Tensor] = random_samples((40, 24))
    walk = OneLane(skeleton, make_batches(samples, 1), HiddenBudget(0, 1 << 30, Path("no file is made")))
    for number in plan.layers:
        prefix = f"{skeleton.layer_prefix}.{number}."
        groups = [group for group in plan.groups if group.name.startswith(prefix)]
        tensors = layer_weights(skeleton, number)
        trial = LayerTrial(walk.lane, number, tensors)
        ranges: dict[str, InputRanges] = walk.step(number, tensors, groups, True)
        found = {name: one.result(name).mean_square for name, one in ranges.items()}
        yield WalkedLayer(
            number, plan, prefix, tensors, trial, {name: square for name, square in found.items() if square is not None}
        )


def folded_tensors(layer: WalkedLayer, folded: FoldedLayer) -> dict[str, Tensor]:
    """The tensors that the folds of a layer change, as a server has them but for quantization: float32."""
    reshaping = folded.reshaping
    changed = {name: norm.float() for name, norm in reshaping.norms.items()}
    for matrix in layer.plan.matrices.values():
        if matrix.tensor in layer.tensors and reshaping.changes(matrix.name):
            changed[matrix.tensor] = reshaping.weight(matrix.name, matrix.of(layer.tensors)).to(torch.float32)
    return changed
