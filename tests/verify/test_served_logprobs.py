"""How closely a server's likelihoods are held, by arithmetic and by the model's own noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.serving.kernels import Arithmetic
from nvquant.verify.report import Finding
from nvquant.verify.served_logprobs import SourceFigures, compare_logprobs
from nvquant.verify.subject import Subject, open_subject

TOKENS = 400
ILLITERATE = 20.0  # nats a token: no text is asked for


@pytest.fixture
def subject(good: Callable[[str], Path]) -> Subject:
    return open_subject(good("llama-ct"))


def judged(subject: Subject, arithmetic: Arithmetic, shift: float, spread: float, noise: float) -> Finding:
    """A server whose tokens cost `shift` more than the files say, and differ by `spread` either way."""
    signs = [1, -1] * (TOKENS // 2)
    random.Random(0).shuffle(signs)
    served = [-3 - shift + spread * sign for sign in signs]
    emulated: dict[Arithmetic, list[float]] = {arithmetic: [-3.0] * TOKENS}
    finding, document = compare_logprobs(subject, served, emulated, SourceFigures(ILLITERATE, noise))
    assert document["mean_difference"] == pytest.approx(shift)
    return finding


@pytest.mark.parametrize(
    ("arithmetic", "shift", "spread", "noise", "passes"),
    [
        ("weight_only", 0.0, 0.09, 0.0, True),
        ("weight_only", 0.0, 0.11, 0.0, False),
        ("weight_only", 0.0, 0.11, 0.049, False),
        ("weight_only", 0.0, 1.4, 1.0, True),  # random weights: the source itself moves by as much
        ("weight_only", 0.3, 1.4, 1.0, False),  # five standard errors of 1 nat over 400 tokens are 0.25
        ("w4a4", 0.14, 0.6, 0.0, True),
        ("w4a4", 0.16, 0.0, 0.0, False),
        ("w4a4", 0.16, 0.0, 1.0, True),
    ],
)
def test_tokens_are_held_one_by_one_unless_the_model_is_noise(
    subject: Subject, arithmetic: Arithmetic, shift: float, spread: float, noise: float, passes: bool
) -> None:
    finding = judged(subject, arithmetic, shift, spread, noise)
    assert not finding.faults == passes, finding.faults
    assert ("only the mean is checked" in finding.looked_at) == (noise > 0.05)
