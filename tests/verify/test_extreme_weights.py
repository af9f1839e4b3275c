"""Very small and very large weights: verify passes the checkpoints that convert writes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.relayout import relayout
from nvquant.format.blocks import dequantize_blocks
from nvquant.format.layouts import LAYOUTS
from nvquant.verify.structure import verify_structure
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, edit_tensors, tensors_in
from torch import Tensor

DOWN, GATE = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"
LAYOUT_PAIRS = [(COMPRESSED_TENSORS, MODELOPT), (MODELOPT, COMPRESSED_TENSORS)]


def scaled(tiny: TinyModels, folder: Path, factor: float, *modules: str) -> Path:
    """A tiny model with some matrices multiplied; else down_proj and, for its input, gate_proj."""

    def edit(name: str, tensor: Tensor) -> Tensor:
        return tensor.double() * factor if name.removesuffix(".weight") in (modules or (DOWN, GATE)) else tensor

    return edit_tensors(Path(shutil.copytree(tiny("llama"), folder)), edit)


def faults(folder: Path, source: Path) -> list[str]:
    return [check.detail for check in verify_structure(folder, source).checks if not check.passed]


@pytest.mark.parametrize(("layout", "other"), LAYOUT_PAIRS)
@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
@pytest.mark.parametrize("factor", [1e-7, 1e-16, 1e-30, 1e5, 1e12])
def test_small_and_large_weights_convert_verify_and_change_layout(
    tiny: TinyModels, tmp_path: Path, factor: float, quantizer: str, layout: str, other: str
) -> None:
    source = scaled(tiny, tmp_path / "source", factor)
    output = converted(source, tmp_path / "out", "nvfp4", layout, quantizer)
    assert faults(output, source) == []
    relayout(open_checkpoint(output), LAYOUTS[other], tmp_path / "other")
    assert faults(tmp_path / "other", source) == []


@pytest.mark.parametrize("factor", [1e-7, 1e-30])
def test_small_weights_of_another_tool_pass_too(tiny: TinyModels, tmp_path: Path, factor: float) -> None:
    source = scaled(tiny, tmp_path / "source", factor, DOWN)
    output = converted(source, tmp_path / "out", "nvfp4")
    (output / "nvquant_manifest.json").unlink()
    assert faults(output, source) == []


@pytest.mark.parametrize("factor", [1e-7, 1e-30, 1e12])
def test_what_is_stored_is_as_near_as_for_ordinary_weights(tiny: TinyModels, tmp_path: Path, factor: float) -> None:
    source = scaled(tiny, tmp_path / "source", factor)
    weight = tensors_in(source)[f"{DOWN}.weight"].double()
    stored = tensors_in(converted(source, tmp_path / "out", "nvfp4-a16"))
    parts = (stored[f"{DOWN}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
    decoded = dequantize_blocks(*parts).double()
    assert float((decoded - weight).norm() / weight.norm()) < 0.12


def test_a_large_amax_that_the_manifest_does_not_record_is_a_scale_the_wrong_way_round(
    tiny: TinyModels, tmp_path: Path
) -> None:
    source = scaled(tiny, tmp_path / "source", 1e5)
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    manifest = json.loads((output / "nvquant_manifest.json").read_text())
    for layer in manifest["layers"]:
        for group in layer["groups"].values():
            group["weight_amax"] = 1.0
    (output / "nvquant_manifest.json").write_text(json.dumps(manifest))
    assert any("stands for an amax of" in fault for fault in faults(output, source))


def test_the_bound_is_where_the_format_ends() -> None:
    from nvquant.format.scales import global_scale
    from nvquant.verify.scales import SMALLEST_AMAX

    assert float(global_scale(torch.tensor(SMALLEST_AMAX * 1.0001))) > 3e38
    assert float(global_scale(torch.tensor(SMALLEST_AMAX * 0.9999))) == 1.0
