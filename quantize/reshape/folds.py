"""Folds: exact changes of scale between the tensor that makes a layer's value and the matrices that read it.

Channel j of the value is divided by s_j where it is made, and column j of each reader is multiplied by s_j. The layer
computes the same. Its values and weights have other sizes, and lose less by quantization (docs/accuracy.md, section
"Folds").

s_j is a power of two to the multiple of an eighth, so that a fold is kept in one byte a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 8  # an octave
LARGEST = 10 * STEPS  # 2^10
_TABLE = torch.tensor([2.0 ** (step / STEPS) for step in range(STEPS)], dtype=torch.float64).float()


@dataclass(frozen=True)
class Heads:
    """Attention heads between a maker's rows and its readers' columns.

    Attributes:
        groups: number of key and value heads.
        queries: query heads of each of them, which read the same values.
        size: channels of a head.
    """

    groups: int
    queries: int
    size: int

    def spread(self, rows: Tensor) -> Tensor:
        """A number for each row of the maker, [groups * size], for each column of the readers."""
        return rows.view(self.groups, 1, self.size).expand(-1, self.queries, -1).reshape(-1)

    def gathered(self, columns: Tensor) -> Tensor:
        """The mean over the query heads: [groups * queries * size] to [groups * size]."""
        return columns.view(self.groups, self.queries, self.size).mean(1).reshape(-1)


@dataclass(frozen=True)
class Place:
    """Where a fold lies. Exactly one of `norm` and `maker` is given.

    Attributes:
        groups: names of the fused groups that read the value.
        readers: names of their matrices.
        norm: name of the tensor of the norm that makes the value.
        adds_one: whether the norm multiplies by 1 + its tensor.
        maker: name of the matrix whose rows make the value, if only linear operations follow.
        first_row: the first of the maker's rows that make the value.
        heads: None where the j-th of these rows makes what column j reads.
    """

    groups: tuple[str, ...]
    readers: tuple[str, ...]
    norm: str | None = None
    adds_one: bool = False
    maker: str | None = None
    first_row: int = 0
    heads: Heads | None = None


@dataclass(frozen=True)
class Fold:
    """A fold with its factors.

    Attributes:
        exponents: int8 [n], eighths of an octave, for each element of the norm or each of the maker's rows that make
            the value.
    """

    place: Place
    exponents: Tensor

    def rows(self) -> Tensor:
        """The factor of each of the maker's rows that make the value, float32 [n]: 1 / s."""
        return power(-self.exponents)

    def columns(self, norm: Tensor | None) -> Tensor:
        """The factor of each column of the readers, float32 [cols]: s, or the exact ratio of the norm as it was to the
        norm as it is stored.

        Args:
            norm: the source's tensor of a fold with a norm.
        """
        if norm is None:
            factors = power(self.exponents)
            return factors if self.place.heads is None else self.place.heads.spread(factors)
        old, new = self._effective(norm), self._effective(self.norm(norm))
        return torch.where(new == 0, torch.ones_like(old), old / new)

    def inputs(self, norm: Tensor | None) -> Tensor:
        """The factor of each channel of the value, float32 [cols]: the inverse of `columns`."""
        if norm is None:
            factors = power(-self.exponents)
            return factors if self.place.heads is None else self.place.heads.spread(factors)
        old, new = self._effective(norm), self._effective(self.norm(norm))
        return torch.where(old == 0, torch.ones_like(old), new / old)

    def norm(self, norm: Tensor) -> Tensor:
        """The norm's tensor after the fold, in its dtype. An element that would become zero stays as it was."""
        one = float(self.place.adds_one)
        made = (self._effective(norm) * power(-self.exponents).to(norm.device) - one).to(norm.dtype)
        is_lost = (self._effective(made) == 0) | ~made.isfinite()
        return torch.where(is_lost, norm, made)

    def _effective(self, norm: Tensor) -> Tensor:
        return norm.float() + float(self.place.adds_one)


def power(exponents: Tensor) -> Tensor:
    """2 to the power of eighths, float32, on every device alike.

    Args:
        exponents: int8 of any shape.
    """
    whole = exponents.cpu().to(torch.int32)
    octave = torch.div(whole, STEPS, rounding_mode="floor")
    return torch.ldexp(_TABLE[(whole - STEPS * octave).long()], octave)


def solve(mean_square: Tensor, weight_mean_square: Tensor, strength: float) -> Tensor:
    """The exponents that make channels and columns alike: s_j = (x_j / w_j)^strength, divided by its geometric mean.

    Source: "SmoothQuant" (arXiv 2211.10438), equation 4, with root mean squares for maxima and one strength for both.

    Args:
        mean_square: float64 [n], of each channel of the value. x_j is its root.
        weight_mean_square: float64 [n], of each column over the rows of all readers. w_j is its root.
    Returns:
        int8 [n]. 0 for a channel or column of zeros.
    """
    is_alive = (mean_square > 0) & (weight_mean_square > 0)
    ones = torch.ones_like(mean_square)
    ratio = torch.where(is_alive, mean_square, ones) / torch.where(is_alive, weight_mean_square, ones)
    octaves = 0.5 * strength * torch.log2(ratio)
    if bool(is_alive.any()):
        octaves = octaves - octaves[is_alive].mean()
    eighths = torch.where(is_alive, STEPS * octaves, torch.zeros_like(octaves))
    return eighths.round().clamp(-LARGEST, LARGEST).to(torch.int8)
