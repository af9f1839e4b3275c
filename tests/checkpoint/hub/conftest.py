"""A Hub with one model of two shards, which this process takes for the usual one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_models import hub_for_this_process
from support.hub_server import HubServer
from support.tiny_models import tiny_llama
from support.tiny_tokenizer import write_tiny_tokenizer

NAME = "Org/Tiny-Llama"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 30 MB in two shards, only to be read."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_layers": 4}
    model = tiny_llama(tmp_path_factory.mktemp("hub") / "model", **sizes)
    write_tiny_tokenizer(model, "smollm2")
    return model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> Iterator[HubServer]:
    """The Hub, with the model under NAME and the tag v1."""
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as server:
        server.add("model", NAME, folder, tags=("v1",))
        yield server
