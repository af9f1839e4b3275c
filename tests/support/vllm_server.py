"""The vLLM that tests start, by nvquant's own means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nvquant.serving.server import ServeOptions, Server, serving

REPOSITORY = Path(__file__).parents[2]
PYTHON_VARIABLE = "NVQUANT_TEST_VLLM"


def vllm_python() -> Path:
    """Python of the vLLM environment; skips the calling test when there is none.

    Raises AssertionError when the variable is set but names no file: that is a mistake, not an absence.
    """
    if given := os.environ.get(PYTHON_VARIABLE):
        assert Path(given).is_file(), f"{PYTHON_VARIABLE}={given} is not a Python interpreter"
        return Path(given)
    default = REPOSITORY / ".venv-vllm" / "bin" / "python"
    if not default.is_file():
        pytest.skip(
            f"no vLLM environment: set {PYTHON_VARIABLE} to its python, or install one in .venv-vllm "
            "(integrations/vllm_cpu/README.md has the lines)"
        )
    return default


def small_options(context: int = 512) -> ServeOptions:
    """For serving a small model on a CPU."""
    return ServeOptions(vllm=str(vllm_python()), max_model_len=context, ready_seconds=240)


@contextmanager
def serve(checkpoint: Path, folder: Path) -> Iterator[Server]:
    """Serve a checkpoint; the log goes to `folder`. Errors as of nvquant's `serving`."""
    with serving(checkpoint, small_options(), folder, lambda _: None) as server:
        yield server


def kernel_of(server: Server) -> str:
    """Name of the class that multiplies NVFP4 weights, as the server logged it."""
    kernels = server.facts.kernels
    assert len(kernels) == 1, f"{server.log} names {kernels}"
    return kernels[0].name
