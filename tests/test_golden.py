"""Every file of a set of conversions has the bytes that it had before (tests/support/golden.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from support.conversions import TinyModels, calibration_of, planned, random_samples, write_ids
from support.golden import FILE, SET, Golden, one_thread, processor, sums_of
from support.launching import WarmRanks

RECORDED: dict[str, Any] = json.loads(FILE.read_text())
SHARED_OUT = next(golden for golden in SET if golden.model == "gemma4" and golden.recipe == "nvfp4")


def skip_elsewhere(golden: Golden) -> None:
    if golden.is_calibrated and processor() != RECORDED["processor"]:
        pytest.skip(f"the sums of calibrated conversions are those of {RECORDED['processor']}, this is {processor()}")


def test_the_file_has_the_set() -> None:
    assert set(RECORDED["sums"]) == {golden.name for golden in SET}


@pytest.mark.parametrize("golden", SET, ids=lambda golden: golden.name)
def test_a_conversion_has_the_bytes_that_it_had(tiny: TinyModels, tmp_path: Path, golden: Golden) -> None:
    skip_elsewhere(golden)
    assert sums_of(golden.make(tiny(golden.model), tmp_path / "out")) == RECORDED["sums"][golden.name]


def test_several_ranks_give_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    skip_elsewhere(SHARED_OUT)
    ids = write_ids(tmp_path / "out.jsonl", random_samples())
    job = {
        "source": tiny(SHARED_OUT.model),
        "output": tmp_path / "out",
        "ids": ids,
        "recipe": SHARED_OUT.recipe,
        "quantizer": SHARED_OUT.quantizer,
    }
    with WarmRanks(tmp_path) as launch:
        assert [rank.code for rank in launch(2, **job)] == [0, 0]
    assert sums_of(tmp_path / "out") == RECORDED["sums"][SHARED_OUT.name]


def test_a_resumed_run_gives_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    class EndedEarly(Exception):
        pass

    def end_early(now: Progress) -> None:
        if now.layers_done == 1:
            raise EndedEarly

    skip_elsewhere(SHARED_OUT)
    source, output = tiny(SHARED_OUT.model), tmp_path / "out"
    calibration = calibration_of(source, write_ids(tmp_path / "out.jsonl", random_samples()))
    plan = planned(source, SHARED_OUT.recipe, SHARED_OUT.layout)
    with one_thread():
        with pytest.raises(EndedEarly):
            convert(plan, ConvertOptions(output, SHARED_OUT.quantizer, progress=end_early), calibration)
        assert convert(plan, ConvertOptions(output, SHARED_OUT.quantizer), calibration).layers_resumed
    assert sums_of(output) == RECORDED["sums"][SHARED_OUT.name]
