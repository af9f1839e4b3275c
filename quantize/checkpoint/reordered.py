"""A checkpoint whose tensors have their rows or columns in another order. Every reader sees the new order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .source import Checkpoint, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reordered(Checkpoint):
    """A checkpoint with the elements along one axis of some tensors in a common order.

    Attributes:
        order: the place in the stored tensor of each element, a permutation.
        axes: 0 for rows (or the elements of a vector) and 1 for columns, by the names of these tensors.
    """

    order: Sequence[int] = ()
    axes: Mapping[str, int] = field(default_factory=dict, repr=False)

    @cached_property
    def _order(self) -> torch.Tensor:
        import torch

        return torch.tensor(self.order, dtype=torch.int64)

    def read_into(self, name: str, buffer: memoryview, begin: int = 0) -> None:
        """See `Checkpoint.read_into`."""
        if name not in self.axes:
            super().read_into(name, buffer, begin)
            return
        info = self.info(name)
        if not 0 <= begin <= info.nbytes - len(buffer):
            raise IndexError(f"bytes {begin} to {begin + len(buffer)} of {name}, which has {info.nbytes}")
        if not len(buffer):
            return
        row_bytes = info.nbytes // info.shape[0]
        first, last = begin // row_bytes, -(-(begin + len(buffer)) // row_bytes)
        rows = self._columns(name, first, last) if self.axes[name] else self._rows(name, first, last)
        start = begin - first * row_bytes
        buffer[:] = tensor_bytes(rows)[start : start + len(buffer)]

    def _columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Neighbouring rows with their columns in the new order."""
        rows = self._stored_rows(name, first, last)
        return rows.index_select(1, self._order)

    def _rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows that are neighbours in the new order."""
        wanted = self._order[first:last]
        if len(self.info(name).shape) == 1:
            return self._stored_rows(name, 0, len(self._order)).index_select(0, wanted)
        import torch

        return torch.cat([self._stored_rows(name, row, row + 1) for row in wanted.tolist()])

    def _stored_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        import torch

        info = self.info(name)
        rows = torch.empty((last - first, *info.shape[1:]), dtype=torch_dtype(info.dtype))
        super().read_into(name, tensor_bytes(rows), first * (info.nbytes // info.shape[0]))
        return rows


def reordered(source: Checkpoint, order: Sequence[int], axes: Mapping[str, int]) -> Reordered:
    """A checkpoint with the elements of some tensors in another order.

    Args:
        order, axes: see `Reordered`.
    Raises:
        ValueError: `order` is no permutation, or an axis of a tensor has another length.
        KeyError: there is no such tensor.
    """
    if sorted(order) != list(range(len(order))):
        raise ValueError("the order is no permutation")
    for name, axis in axes.items():
        shape = source.info(name).shape
        if len(shape) > 2 or not 0 <= axis < len(shape) or shape[axis] != len(order):
            raise ValueError(f"{name} has the shape {list(shape)}, and no {len(order)} elements along axis {axis}")
    fields: dict[str, Any] = {key: getattr(source, key) for key in source.__dataclass_fields__}
    return Reordered(**fields, order=tuple(order), axes=dict(axes))
