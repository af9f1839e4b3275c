"""Regular expressions of a recipe or a config, which anybody may have written: compiled and matched within bounds.

Python's own engine is used, since vLLM uses it. A pattern such as `(a+)+$` takes it longer than the universe is old;
the engine looks for signals while it searches, so a timer ends it.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType

from ..checkpoint.json_text import quoted
from ..errors import InputError

MOST_CHARACTERS = 20_000  # of a pattern; one that lists the layers of a large model has some hundreds
MOST_SECONDS = 5.0  # of all slow matches of a command
_SLOW_SECONDS = 1e-3
_spent = 0.0


class SlowPattern(InputError):
    """A pattern that takes too long."""


class PatternError(InputError):
    """A pattern that is no regular expression.

    Attributes:
        reason: why it is no regular expression.
    """

    def __init__(self, pattern: str, reason: str, message: str = "") -> None:
        super().__init__(
            message
            or f"pattern {quoted(pattern)} is not a regular expression ({reason}): correct it in the recipe or "
            f"the config."
        )
        self.reason = reason


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern, compiled.

    Raises:
        PatternError: it is no regular expression, or too long for one.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(pattern, f"it has {len(pattern):,} characters, {MOST_CHARACTERS:,} are the most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise PatternError(pattern, str(error)[:100] or type(error).__name__) from error


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a name from its start.

    Off the main thread no timer can be set; commands match in the main thread.

    Raises:
        PatternError: it is no regular expression.
        SlowPattern: it takes longer than any useful one.
    """
    global _spent
    expression = compiled(pattern)
    began = time.thread_time()  # a busy machine makes no pattern slow
    with _timer(max(0.05, MOST_SECONDS - _spent), pattern):
        found = expression.match(name) is not None
    seconds = time.thread_time() - began
    if seconds > _SLOW_SECONDS:
        _spent += seconds
    if _spent > MOST_SECONDS:
        _spent = 0.0
        raise _slow(pattern)
    return found


def _slow(pattern: str) -> SlowPattern:
    return SlowPattern(
        f"pattern {quoted(pattern)} takes more than {MOST_SECONDS:.0f} s to match: write it without repetitions "
        f"inside of repetitions."
    )


@contextmanager
def _timer(seconds: float, pattern: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _slow(pattern)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
