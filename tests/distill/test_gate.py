"""The gate: a training is kept only if all kinds together gain, and no kind loses, beyond the noise."""

from __future__ import annotations

import math

import pytest
import torch
from nvquant.distill.gate import judge
from torch import Tensor

LENGTHS = [50] * 12
KINDS = ["code"] * 6 + ["prose"] * 6


def kl(seed: int = 0) -> Tensor:
    return torch.rand(600, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(code: float, prose: float, noise: float = 0.01) -> Tensor:
    shift = torch.cat([torch.full((300,), code), torch.full((300,), prose)]).double()
    own = noise * torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own -= own.view(2, 6).mean(1).repeat_interleave(6)  # the kinds' means are exactly the shifts
    return kl() + shift + own.repeat_interleave(50)


@pytest.mark.parametrize(
    ("code", "prose", "is_kept", "words"),
    [
        (-0.05, -0.04, True, "all kinds together gained, and no kind lost"),
        (-0.2, 0.05, False, "the kind prose lost"),
        (0.05, -0.2, False, "the kind code lost"),
        (-0.05, 0.001, True, "no kind lost"),  # a loss within the noise
        (-0.0001, -0.0001, False, "all kinds together gained nothing beyond the noise"),
        (0.05, 0.05, False, "the kind code lost"),
        (math.nan, math.nan, False, "no number"),
    ],
)
def test_the_gate_compares_the_same_tokens_by_kind(code: float, prose: float, is_kept: bool, words: str) -> None:
    verdict = judge(kl(), moved(code, prose), LENGTHS, KINDS)
    assert verdict.is_kept == is_kept
    assert words in verdict.reason
    assert set(verdict.heldout) == {"code", "prose"}
    assert verdict.heldout["code"].before == pytest.approx(float(kl()[:300].mean()))
    assert (verdict.total.sequences, verdict.total.tokens) == (12, 600)


def test_text_without_kinds_is_judged_as_a_whole() -> None:
    assert judge(kl(), moved(-0.05, -0.05), LENGTHS, ()).is_kept
    assert not judge(kl(), kl(), LENGTHS, ()).is_kept


def test_a_single_sequence_of_a_kind_has_no_noise_to_hide_in() -> None:
    worse = torch.cat([torch.zeros(550), torch.full((50,), 0.06)]).double()
    verdict = judge(kl(), moved(-0.05, -0.05) + worse, LENGTHS, ["code"] * 11 + ["prose"])
    assert verdict.reason.startswith("the kind prose lost")
