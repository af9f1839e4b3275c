"""The loss by kind of text, and the kinds that lost clearly more than the others.

Any noise moves the predictions of some kinds more: on SmolLM2, the KL divergence of other languages is about 1.8 times
that of English under the rounding of BF16 and under that of NVFP4 alike. The floor measures this on the same tokens. A
kind is therefore judged by its KL over its KL of the floor, beside the median of that ratio over the other kinds
(docs/verification.md, "Kinds of text").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from .document import KindLoss, KindWarning, Predictions, known
from .tokens import TokenScores

LEAST_RELATIVE = 1.5
STANDARD_ERRORS = 3
# The standard error of a median over that of a mean, of normally distributed values: sqrt(pi / 2).
MEDIAN_ERROR = math.sqrt(math.pi / 2)

Ratio = tuple[float, float]  # a ratio and its standard error


def losses_by_kind(
    score: TokenScores, floor: TokenScores | None, kinds: Sequence[str], again: TokenScores | None = None
) -> dict[str, KindLoss]:
    """The loss of a lane on each kind of text, in the order in which kinds begin.

    Args:
        floor: of the source's noise, on the same tokens. None for the floor itself.
        kinds: of each sequence. Empty where they are not known.
        again: see `TokenScores.divergence`.
    """
    places: dict[str, list[int]] = {}
    for at, kind in enumerate(kinds):
        places.setdefault(kind, []).append(at)
    ratios = {
        kind: None if floor is None else over_floor(score.of(rows), floor.of(rows)) for kind, rows in places.items()
    }
    losses = {}
    for kind, rows in places.items():
        own, own_again = score.of(rows), None if again is None else again.of(rows)
        others = [ratio for name, ratio in ratios.items() if name != kind and ratio is not None]
        relative, error = beside(ratios[kind], others) or (None, None)
        losses[kind] = KindLoss(
            sequences=len(rows),
            tokens=len(own.kl),
            kl=own.divergence(own_again),
            top1=own.agreement(own_again),
            relative=relative,
            relative_error=error,
        )
    return losses


def over_floor(score: TokenScores, floor: TokenScores) -> Ratio | None:
    """KL over the floor's KL, and the standard error over sequences (the ratio estimator's, see `standard_error`).

    The two come from the same tokens, so that a sequence that is hard for both does not widen the error. None for one
    sequence, and for a floor of zero.
    """
    lengths = list(score.lengths)
    sums = torch.stack([part.sum() for part in score.kl.split(lengths)])
    floors = torch.stack([part.sum() for part in floor.kl.split(lengths)])
    whole = float(floors.sum())
    if len(lengths) < 2 or whole <= 0:
        return None
    ratio = float(sums.sum()) / whole
    spread = float((sums - ratio * floors).square().sum()) / (len(lengths) - 1)
    return ratio, math.sqrt(spread * len(lengths)) / whole


def beside(own: Ratio | None, others: Sequence[Ratio]) -> Ratio | None:
    """A ratio over the median of the others, with its standard error. None where one of the two is not known."""
    if own is None or not others:
        return None
    middle = median(ratio for ratio, _ in others)
    if not middle > 0 or not own[0] > 0:
        return None
    error = MEDIAN_ERROR * math.sqrt(sum(error**2 for _, error in others)) / len(others)
    relative = own[0] / middle
    return relative, relative * math.hypot(own[1] / own[0], error / middle)


def kind_warnings(arithmetics: Mapping[str, Predictions]) -> list[KindWarning]:
    """The kinds that lost clearly more than the others: 1.5 times as much, beyond three standard errors."""
    return [
        KindWarning(arithmetic, kind, loss.kl.mean, loss.relative, loss.relative_error)
        for arithmetic, predictions in arithmetics.items()
        for kind, loss in predictions.kinds.items()
        if known(loss.relative) > LEAST_RELATIVE
        and known(loss.relative) - 1 > STANDARD_ERRORS * known(loss.relative_error)
    ]


def warning_words(warning: KindWarning, arithmetic: str) -> str:
    """The sentences of a warning.

    Args:
        arithmetic: its words.
    """
    times = f"{known(warning.relative):.2f} ± {known(warning.relative_error):.2f} times"
    return (
        f"Text of the kind {warning.kind} lost {times} as much as the other kinds in {arithmetic} (KL "
        f"{known(warning.kl):.4f} nats, compared by the floor of each kind). Calibrate on more text of this kind."
    )
