"""Runs that end before they are done: by an exception, by a damaged weight, by being killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.options import ConvertOptions, ConvertResult
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress, ProgressSink
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


def stop_after(layers: int) -> ProgressSink:
    def progress(now: Progress) -> None:
        if now.layers_done == layers:
            raise Stop

    return progress


def stopped(tiny: TinyModels, output: Path, layers: int) -> ConvertResult:
    """Convert until so many layers are whole, then raise; once more, to the end."""
    ids = write_ids(output.with_name("out.jsonl"), random_samples())
    calibration = calibration_of(tiny("llama"), ids)
    ids.unlink()
    plan, options = planned(tiny("llama")), ConvertOptions(output, "rtn")
    with pytest.raises(Stop):
        convert(plan, replace(options, progress=stop_after(layers)), calibration)
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == (["out.partial"] if layers else [])
    return convert(plan, options, calibration)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_an_exception_leaves_the_whole_layers_and_the_next_run_goes_on_from_there(
    tiny: TinyModels, tmp_path: Path, layers: int
) -> None:
    result = stopped(tiny, tmp_path / "out", layers)
    assert layers <= result.layers_resumed <= min(3, layers + 2)  # two more may be on their way when one is whole
    assert (result.layers_resumed > 0) == (layers > 0)
    assert not result.was_finished
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "undisturbed").mkdir()
    assert contents(tmp_path / "out") == contents(converted(tiny("llama"), tmp_path / "undisturbed" / "out"))


def test_an_exception_leaves_an_earlier_output_as_it_was(tiny: TinyModels, tmp_path: Path) -> None:
    output = converted(tiny("llama"), tmp_path / "out", "nvfp4-a16")
    before = contents(output)
    options = ConvertOptions(output, "mse", restart=True)
    with pytest.raises(Stop):
        convert(planned(tiny("llama"), "nvfp4-a16"), replace(options, progress=stop_after(2)), None)
    assert contents(output) == before
    assert (tmp_path / "out.partial").exists()
    convert(planned(tiny("llama"), "nvfp4-a16"), options, None)
    assert contents(output) != before
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
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.checkpoint.source import open_checkpoint
from nvquant.recipe.load import load_recipe

def progress(now):
    if now.layers_done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

source, output = map(Path, sys.argv[1:])
plan = compute_plan(open_checkpoint(source), load_recipe("nvfp4-a16"), LAYOUTS["modelopt"], "model")
convert(plan, ConvertOptions(output, "rtn", progress=progress), None)
"""


def test_a_killed_run_leaves_no_output_and_damage_to_what_it_left_is_named(tiny: TinyModels, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny("llama"), output], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    # Two shards are written at a time, so it is not always the first layers that are whole first.
    whole = [partial / record.stem for record in (partial / STATE_FOLDER).glob("model-*.safetensors.json")]
    assert len(whole) >= 2
    whole[0].write_text("left by the killed run")
    with pytest.raises(CheckFailed, match=rf"{whole[0]} is damaged .*remove this file"):
        converted(tiny("llama"), output, "nvfp4-a16", MODELOPT)
    whole[0].unlink()
    converted(tiny("llama"), output, "nvfp4-a16", MODELOPT)
    assert not partial.exists()
    again = converted(tiny("llama"), tmp_path / "again", "nvfp4-a16", MODELOPT)
    assert contents(again) == contents(output)
