"""A test Hub for the tests of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory
from nvquant.checkpoint.hub import guarded
from support.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub without anything, and a client that no earlier test has guarded."""
    guarded._is_set = False  # and it stays so: the next test that needs the guard sets it
    set_client_factory(default_client_factory)
    with HubServer() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have slept between its attempts."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept
