"""Where the folds of a layer may lie: found by the tensors that pass, and proved by a trial of each.

A trial multiplies by powers of two, so an exact fold changes nothing but a norm's rounding. A module that reads a value
besides the quantized matrices, a bias, or an operation that is not linear changes the layer's output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.taps import LinearTap
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix
from .folds import STEPS, Fold, Heads, Place
from .reshaping import Reshaping
from .trial import LayerTrial, Passed, is_same

TRIAL_TOLERANCE = 1e-5
PROOF_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        places: of exact folds.
        reasons: for every other fused group, why its input is not folded.
        output: of the layer in the source, float32.
    """

    places: tuple[Place, ...]
    reasons: Mapping[str, str]
    output: Tensor


def find_places(
    trial: LayerTrial,
    tensors: Mapping[str, Tensor],
    groups: Sequence[FusedGroup],
    matrices: Mapping[str, Matrix],
    prefix: str,
    fixed: Collection[str] = (),
) -> Found:
    """Find the exact folds of a layer.

    Args:
        tensors: of the layer in the source, by their names in the checkpoint, on the device.
        groups: the fused groups of the layer.
        matrices: at least theirs, by name.
        prefix: precedes the names of the layer's modules, with a final dot.
        fixed: names of matrices whose outputs keep their scale.
    """
    own = [matrices[module] for group in groups for module in group.members]
    tap = LinearTap.of_groups(groups, prefix)
    passed, head_sizes = trial.run(tap=tap), trial.head_sizes(prefix)
    places: list[Place] = []
    reasons: dict[str, str] = {}
    for names in _sharing(groups, passed):
        readers = tuple(module for group in groups if group.name in names for module in group.members)
        makers = [matrix for matrix in reversed(own) if matrix.name not in {*readers, *fixed}]
        candidates = [
            *_norm_places(passed, names, readers),
            *_maker_places(makers, names, [matrices[reader] for reader in readers], head_sizes),
        ]
        taken = {place.maker for place in places} | {place.norm for place in places}
        for place in candidates:
            if (place.maker or place.norm) not in taken and _is_exact(place, trial, passed.output, tensors, matrices):
                places.append(place)
                break
        else:
            why = "no candidate of this layer is exact" if candidates else "no norm and no quantized matrix makes it"
            reasons |= dict.fromkeys(names, why)
    return Found(tuple(places), reasons, passed.output)


def error_of(
    trial: LayerTrial,
    reference: Tensor,
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    reshaping: Reshaping,
) -> float:
    """`LayerTrial.error` of a layer after folds."""
    return trial.error(reference, _changed(tensors, matrices, reshaping))


def _sharing(groups: Sequence[FusedGroup], passed: Passed) -> Iterator[tuple[str, ...]]:
    """The names of fused groups that read one value together."""
    left = [group.name for group in groups if group.name in passed.inputs]
    while left:
        first = passed.inputs[left[0]]
        names = tuple(name for name in left if is_same(passed.inputs[name], first))
        yield names
        left = [name for name in left if name not in names]


def _norm_places(passed: Passed, names: tuple[str, ...], readers: tuple[str, ...]) -> Iterator[Place]:
    value = passed.inputs[names[0]]
    for norm, output in passed.norms.items():
        if is_same(output, value):
            yield Place(names, readers, norm=norm)
            yield Place(names, readers, norm=norm, adds_one=True)


def _maker_places(
    makers: Sequence[Matrix], names: tuple[str, ...], readers: Sequence[Matrix], head_sizes: Mapping[str, int]
) -> Iterator[Place]:
    """Rows of one matrix for every column: all of them, or a part where several matrices are stored as one."""
    cols, modules = readers[0].cols, tuple(reader.name for reader in readers)
    for maker in makers:
        for first_row in range(maker.rows - cols, -1, -cols):
            yield Place(names, modules, maker=maker.name, first_row=first_row)
        for heads, first_row in _heads(maker.rows, cols, head_sizes.get(maker.name.rpartition(".")[0], 0)):
            yield Place(names, modules, maker=maker.name, first_row=first_row, heads=heads)


def _heads(rows: int, cols: int, size: int) -> Iterator[tuple[Heads, int]]:
    """Heads of values in a matrix of values alone, or of queries, keys and values, with their first row."""
    if not size or cols % size:
        return
    for value_rows in (rows, (rows - cols) // 2):
        if 0 < value_rows < cols and value_rows % size == 0 and cols % value_rows == 0:
            yield Heads(value_rows // size, cols // value_rows, size), rows - value_rows


def _is_exact(
    place: Place, trial: LayerTrial, reference: Tensor, tensors: Mapping[str, Tensor], matrices: Mapping[str, Matrix]
) -> bool:
    size = matrices[place.readers[0]].cols
    size = size if place.heads is None else size // place.heads.queries
    exponents = (STEPS * ((torch.arange(size) * 7 + 3) % 5 - 2)).to(torch.int8)  # from a quarter to four times
    reshaping = Reshaping([Fold(place, exponents)], lambda name: tensors[name].float())
    return error_of(trial, reference, tensors, matrices, reshaping) <= TRIAL_TOLERANCE


def _changed(tensors: Mapping[str, Tensor], matrices: Mapping[str, Matrix], reshaping: Reshaping) -> dict[str, Tensor]:
    """The tensors that folds change, complete, float32 on the device of the source's."""
    changed: dict[str, Tensor] = {}
    for name, norm in reshaping.norms.items():
        changed[name] = norm.to(tensors[name].device)
    for matrix in matrices.values():
        if reshaping.changes(matrix.name) and matrix.tensor in tensors:
            if matrix.tensor not in changed:
                changed[matrix.tensor] = tensors[matrix.tensor].to(torch.float32, copy=True)
            part = matrix.of(changed)
            part.copy_(reshaping.weight(matrix.name, part))
    return changed
