"""Fixtures that several rooms share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from nvquant.demo.smollm2 import build_smollm2
from nvquant.errors import EnvironmentLack
from support.collecting import IMPORTED, SLOW_TO_IMPORT
from support.conversions import TinyModels
from support.converting import run_convert
from support.shared import made_once

# A shell without job control lets what it starts in the background ignore Ctrl-C, and what that starts; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest rewrites the assertions of every module and keeps the result as bytecode. Where the environment forbids it, as
# many container images do, each run and each of its processes would rewrite them all again.
sys.dont_write_bytecode = False


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep which modules the collection imported, for test_collection.py."""
    session.config.stash[IMPORTED] = SLOW_TO_IMPORT & set(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _models() -> None:
    """transformers' model classes, imported before a test injects faults or counts. Collecting is quicker without."""
    assert transformers.PreTrainedModel  # the attribute imports them


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A tiny model's folder by its name; shared, so only to be read."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BF16 checkpoint: SmolLM2-135M-Instruct."""
    try:
        return made_once(tmp_path_factory, "smollm2-135m-instruct", build_smollm2)
    except EnvironmentLack as lack:
        pytest.skip(str(lack))


@pytest.fixture(scope="session")
def converted_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives SmolLM2 converted by a recipe into a layout, by the command line; only to be read."""

    def convert(recipe: str, layout: str, quantizer: str = "rtn") -> Path:
        return made_once(
            tmp_path_factory,
            f"smollm2-{recipe}-{layout}-{quantizer}",
            lambda folder: run_convert(smollm2, recipe, layout, folder, quantizer),
        )

    return convert
