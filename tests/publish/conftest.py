"""Checkpoints to publish, what verify found of them, and a Hub to publish them on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.hub import patience
from nvquant.checkpoint.source import open_checkpoint
from nvquant.publish.proof import prove
from support.conversions import Conversions, TinyModels
from support.hub_server import HubServer
from support.hub_uploads import User

TOKEN = "hf_thisIsTheSecretOfTheTests"


def told(_done: int, _total: int, _phase: str) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="session")
def conversions(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """Converted tiny models; shared, so only to be read."""
    return Conversions(tiny, tmp_path_factory.mktemp("conversions"))


@pytest.fixture(scope="session")
def converted(conversions: Conversions) -> Path:
    """A small checkpoint, shared: only to be read."""
    return conversions("llama", "nvfp4")


@pytest.fixture(scope="session")
def measured(converted: Path, tiny: TinyModels) -> dict[str, Any]:
    """What structure and numerics found of it."""
    return prove(converted, open_checkpoint(tiny("llama")), None, told)


@pytest.fixture(scope="session")
def proved(converted: Path) -> dict[str, Any]:
    """What structure alone found of it."""
    return prove(converted, None, None, told)


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Callable[[], Path]:
    """Gives a copy of the checkpoint that may be changed."""
    return lambda: Path(shutil.copytree(converted, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on which `me` may write with this process's token; waiting for it is short."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(patience, "MOST_FAILURES", 2)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with HubServer() as server:
        server.users[TOKEN] = User("me", orgs=("team",))
        yield server
