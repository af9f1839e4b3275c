"""The command line, and tiny models and token ids to call it on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from support.commands import Command, run_command
from support.conversions import random_samples, write_ids


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of six sequences, of 7 to 40 tokens."""
    return write_ids(tmp_path_factory.mktemp("ids") / "ids.jsonl", random_samples())


@pytest.fixture
def nvquant(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line."""
    return partial(run_command, capfd)
