"""Conversions on a GPU: the same codes as on the CPU, and the same bytes wherever hidden states wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.stream.trace import Trace
from nvquant.verify.structure import verify_structure
from support.conversions import (
    TinyModels,
    calibration_of,
    contents,
    planned,
    random_samples,
    raw,
    tensors_in,
    write_ids,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NAMES = ["llama", "gemma4", "gemma4_e2b"]


def on_device(source: Path, output: Path, device: str, quantizer: str = "rtn", **options: Any) -> Path:
    plan = planned(source)
    ids = write_ids(output.with_name("ids.jsonl"), random_samples((40, 40, 7, 24)))
    chosen = ConvertOptions(output, quantizer, device=device, **options)
    convert(plan, chosen, calibration_of(source, ids))
    return output


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_block_scales_of_rtn_are_those_of_the_cpu(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    ours = tensors_in(on_device(tiny(name), tmp_path / "gpu", "cuda"))
    theirs = tensors_in(on_device(tiny(name), tmp_path / "cpu", "cpu"))
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        if key.endswith("input_global_scale"):
            torch.testing.assert_close(tensor, theirs[key], rtol=0.05, atol=0)
        else:
            assert raw(tensor) == raw(theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
def test_bytes_do_not_depend_on_where_hidden_states_wait(
    tiny: TinyModels, tmp_path: Path, name: str, quantizer: str
) -> None:
    free = on_device(tiny(name), tmp_path / "free", "cuda", quantizer)
    tight = on_device(tiny(name), tmp_path / "tight", "cuda", quantizer, memory_budget_bytes=1)
    assert contents(free) == contents(tight)
    assert verify_structure(free, tiny(name)).passed


def test_batches_of_several_sequences_and_weights_only(tiny: TinyModels, tmp_path: Path) -> None:
    first = on_device(tiny("gemma4"), tmp_path / "first", "cuda", "mse", batch_size=2)
    assert contents(first) == contents(on_device(tiny("gemma4"), tmp_path / "second", "cuda", "mse", batch_size=2))
    for device in ("cuda", "cpu"):
        convert(planned(tiny("llama"), "nvfp4-a16"), ConvertOptions(tmp_path / device, "mse", device=device), None)
    ours, theirs = tensors_in(tmp_path / "cuda"), tensors_in(tmp_path / "cpu")
    assert all(raw(ours[key]) == raw(theirs[key]) for key in theirs)


def test_a_profile_has_the_gpus_own_time(tiny: TinyModels, tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    on_device(tiny("llama"), tmp_path / "out", "cuda", trace=trace)
    trace.write(tmp_path / "profile")
    assert "GPU: time of the device" in (tmp_path / "profile" / "phases.txt").read_text()
