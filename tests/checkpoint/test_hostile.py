"""Whole folders broken in one way each: every one is refused in one sentence that names what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from nvquant.format.blocks import weight_amax
from nvquant.format.layouts import COMPRESSED_TENSORS
from nvquant.plan.plan import compute_plan
from nvquant.recipe.load import load_recipe
from support.hostile import BREAKAGES, FILE_LIES, FOLDER_LIES, UNFIT
from support.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("good") / "llama")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "llama"))


def assert_is_for_the_user(error: InputError, names: str) -> None:
    text = str(error)
    assert error.exit_code == 2
    assert names in text
    assert text.endswith(".") and "\n" not in text
    assert len(re.findall(r"[.!?](?= [A-Z]|$)", text)) == 1, text


def test_the_good_folder_is_read_without_complaint(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    plan = compute_plan(checkpoint, load_recipe("nvfp4-full"), COMPRESSED_TENSORS, "llama")
    assert len(plan.matrices) == 21
    assert all(weight_amax(checkpoint.read(matrix.tensor)) > 0 for matrix in plan.matrices.values())


@pytest.mark.parametrize("name", [*FILE_LIES, *FOLDER_LIES])
def test_a_lie_of_the_folder_is_refused_on_opening(folder: Path, name: str) -> None:
    names = BREAKAGES[name](folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert_is_for_the_user(caught.value, names)


@pytest.mark.parametrize("name", ["already_quantized", "indivisible_input_features"])
def test_what_does_not_fit_the_request_is_refused_by_the_plan(folder: Path, name: str) -> None:
    names = UNFIT[name](folder)
    with pytest.raises(InputError) as caught:
        compute_plan(open_checkpoint(folder), load_recipe("nvfp4"), COMPRESSED_TENSORS, "llama")
    assert_is_for_the_user(caught.value, names)


@pytest.mark.parametrize("name", ["nan_in_weight", "infinity_in_weight"])
def test_what_is_not_finite_is_refused_when_the_weight_is_read(folder: Path, name: str) -> None:
    names = UNFIT[name](folder)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError) as caught:
        weight_amax(checkpoint.read(names), names)
    assert_is_for_the_user(caught.value, names)


def test_every_breakage_is_tested_here() -> None:
    assert set(BREAKAGES) == {*FILE_LIES, *FOLDER_LIES, *UNFIT}
    assert len(UNFIT) == 4
