"""Tiny models that the tests of this stage share, and a real one converted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.conversions import converted
from support.shared import made_once
from verify.numerics.measuring import Measured, held_out, measured


@pytest.fixture(scope="session")
def smollm2_full(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with every linear layer in W4A4, its inputs calibrated on another text than it is measured on."""
    samples = held_out(smollm2, 4, 256, seed=7)
    return made_once(
        tmp_path_factory, "smollm2-for-numbers", lambda folder: converted(smollm2, folder, samples=samples)
    )


@pytest.fixture(scope="session")
def smollm2_measured(smollm2: Path, smollm2_full: Path) -> Measured:
    """What was measured of it when nothing is wrong."""
    return measured(smollm2_full, smollm2, held_out(smollm2, 6, 128))
