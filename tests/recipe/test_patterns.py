"""Patterns of strangers are matched as Python's own engine does, and end."""

from __future__ import annotations

import re
import signal
import time

import pytest
from nvquant.recipe import patterns
from nvquant.recipe.patterns import PatternError, SlowPattern, compiled, matches
from nvquant.recipe.vllm_rules import compressed_tensors_verdict

NAME = "model.layers.0.self_attn.q_proj"
ENDLESS = [r"(([a-z_]+)+[.0-9]*)+!", r"((.*)*)*!"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_spent", 0.0)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_without_end_is_ended(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(SlowPattern, match="takes more than 0 s to match: write it without repetitions"):
        matches(pattern, NAME * 2)
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_many_slow_matches_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.5)
    with pytest.raises(SlowPattern, match="to match"):
        for _ in range(1_000):
            matches(r"(a+)+$", "a" * 20 + "b")


@pytest.mark.parametrize(
    "pattern", ["(", "(a|" * 300, "(?P<x>.)(?P=y)", ".{4294967296}", "(" * 5000 + ")" * 5000, "." * 70_000, "\\"]
)
def test_what_is_no_pattern_is_refused_in_words(pattern: str) -> None:
    with pytest.raises(PatternError, match="is not a regular expression") as caught:
        compiled(pattern)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_patterns_match_from_the_start_as_pythons_own() -> None:
    for pattern in (r".*\.layers\.\d+\.mlp\.", r"model\.layers\.0\.", "layers", "(?i)MODEL.*", r".*{e}", "[[:x]"):
        assert matches(pattern, NAME) == (re.match(pattern, NAME) is not None)


def test_a_config_with_a_broken_pattern_is_refused_by_the_pattern() -> None:
    config = {"ignore": ["re:("], "config_groups": {"a": {"targets": ["Linear"]}}}
    with pytest.raises(PatternError, match=r"pattern '\(' is not a regular expression"):
        compressed_tensors_verdict(NAME, config)
