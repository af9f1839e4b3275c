"""A test Hub for the tests of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub without anything."""
    with HubServer() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have slept between its attempts."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
