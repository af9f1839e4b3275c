"""The test Hub as the usual one of this process, with a cache of its own and the shortest of waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from nvquant.checkpoint.hub import guarded, patience
from support.hub_server import HubServer


@contextmanager
def hub_for_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A Hub that huggingface_hub takes for the usual one, in this process."""
    with HubServer() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # as made from HF_ENDPOINT at import
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.01)
        # The Hubs of earlier tests had ports that another server may have now.
        monkeypatch.setattr(guarded, "_trusted", set())
        yield hub
