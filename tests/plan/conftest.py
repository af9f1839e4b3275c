"""Tiny checkpoints, written once for all tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from support.tiny_models import WRITERS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The tiny checkpoint of a name of `WRITERS`; `gemma4_e2b_unused_kv` has K and V in every layer, as Google's."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def opened(name: str) -> Checkpoint:
        if name == "gemma4_e2b_unused_kv":
            return open_checkpoint(WRITERS["gemma4_e2b"](root / name, unused_kv=True))
        return open_checkpoint(WRITERS[name](root / name))

    return opened
