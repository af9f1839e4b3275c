"""A quantized source is refused, and so is a stale claim of quantization over plain weights, with another way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.headers import Header, TensorInfo
from nvquant.checkpoint.source import SINGLE_NAME, Checkpoint
from nvquant.errors import InputError
from nvquant.plan.quantized_source import as_computed
from nvquant.weights.claims import METHODS

Shapes = dict[str, tuple[str, tuple[int, ...]]]
MATRIX: Shapes = {"model.norm.weight": ("F32", (64,)), "model.layers.0.mlp.up_proj.weight": ("BF16", (64, 64))}


def checkpoint(folder: Path, shapes: Shapes, config: dict[str, Any]) -> Checkpoint:
    """One that exists by its header only: (dtype, shape) by name."""
    tensors = {name: TensorInfo(name, dtype, shape, 0, 0) for name, (dtype, shape) in shapes.items()}
    header = Header(folder / SINGLE_NAME, tensors, {}, 1000, 1000)
    return Checkpoint(folder, config, {SINGLE_NAME: header}, dict.fromkeys(tensors, SINGLE_NAME))


def refused(source: Checkpoint) -> str:
    with pytest.raises(InputError) as caught:
        as_computed(source, "model")
    return str(caught.value)


CLAIMS = [
    ({"quantization_config": {"quant_method": "fp8"}}, None, "quantization_config of config.json", "fp8"),
    ({"quantization_config": {}}, None, "quantization_config of config.json", "an unknown method"),
    ({"quantization_config": "fp8"}, None, "quantization_config of config.json", "an unknown method"),
    ({"compression_config": {"quant_method": "x"}}, None, "compression_config of config.json", "x"),
    ({"quantization": {"bits": 4}}, None, "quantization of config.json", "MLX"),
    (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        None,
        "text_config.quantization_config of config.json",
        "fp8",
    ),
    ({}, "hf_quant_config.json", "hf_quant_config.json", "modelopt"),
    ({}, "quantize_config.json", "quantize_config.json", "gptq"),
    ({}, "quant_config.json", "quant_config.json", "awq"),
]


@pytest.mark.parametrize(("config", "file", "where", "method"), CLAIMS)
def test_a_claim_of_quantization_is_true_or_stale(
    config: dict[str, Any], file: str | None, where: str, method: str, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / file).write_text("{}")
    quantized = {"model.layers.0.mlp.up_proj.qweight": ("I32", (8, 64))}
    unknown = "" if method in METHODS else ", which nvquant does not decode"
    assert refused(checkpoint(tmp_path, MATRIX | quantized, config)) == (
        f"model is quantized already ({where} names {method}{unknown}): convert from the original BF16 model."
    )
    key, _, of = where.partition(" of ")
    assert refused(checkpoint(tmp_path, MATRIX, config)) == (
        f"model: {where} names {method}, but no tensor is quantized, and the matrices are BF16: remove "
        f"{f'{key} from {of}' if of else where} if these are the model's original weights."
    )


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"text_config": {"quantization_config": None}}])
def test_null_is_no_quantization(config: dict[str, Any], tmp_path: Path) -> None:
    as_computed(checkpoint(tmp_path, MATRIX, config), "model")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "says"),
    [
        ("mlp.up_proj.weight.absmax", "F32", (8,), "is a tensor of bitsandbytes"),
        ("mlp.up_proj.qweight", "I32", (8, 64), "is a tensor of GPTQ or AWQ"),
        ("mlp.up_proj.weight_packed", "U8", (64, 32), "is a tensor of compressed-tensors"),
        ("mlp.up_proj.weight_scale_inv", "F32", (1, 1), "is a tensor of FP8 with block scales"),
        ("mlp.experts.down_proj_blocks", "U8", (4, 64, 4, 16), "is a tensor of MXFP4"),
        ("mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", (8,), "is a tensor of bitsandbytes"),
        ("mlp.gate_proj.weight", "F8_E4M3", (64, 64), "is stored as F8_E4M3"),
        ("mlp.gate_proj.weight", "U8", (2048, 1), "is stored as U8"),
        ("mlp.gate_proj.weight", "U32", (64, 8), "is stored as U32"),
    ],
)
def test_tensors_alone_prove_quantization(
    name: str, dtype: str, shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    assert refused(checkpoint(tmp_path, MATRIX | {f"model.layers.0.{name}": (dtype, shape)}, {})) == (
        f"model is quantized already (model.layers.0.{name} {says}): convert from the original BF16 model."
    )
