"""Tiny models and their conversions that the tests of this room share."""

from __future__ import annotations

import pytest
from support.conversions import Conversions, TinyModels


@pytest.fixture(scope="session")
def done(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """A conversion's folder by model, recipe, layout and quantizer; shared, so only to be read."""
    return Conversions(tiny, tmp_path_factory.mktemp("converted"))
