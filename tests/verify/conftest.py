"""Good checkpoints, made once, and copies of them to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from verify.checkpoints import GOOD, WRITERS, Copy, convert_good


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The BF16 sources by name."""
    return {name: write(tmp_path_factory.mktemp("models") / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="session")
def good(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the good checkpoint of a name in `GOOD`, converted when first asked for."""
    folder = tmp_path_factory.mktemp("good")

    def make(name: str) -> Path:
        output = folder / name
        return output if output.exists() else convert_good(name, models, output)

    return make


@pytest.fixture
def copy(good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path) -> Callable[[str], Copy]:
    """Gives a fresh copy of a good checkpoint, with its source beside it."""

    def make(name: str) -> Copy:
        shutil.copytree(good(name), tmp_path / "checkpoint")
        (tmp_path / "source").symlink_to(models[GOOD[name][0]])
        return Copy(tmp_path / "checkpoint", tmp_path / "source")

    return make
