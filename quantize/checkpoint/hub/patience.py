"""How often and how long to wait for a network that fails, before giving up."""

from __future__ import annotations

import logging
import threading
from typing import Any

from ...errors import InputError
from .errors import PASSING_STATUS, network_error, status_of

logger = logging.getLogger("nvquant.checkpoint.hub")

MOST_FAILURES = 8  # in a row, without a byte between them: with the waits below some four minutes
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0


class Patience:
    """Waits that double from failure to failure, or as long as the server asks for.

    Args:
        closed: set by whoever no longer needs what is waited for.
    """

    def __init__(self, closed: threading.Event) -> None:
        self._closed, self._failures = closed, 0

    def progressed(self) -> None:
        """Something came: the next failure is the first again."""
        self._failures = 0

    def wait_after(self, error: BaseException, doing: str) -> None:
        """Wait after a failure that may pass.

        Raises:
            InputError: nobody needs it any more.
            The error itself: it does not pass, or there were too many in a row.
        """
        self._failures += 1
        if not may_pass(error) or self._failures > MOST_FAILURES:
            raise error
        asked = _retry_after(error)
        doubling = FIRST_WAIT_SECONDS * 2 ** (self._failures - 1)
        seconds = min(LONGEST_WAIT_SECONDS, doubling if asked is None else max(asked, 0.0))
        status = status_of(error)
        reason = type(error).__name__ if status is None else f"HTTP {status}"
        logger.warning("%s: %s; trying again in %.0f s", doing, reason, seconds)
        if self._closed.wait(seconds):
            raise InputError("the run has ended.") from error


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help: lost connections, timeouts, full and failing servers."""
    status = status_of(error)
    return isinstance(error, network_error()) if status is None else status in PASSING_STATUS


def _retry_after(error: Any) -> float | None:
    """Seconds that the server asked for; it may give a date in their place, which the doubling stands for."""
    response = getattr(error, "response", None)
    value = "" if response is None else str(response.headers.get("Retry-After") or "")
    return float(value) if value.replace(".", "", 1).isdigit() else None
