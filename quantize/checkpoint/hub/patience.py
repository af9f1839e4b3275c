"""Retries after network failures: how many, and how long to wait between them."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

from ...errors import InputError
from .errors import PASSING_STATUS, network_error, status_of

logger = logging.getLogger("nvquant.checkpoint.hub")

MOST_FAILURES = 8  # in a row, without a byte between them: with the waits below some four minutes
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
LONGEST_ASKED_SECONDS = 600.0  # that a server may request
_RESETS_IN = re.compile(r"\bt=(\d+)")  # in the Hub's RateLimit header, as `"api";r=0;t=55`


class Patience:
    """Waits that double from failure to failure, or last as long as the server requests.

    Args:
        closed: an event that ends the waiting, for callers that no longer need the file.
    """

    def __init__(self, closed: threading.Event) -> None:
        self._closed, self._failures = closed, 0

    def progressed(self) -> None:
        """Note progress: the next failure counts as the first again."""
        self._failures = 0

    def wait_after(self, error: BaseException, doing: str) -> None:
        """Wait after a failure that may pass.

        Raises:
            InputError: the caller no longer needs it.
            The error itself: a retry cannot help, or there were too many failures in a row.
        """
        self._failures += 1
        if not may_pass(error) or self._failures > MOST_FAILURES:
            raise error
        asked = _retry_after(error)
        doubling = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (self._failures - 1))
        seconds = doubling if asked is None else min(LONGEST_ASKED_SECONDS, asked)
        status = status_of(error)
        reason = type(error).__name__ if status is None else f"HTTP {status}"
        logger.warning("%s: %s, retrying in %.0f s", doing, reason, seconds)
        if self._closed.wait(seconds):
            raise InputError("the run has ended.") from error


def may_pass(error: BaseException) -> bool:
    """Whether a retry may help: lost connections, timeouts, full and failing servers."""
    status = status_of(error)
    return isinstance(error, network_error()) if status is None else status in PASSING_STATUS


def _retry_after(error: Any) -> float | None:
    """Seconds that the server requested, None for none or for a date, where the doubling applies."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    value = str(response.headers.get("Retry-After") or "")
    if value.replace(".", "", 1).isdigit():
        return float(value)
    resets = _RESETS_IN.search(str(response.headers.get("RateLimit") or "")) if response.status_code == 429 else None
    return None if resets is None else float(resets[1])
