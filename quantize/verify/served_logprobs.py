"""The comparison of a server's likelihood of a prompt with that computed from the checkpoint's files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles
from typing import Any

from ..checkpoint.config_values import config_int
from ..format.schemes import ARITHMETIC_WORDS, Arithmetic
from ..recipe.roles import text_config
from .report import Finding, not_applicable
from .subject import Subject

Emulate = Callable[[list[int], Arithmetic], list[float]]

# W4A4 is chaotic: one input that rounds the other way changes all after it, so right servers differ by 0.4 to 0.6 nat a
# token, but by less than 0.1 in the mean over 200 tokens and more.
LEAST_TOKENS = 200
MOST_MEAN_W4A4 = 0.15
# Weights alone leave the rounding of 16-bit sums: 0.04 nat a token, 0.2 at most, in models of 135M parameters. Logits
# are rounded to BF16 too, by up to 0.06 at 16 to 32, so a few unlikely tokens may differ by more; a wrong model differs
# everywhere. The tail is held at the 99th percentile, and nothing may be far off.
MOST_MEAN_WEIGHT_ONLY = 0.1
MOST_P99_WEIGHT_ONLY = 0.5
MOST_EVER_WEIGHT_ONLY = 2.0
# A model knows its text if it needs less than half of what guessing needs: ln(vocabulary) / 2 is 5.4 nats for 49,152
# tokens, and 6.2 for 262,144. Models of 135M parameters need 3.5; swapped nibbles give 21, an inverted scale ln(V).
KNOWS_TEXT = 0.5
# A model whose own tokens move by more than this between two 16-bit computations cannot be held token by token. Random
# weights of 60 layers move by a nat; SmolLM2-135M by 0.02.
MOST_NOISE = MOST_MEAN_WEIGHT_ONLY / 2
STANDARD_ERRORS = 5


@dataclass(frozen=True)
class SourceFigures:
    """The numbers of the source that the stage `numerics` measured.

    Attributes:
        nll: nats a token of text.
        noise: mean absolute difference, in nats, of a token's likelihood between two computations in 16 bits.
    """

    nll: float
    noise: float = 0.0


def compare_logprobs(
    subject: Subject,
    served: Sequence[float],
    emulated: Mapping[Arithmetic, Sequence[float]],
    source: SourceFigures | None,
) -> tuple[Finding, dict[str, Any]]:
    """Compare the likelihoods of a prompt, served and emulated.

    Args:
        served: natural-log likelihood of each token but the first.
        emulated: the same from the files alone, under the server's arithmetic, or where that is unknown, under each
            that the checkpoint allows.
        source: on a text of the same kind. None where it was not measured.
    Returns:
        The verdict, and the numbers of the document's `logprobs`.
    """
    measured = [_measure(arithmetic, served, values) for arithmetic, values in emulated.items()]
    noise = 0.0 if source is None else source.noise
    best = min(measured, key=lambda one: (len(_faults(one, noise)), abs(one["mean_difference"])))
    said = ARITHMETIC_WORDS[best["arithmetic"]]
    looked_at = (
        f"{best['tokens']} tokens: {best['nll_served']:.4f} nats a token served, {best['nll_emulated']:.4f} emulated "
        f"from the files ({said}), mean difference {best['mean_difference']:+.4f}, mean absolute difference "
        f"{best['mean_absolute_difference']:.3f}, largest {best['max_difference']:.2f}"
    )
    if noise > MOST_NOISE:
        looked_at += f", only the mean is checked because 16 bits change the source's own tokens by {noise:.3f} nats"
    # Damaged weights blow differences up too: what is damaged comes before what differs.
    faults = _text_faults(subject, best["nll_served"], source) + _faults(best, noise)
    return Finding(looked_at, faults), best


def _measure(arithmetic: Arithmetic, served: Sequence[float], emulated: Sequence[float]) -> dict[str, Any]:
    differences = [got - expected for got, expected in zip(served, emulated, strict=True)]
    sizes = [abs(difference) for difference in differences]
    return {
        "arithmetic": arithmetic,
        "tokens": len(served),
        "nll_served": -mean(served),
        "nll_emulated": -mean(emulated),
        "mean_difference": -mean(differences),
        "mean_absolute_difference": mean(sizes),
        "p99_difference": quantiles(sizes, n=100, method="inclusive")[98] if len(sizes) > 1 else sizes[0],
        "max_difference": max(sizes),
    }


def _faults(one: dict[str, Any], noise: float) -> list[str]:
    if not math.isfinite(one["nll_served"]):
        return ["the server's likelihoods contain a NaN or an infinity"]
    if one["arithmetic"] != "weight_only" or noise > MOST_NOISE:
        most = max(MOST_MEAN_W4A4, STANDARD_ERRORS * noise / math.sqrt(one["tokens"]))
        limits = [("mean_difference", most, "the mean differs by")]
    else:
        limits = [
            ("mean_absolute_difference", MOST_MEAN_WEIGHT_ONLY, "tokens differ by a mean of"),
            ("p99_difference", MOST_P99_WEIGHT_ONLY, "one token in a hundred differs by"),
            ("max_difference", MOST_EVER_WEIGHT_ONLY, "a token differs by"),
        ]
    return [
        f"{words} {abs(one[key]):.3f} nats, the limit is {limit:.2g}: the server's results do not match the files"
        for key, limit, words in limits
        if not abs(one[key]) <= limit
    ]


def _text_faults(subject: Subject, nll: float, source: SourceFigures | None) -> list[str]:
    """Faults of a served model that does not predict text better than chance, unless its source does not either."""
    guessing = _guessing(subject)
    if nll <= KNOWS_TEXT * guessing or not math.isfinite(nll) or not knows_text(subject, source):
        return []
    return [
        f"the text costs {nll:.2f} nats a token, while guessing costs {guessing:.2f}: the weights are damaged or "
        f"untrained, or the tokenizer belongs to another model"
    ]


def knows_text(subject: Subject, source: SourceFigures | None) -> bool:
    """Whether the checkpoint must predict text: always, unless its source is known not to."""
    return source is None or source.nll <= KNOWS_TEXT * _guessing(subject)


def _guessing(subject: Subject) -> float:
    """The nats a token of a model that guesses."""
    return math.log(config_int(text_config(subject.config), "vocab_size", 2))


def too_few(ids: Sequence[int] | None, arithmetics: Sequence[Arithmetic]) -> Finding | None:
    """A finding on why there is nothing to compare. None where there is."""
    if ids is None or len(ids) < 2:
        return not_applicable("there is no reference text for this checkpoint")
    if set(arithmetics) != {"weight_only"} and len(ids) <= LEAST_TOKENS:
        return not_applicable(
            f"comparing rounded inputs requires at least {LEAST_TOKENS} tokens, the text has {len(ids) - 1}"
        )
    return None
