"""A statistic for tests of what ranks exchange, and its state as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor


class Kept:
    """A statistic of tensors whose sizes differ between ranks, and which keeps what it is merged from."""

    name: ClassVar[str] = "kept"
    lanes: tuple[str, ...] = ()

    def __init__(self, rank: int, states: Sequence[Mapping[str, Tensor]] = ()) -> None:
        self.rank, self.states = rank, states

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def commit(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        rows = torch.arange(3 * self.rank, dtype=torch.float64).reshape(self.rank, 3)
        return {
            "none": torch.empty(0),
            "rows": rows / 7,
            "nan": torch.tensor([math.nan, -math.inf, -0.0], dtype=torch.float32) * (1 + self.rank),
            "turned": torch.tensor([[1, 2, 3], [4, 5, 6 + self.rank]]).t(),
            "bytes": torch.tensor([7 + self.rank], dtype=torch.uint8),
        }

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Kept:
        return cls(-1, states)


def plain(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Dtype, shape and bytes of each tensor."""
    return {
        name: [str(tensor.dtype), str(list(tensor.shape)), tensor.contiguous().numpy().tobytes().hex()]
        for name, tensor in state.items()
    }
