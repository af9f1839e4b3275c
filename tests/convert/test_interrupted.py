"""Runs that end before they are done: by an exception, by a damaged weight, by being killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nvquant.convert.output import RUN_NAME, partial_folder
from nvquant.convert.pipeline import ConvertOptions, convert
from nvquant.errors import CheckFailed, NonFiniteError
from support import hostile
from support.conversions import (
    MODELOPT,
    TinyModels,
    calibration_of,
    contents,
    converted,
    planned,
    random_samples,
    write_ids,
)
from support.tiny_models import tiny_llama


class Stop(Exception):
    pass


def stop_after(layers: int) -> Any:
    def progress(done: int, total: int, phase: str) -> None:
        if done == layers:
            raise Stop

    return progress


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_an_exception_leaves_nothing_behind(tiny: TinyModels, tmp_path: Path, layers: int) -> None:
    calibration = calibration_of(tiny("llama"), write_ids(tmp_path / "ids.jsonl", random_samples()))
    with pytest.raises(Stop):
        convert(
            planned(tiny("llama")), ConvertOptions(tmp_path / "out", "rtn", progress=stop_after(layers)), calibration
        )
    assert [path.name for path in tmp_path.iterdir()] == ["ids.jsonl"]


def test_an_exception_leaves_an_earlier_output_as_it_was(tiny: TinyModels, tmp_path: Path) -> None:
    output = converted(tiny("llama"), tmp_path / "out", "nvfp4-a16")
    before = contents(output)
    with pytest.raises(Stop):
        convert(planned(tiny("llama"), "nvfp4-a16"), ConvertOptions(output, "mse", progress=stop_after(2)), None)
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("breakage", [hostile.nan_in_weight, hostile.infinity_in_weight])
@pytest.mark.parametrize("recipe", ["nvfp4-a16", "nvfp4-full"])
def test_a_weight_that_is_not_finite_ends_the_run_with_its_name(
    tmp_path: Path, recipe: str, breakage: hostile.Breakage
) -> None:
    source = tiny_llama(tmp_path / "source")
    name = breakage(source)
    with pytest.raises((NonFiniteError, CheckFailed)) as caught:
        converted(source, tmp_path / "out", recipe)
    assert name.removesuffix(".weight") in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from nvquant.convert.pipeline import ConvertOptions, convert
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.checkpoint.source import open_checkpoint
from nvquant.recipe.load import load_recipe

def progress(done, total, phase):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

source, output = map(Path, sys.argv[1:])
plan = compute_plan(open_checkpoint(source), load_recipe("nvfp4-a16"), LAYOUTS["modelopt"], "model")
convert(plan, ConvertOptions(output, "rtn", progress=progress), None)
"""


def test_a_killed_run_leaves_no_output_and_the_next_one_starts_over(tiny: TinyModels, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny("llama"), output], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert (partial / RUN_NAME).exists()
    assert (partial / "model-00001-of-00004.safetensors").exists()
    assert not (partial / "model-00003-of-00004.safetensors").exists()
    (partial / "model-00001-of-00004.safetensors").write_text("left by the killed run")
    converted(tiny("llama"), output, "nvfp4-a16", MODELOPT)
    assert not partial.exists()
    again = converted(tiny("llama"), tmp_path / "again", "nvfp4-a16", MODELOPT)
    assert contents(again) == contents(output)
