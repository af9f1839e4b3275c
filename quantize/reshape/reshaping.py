"""The folds of a layer, applied to its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .folds import Fold

Read = Callable[[str], Tensor]
"""Reads a tensor of the source by its name."""


class Reshaping:
    """The folds of a layer or of several. Without folds, nothing changes.

    Args:
        folds: no two have a group in common, or a maker.
        read: for the norms.
    """

    def __init__(self, folds: Iterable[Fold] = (), read: Read | None = None) -> None:
        self.folds = tuple(folds)
        self.norms: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[int, Tensor]] = {}
        self._columns: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        for fold in self.folds:
            norm = None
            if fold.place.norm is not None:
                assert read is not None
                norm = read(fold.place.norm).cpu()
                self.norms[fold.place.norm] = fold.norm(norm)
            if fold.place.maker is not None:
                self._rows[fold.place.maker] = fold.place.first_row, fold.rows()
            self._columns |= dict.fromkeys(fold.place.readers, fold.columns(norm))
            self._inputs |= dict.fromkeys(fold.place.groups, fold.inputs(norm))

    def changes(self, module: str) -> bool:
        """Whether a matrix has other values than in the source."""
        return module in self._rows or module in self._columns

    def weight(self, module: str, weight: Tensor, first_row: int = 0) -> Tensor:
        """A matrix after the folds: float32, or the given one where no fold changes it.

        Args:
            module: its name.
            weight: [some rows, cols] of the source, in any float dtype, on any device.
            first_row: number of the first of these rows in the matrix.
        """
        if not self.changes(module):
            return weight
        made = weight.to(torch.float32, copy=True)
        if module in self._rows:
            begin, factors = self._rows[module]
            begin -= first_row  # in `made`
            own = made[max(0, begin) : max(0, begin + len(factors))]
            own *= factors[max(0, -begin) :][: len(own)].to(made.device).unsqueeze(1)
        if module in self._columns:
            made *= self._columns[module].to(made.device)
        return made

    def unfolded(self, module: str, weight: Tensor) -> Tensor:
        """The inverse of `weight` for a complete matrix: in the source's scale, float32, or the given one where no fold
        changes it.

        Args:
            module: its name.
            weight: [rows, cols] after the folds, in any float dtype, on any device.
        """
        if not self.changes(module):
            return weight
        made = weight.to(torch.float32, copy=True)
        if module in self._rows:
            begin, factors = self._rows[module]
            made[begin : begin + len(factors)] /= factors.to(made.device).unsqueeze(1)
        if module in self._columns:
            made /= self._columns[module].to(made.device)
        return made

    def input_factor(self, group: str) -> Tensor | None:
        """The factor of each channel of a group's input in the source, float32 [cols] on the CPU. None for no fold."""
        return self._inputs.get(group)

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norms after the folds in place of the source's, on the device of these, and the other tensors as they
        are. Matrices are not changed here."""
        return {
            name: self.norms[name].to(tensor.device) if name in self.norms else tensor
            for name, tensor in tensors.items()
        }


UNCHANGED = Reshaping()
"""No folds."""
