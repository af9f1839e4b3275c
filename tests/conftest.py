"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.demo.smollm2 import build_smollm2
from nvquant.errors import EnvironmentLack


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BF16 checkpoint: SmolLM2-135M-Instruct."""
    try:
        return build_smollm2(tmp_path_factory.mktemp("models") / "smollm2-135m-instruct")
    except EnvironmentLack as lack:
        pytest.skip(str(lack))
