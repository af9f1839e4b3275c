"""Regular expressions of a recipe or a config of unknown origin, compiled and matched within limits.

nvquant uses Python's own engine, because vLLM does. A pattern such as `(a+)+$` takes that engine longer than the age of
the universe. The engine handles signals while it searches, so a timer ends it.
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
    """A pattern that is not a regular expression.

    Attributes:
        reason: the engine's reason.
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
        PatternError: it is not a regular expression, or it is too long.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(pattern, f"it has {len(pattern):,} characters, and the limit is {MOST_CHARACTERS:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise PatternError(pattern, str(error)[:100] or type(error).__name__) from error


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a name from its start.

    Commands match in the main thread, because no other thread can set a timer.

    Raises:
        PatternError: it is not a regular expression.
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
        f"pattern {quoted(pattern)} takes more than {MOST_SECONDS:.0f} s to match",
        hint="write it without repetitions within repetitions",
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
