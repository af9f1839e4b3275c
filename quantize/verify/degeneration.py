"""Detection of generated text that degenerated: loops, and characters that no text has.

Real text and healthy models stay within the limits (docs/serving.md, "Degeneration", has the counts). Greedy output is
no evidence, because small healthy models loop without sampling. Answers are therefore sampled.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MOST_PERIOD = 64
LEAST_TURNS = 3
# Of 9,638 windows of 256 tokens of real text (prose, code, tables, chats in many languages) one has more; of 72
# answers sampled from a healthy model of 135M parameters likewise one.
MOST_LOOPED = 0.5
MOST_RUN = 64  # tokens; the longest in that text has 50
MOST_BROKEN_CHARACTERS = 1  # none in that text, none in those answers
LEAST_TOKENS = 32  # in fewer nothing can be judged


def fault_of(text: str, ids: Sequence[int]) -> str | None:
    """Describe why an answer is not text. Returns None for an answer that may be text.

    Args:
        text: the answer.
        ids: its tokens, or nothing from a server that does not return them.
    """
    broken = broken_characters(text)
    if broken > MOST_BROKEN_CHARACTERS:
        return f"{broken} characters that no text has (replacement or control characters)"
    if len(ids) < LEAST_TOKENS:
        return None
    looped, period = longest_loop(ids)
    if period == 1 and looped > MOST_RUN:
        return f"one token {looped} times in a row"
    if looped > MOST_LOOPED * len(ids):
        return f"a loop: {looped} of {len(ids)} tokens repeat the {period} before them"
    return None


def longest_loop(ids: Sequence[int]) -> tuple[int, int]:
    """Find the longest stretch of tokens that repeats its first tokens at least three times.

    Returns:
        (length of the stretch, length of its period), or (0, 0).
    """
    best = (0, 0)
    for period in range(1, min(MOST_PERIOD, len(ids) // LEAST_TURNS) + 1):
        equal = 0
        for at in range(period, len(ids)):
            equal = equal + 1 if ids[at] == ids[at - period] else 0
            if equal >= (LEAST_TURNS - 1) * period and equal + period > best[0]:
                best = (equal + period, period)
    return best


def broken_characters(text: str) -> int:
    """Count the characters that stand for broken bytes, control something, or have no meaning.

    Replacement characters at either end do not count: the limit may have cut a character in two.
    """
    return sum(_is_broken(character) for character in text.strip("\ufffd"))


def _is_broken(character: str) -> bool:
    if character == "\ufffd":
        return True
    return unicodedata.category(character) in ("Cc", "Co", "Cn", "Cs") and character not in "\n\t\r\f"
