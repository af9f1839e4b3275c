"""The choice of schemes by a budget, from the loss of each fused group quantized alone.

Every step gives one group its next scheme: FP8, then none. The step with the largest gain a byte comes first. A group's
gain is the part of its own KL divergence that the step removes.

The sum of these gains is not the gain of all steps together. The forecast is therefore linear between measured ends:

    KL = KL(all FP8) (1 - s16) + (KL(recipe) - KL(all FP8)) (1 - s8)

with s8 and s16 the shares of all possible gains that the steps to FP8 and to no quantization have made.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """A fused group in one scheme.

    Attributes:
        scheme: its name, `bf16` for none.
        kl: the mean KL divergence in nats with this group alone in this scheme.
        tensor_bytes: of all tensors that are stored for it.
        weight_bytes: the same without scalars.
    """

    scheme: str
    kl: float
    tensor_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Ladder:
    """The forms that a group may take, the smallest first and the unquantized one last."""

    name: str
    weights: int
    forms: tuple[Form, ...]


@dataclass(frozen=True)
class Point:
    """A point of the curve.

    Attributes:
        group: the group that the last step changed, and its new scheme. None at the beginning.
        tensor_bytes: of the complete checkpoint.
        bits: stored bits a weight of the recipe's matrices in decoder layers, scalars excluded.
        kl: the forecast.
        at: the place of each group's form on its ladder, in the order of the ladders.
    """

    group: str | None
    scheme: str | None
    tensor_bytes: int
    bits: float
    kl: float
    at: tuple[int, ...]


def curve(ladders: Sequence[Ladder], kl_recipe: float, kl_fp8: float, tensor_bytes: int) -> list[Point]:
    """All choices from the recipe's own schemes up, one step each. One group at least stays quantized.

    Args:
        kl_recipe, kl_fp8: measured with all groups in the recipe's schemes, and in FP8.
        tensor_bytes: of the checkpoint in the recipe's schemes.
    """
    at = [0] * len(ladders)
    weights = sum(ladder.weights for ladder in ladders)
    stored = sum(ladder.forms[0].weight_bytes for ladder in ladders)
    forecast = _Forecast(ladders, kl_recipe, kl_fp8)
    points = [Point(None, None, tensor_bytes, 8 * stored / weights, forecast.kl, tuple(at))]
    for place in _steps(ladders):
        ladder, before = ladders[place], ladders[place].forms[at[place]]
        at[place] += 1
        after = ladder.forms[at[place]]
        tensor_bytes += after.tensor_bytes - before.tensor_bytes
        stored += after.weight_bytes - before.weight_bytes
        forecast.step(ladder, at[place])
        if all(reached == len(own.forms) - 1 for reached, own in zip(at, ladders, strict=True)):
            break
        points.append(Point(ladder.name, after.scheme, tensor_bytes, 8 * stored / weights, forecast.kl, tuple(at)))
    return points


def _steps(ladders: Sequence[Ladder]) -> Iterator[int]:
    """The places of the ladders in the order of the steps, the largest gain a byte first."""
    waiting = [(-_ratio(ladder, 1), place, 1) for place, ladder in enumerate(ladders) if len(ladder.forms) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, place, to = heapq.heappop(waiting)
        yield place
        if to + 1 < len(ladders[place].forms):
            heapq.heappush(waiting, (-_ratio(ladders[place], to + 1), place, to + 1))


def gain(ladder: Ladder, to: int) -> float:
    """The part of a group's own KL divergence that the step to a form removes, not below 0."""
    return max(0.0, ladder.forms[to - 1].kl - ladder.forms[to].kl)


def _ratio(ladder: Ladder, to: int) -> float:
    more = ladder.forms[to].tensor_bytes - ladder.forms[to - 1].tensor_bytes
    return gain(ladder, to) / max(1, more)


class _Forecast:
    """The forecast on the way. Without any gain, every step counts alike."""

    def __init__(self, ladders: Sequence[Ladder], kl_recipe: float, kl_fp8: float) -> None:
        self._kl_fp8, self._first = kl_fp8, max(0.0, kl_recipe - kl_fp8)
        ends = [(ladder, to) for ladder in ladders for to in range(1, len(ladder.forms))]
        self._left = dict.fromkeys((False, True), 0.0)
        self._is_flat = {
            is_last: not any(gain(*end) for end in ends if _is_last(*end) is is_last) for is_last in self._left
        }
        for ladder, to in ends:
            self._left[_is_last(ladder, to)] += self._weight(ladder, to)
        self._total = dict(self._left)

    def _weight(self, ladder: Ladder, to: int) -> float:
        return 1.0 if self._is_flat[_is_last(ladder, to)] else gain(ladder, to)

    def step(self, ladder: Ladder, to: int) -> None:
        self._left[_is_last(ladder, to)] -= self._weight(ladder, to)

    @property
    def kl(self) -> float:
        return self._kl_fp8 * self._share_left(True) + self._first * self._share_left(False)

    def _share_left(self, is_last: bool) -> float:
        total = self._total[is_last]
        return max(0.0, self._left[is_last]) / total if total else 0.0


def _is_last(ladder: Ladder, to: int) -> bool:
    """Whether a step leaves the group unquantized."""
    return to == len(ladder.forms) - 1


def schemes_at(ladders: Sequence[Ladder], point: Point) -> Mapping[str, str]:
    """The scheme of each group at a point of the curve, by the group's name."""
    return {ladder.name: ladder.forms[at].scheme for ladder, at in zip(ladders, point.at, strict=True)}
