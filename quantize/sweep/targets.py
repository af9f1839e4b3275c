"""Budgets, and the point of the curve that each of them chooses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from .choice import Point

ROUNDING = 1e-9


@dataclass(frozen=True)
class Target:
    """A budget.

    Attributes:
        kind: `bits` (stored bits a weight at most), `size` (bytes of the checkpoint's shards at most), or `kl` (the
            forecast of the mean KL divergence in nats at most).
    """

    kind: Literal["bits", "size", "kl"]
    value: float

    @property
    def option(self) -> str:
        """The option of the command line that gives it."""
        return {"bits": "--target-bits", "size": "--target-size", "kl": "--max-kl"}[self.kind]

    @property
    def words(self) -> str:
        """The option with its value."""
        return f"{self.option} {self.value / 1e9:g}GB" if self.kind == "size" else f"{self.option} {self.value:g}"

    @property
    def suffix(self) -> str:
        """The end of the name of a recipe for it."""
        if self.kind == "size":
            return f"{self.value / 1e9:g}gb"
        return f"{self.value:g}bits" if self.kind == "bits" else f"kl{self.value:g}"


def targets_of(bits: Sequence[float], sizes: Sequence[float], kls: Sequence[float]) -> list[Target]:
    """The budgets that options give.

    Raises:
        InputError: one of them is no positive number.
    """
    found = [Target("bits", value) for value in bits]
    found += [Target("size", value) for value in sizes]
    found += [Target("kl", value) for value in kls]
    for target in found:
        if not 0 < target.value < float("inf"):
            raise InputError(f"{target.words} is not a positive number", where=target.option, hint="give one above 0")
    return found


def only_target(bits: float | None, size: int | None, kl: float | None) -> Target | None:
    """The one budget of a conversion, or None.

    Raises:
        InputError: several are given, or one is no positive number.
    """
    found = targets_of(*(([] if value is None else [value]) for value in (bits, size, kl)))
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(target.words for target in found)} are two budgets for one conversion",
            where=found[0].option,
            hint="give one of them, or get a recipe for each from nvquant sweep",
        )
    return found[0] if found else None


def chosen(points: Sequence[Point], target: Target, file_bytes: Callable[[Point], int]) -> Point:
    """The best point of the curve within a budget.

    Args:
        file_bytes: computes the bytes of all shards at a point.
    Raises:
        InputError: no point is within it. The message gives the possible range.
    """
    if target.kind == "kl":
        within = [point for point in points if point.kl <= target.value]
        if not within:
            raise _impossible(target, f"{points[-1].kl:.3g} to {points[0].kl:.3g} nats")
        return within[0]
    if target.kind == "bits":
        count = bisect_right(points, target.value + ROUNDING, key=lambda point: point.bits)
        if not count:
            raise _impossible(target, f"{points[0].bits:.4g} to {points[-1].bits:.4g} bits a weight")
    else:
        count = bisect_right(points, target.value, key=file_bytes)
        if not count:
            raise _impossible(target, f"{file_bytes(points[0]):,} to {file_bytes(points[-1]):,} bytes")
    return points[count - 1]


def _impossible(target: Target, reach: str) -> InputError:
    return InputError(
        f"{target.words} is impossible, because the recipes of this curve reach from {reach}",
        where=target.option,
        hint="Give a number in this range, or begin with another recipe",
    )
