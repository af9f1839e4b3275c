"""How long is waited for which failure, and when no more."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from nvquant.checkpoint.hub import patience
from nvquant.checkpoint.hub.errors import network_error
from nvquant.checkpoint.hub.patience import Patience, may_pass
from nvquant.errors import InputError


class Waits(threading.Event):
    """Notes what is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return self.is_set()


class Response:
    """As much of an answer as an error carries."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.status_code, self.headers = status, headers


def refused(status: int, **headers: str) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = Response(status, {key.replace("_", "-"): value for key, value in headers.items()})  # type: ignore
    return error


def lost() -> Exception:
    return network_error()("lost")


def test_waits_double_up_to_a_minute_and_begin_anew_after_progress() -> None:
    waits = Waits()
    waiting = Patience(waits)
    for _ in range(patience.MOST_FAILURES):
        waiting.wait_after(lost(), "x")
    assert waits.seconds == [1, 2, 4, 8, 16, 32, 60, 60]
    with pytest.raises(type(lost())):
        waiting.wait_after(lost(), "x")
    waiting.progressed()
    waiting.wait_after(lost(), "x")
    assert waits.seconds[-1] == 1


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (refused(429, Retry_After="7"), 7),
        (refused(429, Retry_After="90"), 90),
        (refused(503, Retry_After="86400"), 600),
        (refused(429, RateLimit='"api";r=0;t=55'), 55),
        (refused(429, Retry_After="Fri, 27 Nov 2026 21:00:00 GMT"), 1),
        (refused(500), 1),
    ],
)
def test_the_server_may_say_how_long(error: Exception, seconds: float) -> None:
    waits = Waits()
    Patience(waits).wait_after(error, "x")
    assert waits.seconds == [seconds]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416])
def test_what_will_not_pass_is_raised_at_once(status: int) -> None:
    waits, error = Waits(), refused(status)
    assert not may_pass(error)
    with pytest.raises(HfHubHTTPError):
        Patience(waits).wait_after(error, "x")
    assert waits.seconds == []


def test_another_error_is_no_network_failure() -> None:
    with pytest.raises(ValueError, match="no"):
        Patience(Waits()).wait_after(ValueError("no"), "x")


def test_who_needs_it_no_more_does_not_wait() -> None:
    waits: Any = Waits()
    waits.set()
    with pytest.raises(InputError, match="the run has ended"):
        Patience(waits).wait_after(lost(), "x")
