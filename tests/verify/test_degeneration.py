"""Loops, single tokens and broken characters are told from text; text is not taken for them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import nvquant
import pytest
from nvquant.verify.degeneration import LEAST_TOKENS, MOST_RUN, broken_characters, fault_of, longest_loop

SHIPPED = Path(nvquant.__file__).parent.parent / "calibration"
PHRASE = [5, 9, 2, 7, 7, 1]


def as_ids(text: str) -> list[int]:
    """Words as tokens, in which text repeats itself more often than in a model's own."""
    words = text.split()
    numbers = {word: at for at, word in enumerate(dict.fromkeys(words))}
    return [numbers[word] for word in words]


def test_a_phrase_over_and_over_is_a_loop() -> None:
    ids = list(range(100, 200)) + PHRASE * 26
    assert longest_loop(ids) == (len(PHRASE) * 26, len(PHRASE))
    assert fault_of("x", ids) == "a loop: 156 of 256 tokens repeat the 6 before them"


def test_a_phrase_that_returns_now_and_then_is_none() -> None:
    ids = [token for at in range(30) for token in (*PHRASE, 1000 + at, 2000 + at)]
    assert longest_loop(ids)[0] < len(PHRASE)
    assert fault_of("x", ids) is None


def test_a_loop_in_less_than_half_of_an_answer_is_allowed() -> None:
    assert fault_of("x", list(range(100, 240)) + PHRASE * 19) is None


def test_one_token_in_a_row() -> None:
    start = list(range(100, 400))
    assert fault_of("x", start + [8] * (MOST_RUN + 1)) == f"one token {MOST_RUN + 1} times in a row"
    assert fault_of("x", start + [8] * MOST_RUN) is None


def test_too_short_an_answer_is_not_judged() -> None:
    assert fault_of("x", [1] * (LEAST_TOKENS - 1)) is None
    assert fault_of("x", [1] * LEAST_TOKENS) is not None


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("Grüße, 世界! 👍🏽\n\tЖди.\r\n", 0),
        ("cut in two \ufffd", 0),
        ("\ufffd cut in two", 0),
        ("a\ufffdb\ufffdc", 2),
        ("bell\x07 and null\x00", 2),
        ("private \ue000 use", 1),
    ],
)
def test_characters_that_no_text_has(text: str, broken: int) -> None:
    assert broken_characters(text) == broken


def test_broken_characters_make_an_answer_no_text() -> None:
    assert fault_of("a\ufffdb\ufffdc", []) == "2 characters that no text has (replacement or control characters)"
    assert fault_of("a\ufffdb", []) is None


def test_the_shipped_held_out_text_is_text() -> None:
    judged = 0
    for line in lzma.open(SHIPPED / "heldout.jsonl.xz", "rt", encoding="utf-8"):
        row = json.loads(line)
        text = row.get("text") or "\n".join(turn["content"] for turn in row.get("messages", []))
        words = text.split()
        for at in range(0, len(words) - 200, 200):
            piece = " ".join(words[at : at + 200])
            assert fault_of(piece, as_ids(piece)) is None, piece
            judged += 1
    assert judged > 200
