"""The command line called in this process, as the console script calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nvquant.cli.main import main
from support.conversions import TinyModels, random_samples, write_ids


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A tiny model's folder by its name; shared, so only to be read."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of six sequences, of 7 to 40 tokens."""
    return write_ids(tmp_path_factory.mktemp("ids") / "ids.jsonl", random_samples())


@pytest.fixture
def nvquant(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; everything that reaches the process's streams is seen, from libraries too."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        stdout, stderr = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, stdout, stderr)

    return run
