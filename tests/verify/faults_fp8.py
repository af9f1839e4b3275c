"""Faults of checkpoints with attention in FP8 beside MLPs in NVFP4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nvquant.format.fp8 import fp8_scale, quantize_rows
from torch import Tensor
from verify.breaking import (
    FULL_LAYER,
    LAYER,
    Fault,
    Stored,
    bytes_of,
    change_scalar,
    edit_json,
    edit_tensors,
    listing,
    recorded_group,
    source_bytes,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)
Q, K, V, O_ = (f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkvo")
CT, MO, FOREIGN = "llama-fp8-ct", "llama-fp8-mo", "llama-fp8-foreign"


# codes


def _set_code(folder: Path, name: str, change: Callable[[int], int]) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{name}.weight"]
        at = next(i for i, byte in enumerate(stored.data) if i > 100 and 0x20 < byte & 0x7F < 0x70)
        stored.data[at] = change(stored.data[at])
        row, column = divmod(at, stored.shape[1])
        return f"at row {row}, column {column}"


@fault("weights", on=CT)
def fp8_code_off_by_one(folder: Path) -> str:
    return f"1 of 4,096 elements are not the nearest under their stored scale (first {_set_code(folder, O_, _next)}"


@fault("weights", on=MO)
def fp8_code_off_by_one_in_modelopt(folder: Path) -> str:
    return f"1 of 4,096 elements are not the nearest under their stored scale (first {_set_code(folder, O_, _next)}"


def _next(byte: int) -> int:
    return byte + 1


@fault("weights", on=CT)
def fp8_code_with_another_sign(folder: Path) -> str:
    return _set_code(folder, O_, lambda byte: byte ^ 0x80)


@fault("fp8", "weights", on=CT)  # the source has a number there
def fp8_code_that_is_nan(folder: Path) -> str:
    at = _set_code(folder, O_, lambda _: 0x7F)
    return f"{O_}.weight: 1 NaN code (first {at}: byte 0x7F)"


@fault("fp8", "weights", on="gemma4-fp8-mo")
def fp8_code_that_is_negative_nan(folder: Path) -> str:
    at = _set_code(folder, f"{FULL_LAYER}.self_attn.o_proj", lambda _: 0xFF)
    return f"{FULL_LAYER}.self_attn.o_proj.weight: 1 NaN code (first {at}: byte 0xFF)"


@fault("fp8", "weights", on=FOREIGN)
def fp8_row_never_written_by_another_tool(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{O_}.weight"].data[64:128] = b"\xff" * 64
    return f"{O_}.weight: 64 NaN codes (first at row 1, column 0: byte 0xFF)"


@fault("weights", on=FOREIGN)
def fp8_codes_in_e5m2_under_the_name_of_e4m3(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{O_}.weight"]
        values = torch.frombuffer(stored.data, dtype=torch.float8_e4m3fn).float()
        stored.data = bytes_of(values.to(torch.float8_e5m2))
    return f"{O_}: relative RMSE"


def _swap_codes(folder: Path, one: str, other: str) -> None:
    with edit_tensors(folder) as tensors:
        first, second = tensors[f"{one}.weight"], tensors[f"{other}.weight"]
        first.data, second.data = second.data, first.data


@fault("weights", on=CT)
def fp8_codes_of_k_and_v_swapped(folder: Path) -> str:
    _swap_codes(folder, K, V)
    return f"{K}: "


@fault("weights", on=MO)
def fp8_codes_of_k_and_v_swapped_in_modelopt(folder: Path) -> str:
    _swap_codes(folder, K, V)
    return f"{K}: "


@fault("weights", on=FOREIGN)
def fp8_codes_of_k_and_v_swapped_by_another_tool(folder: Path) -> str:
    _swap_codes(folder, K, V)
    return f"{K}: relative RMSE"


# scales of rows


def _rows(folder: Path, change: Callable[[Tensor], Any], name: str = O_) -> int:
    """Change the scales of an FP8 matrix; returns the number of a row that does not have the largest."""
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{name}.weight_scale"]
        scales = torch.frombuffer(stored.data, dtype=torch.float32).clone()
        row = int(scales.argmin())
        change(scales)
        stored.data = bytes_of(scales)
        return row


def _row_becomes(folder: Path, value: Callable[[float], float]) -> str:
    def change(scales: Tensor) -> None:
        scales[scales.argmin()] = value(float(scales.min()))

    return f"{O_}.weight_scale: 1 of 64 scales cannot be right (first at row {_rows(folder, change)}: "


@fault("fp8", "weights", on=CT)  # what it decodes to is not the source's either
def row_scale_of_zero(folder: Path) -> str:
    return _row_becomes(folder, lambda _: 0.0) + "0)"


@fault("fp8", "weights", on=CT)
def row_scale_that_is_negative(folder: Path) -> str:
    return _row_becomes(folder, lambda scale: -scale) + "-"


@fault("fp8", "weights", on=CT)
def row_scale_that_is_infinite(folder: Path) -> str:
    return _row_becomes(folder, lambda _: math.inf) + "inf)"


@fault("fp8", "weights", on=FOREIGN)
def row_scale_that_is_nan(folder: Path) -> str:
    return _row_becomes(folder, lambda _: math.nan) + "nan)"


@fault("fp8", "weights", on=FOREIGN)
def row_scales_stored_as_divisors(folder: Path) -> str:
    _rows(folder, Tensor.reciprocal_)
    return f"{O_}.weight_scale: 64 of 64 scales cannot be right (first at row 0: "


@fault("weights", on=CT)
def row_scales_of_two_rows_swapped(folder: Path) -> str:
    def change(scales: Tensor) -> None:
        scales[[4, 9]] = scales[[9, 4]]

    _rows(folder, change)
    return f"{O_}: 2 of 64 row scales differ from the quantizer's (first at row 4: "


@fault("weights", on=CT)
def row_scale_an_ulp_off(folder: Path) -> str:
    def change(scales: Tensor) -> None:
        scales[scales.argmin()] *= 1 + 2**-23

    return f"{O_}: 1 of 64 row scales differ from the quantizer's (first at row {_rows(folder, change)}: "


@fault("weights", on=FOREIGN)
def row_scales_shifted_by_one_by_another_tool(folder: Path) -> str:
    _rows(folder, lambda scales: scales.copy_(scales.roll(1)), Q)
    return f"{Q}: "


@fault("weights", on=FOREIGN)
def one_row_scale_an_eighth_too_large_by_another_tool(folder: Path) -> str:
    def change(scales: Tensor) -> None:
        scales[scales.argmin()] *= 1.125

    _rows(folder, change)
    return f"{O_}: 1 of 64 rows exceed the limit of error 0.08"


@fault("weight_scales", "weights", on=CT)  # nor is it the source's
def largest_row_scale_halved(folder: Path) -> str:
    def change(scales: Tensor) -> None:
        scales[scales.argmax()] /= 2

    _rows(folder, change)
    return f"{O_}: its largest row scale is"


# scalars of modelopt


@fault("fp8", "weight_scales", "weights", on=MO)  # nor is it the recorded one, nor does it decode the weights
def fp8_weight_scale_of_zero(folder: Path) -> str:
    return change_scalar(folder, [f"{O_}.weight_scale"], lambda _: 0.0) + " is 0"


@fault("fp8", "weight_scales", "weights", on=MO)
def fp8_weight_scale_stored_as_divisor(folder: Path) -> str:
    return change_scalar(folder, [f"{O_}.weight_scale"], lambda scale: 1 / scale) + " is "


@fault("fused_groups", "weight_scales", "weights", on="gemma4-fp8-mo")
def q_and_k_with_different_fp8_weight_scales(folder: Path) -> str:
    change_scalar(folder, [f"{FULL_LAYER}.self_attn.k_proj.weight_scale"], lambda scale: scale * 2)
    return f"{FULL_LAYER}.self_attn.qkv_proj: weight scales differ: q_proj"


@fault("fused_groups", "input_scales", on=MO)  # nor is it what follows from calibration
def q_and_v_with_different_fp8_input_scales(folder: Path) -> str:
    change_scalar(folder, [f"{V}.input_scale"], lambda scale: scale * (1 + 2**-23))
    return f"{LAYER}.self_attn.qkv_proj: input scales differ: q_proj"


@fault("global_scales", "input_scales", on=MO)
def fp8_input_scale_of_zero(folder: Path) -> str:
    return change_scalar(folder, [f"{O_}.input_scale"], lambda _: 0.0) + " is 0.0"


@fault("input_scales", on=MO)
def fp8_input_scale_ten_times_off(folder: Path) -> str:
    return change_scalar(folder, [f"{O_}.input_scale"], lambda scale: scale / 10)


@fault("weight_scales", "weights", on=CT)  # the source has another amax
def fp8_weight_amax_changed(folder: Path) -> str:
    with edit_json(folder / "nvquant_manifest.json") as manifest:
        recorded_group(manifest, "self_attn.o_proj")["weight_amax"] *= 2
    return f"{O_}: its largest row scale is"


@fault("weight_scales", "weights", on=MO)
def fp8_weight_amax_changed_in_modelopt(folder: Path) -> str:
    with edit_json(folder / "nvquant_manifest.json") as manifest:
        recorded_group(manifest, "self_attn.o_proj")["weight_amax"] *= 2
    return f"{O_}.weight_scale is"


# tensors


def _drop(folder: Path, name: str) -> str:
    with edit_tensors(folder) as tensors:
        del tensors[name]
    return " lacks ".join(name.rsplit(".", 1))


@fault("matrices", on=CT)
def missing_row_scales(folder: Path) -> str:
    return _drop(folder, f"{K}.weight_scale")


@fault("matrices", on=MO)
def missing_fp8_weight_scale(folder: Path) -> str:
    return _drop(folder, f"{K}.weight_scale")


@fault("matrices", on=MO)
def missing_fp8_input_scale(folder: Path) -> str:
    return _drop(folder, f"{O_}.input_scale")


@fault("matrices", "layout", "names", on=CT)  # it is a name of modelopt, and the source has none
def fp8_input_scale_in_a_dynamic_checkpoint(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        file = tensors[f"{O_}.weight"].file
        tensors[f"{O_}.input_scale"] = Stored(file, "F32", [1], bytes_of(torch.ones(1)))
    return f"{O_} also has input_scale"


@fault("matrices", on=CT)  # vLLM asserts [rows, 1]
def row_scales_without_their_second_axis(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{O_}.weight_scale"].shape = [64]
    return f"{O_}.weight_scale has shape [64], not [64, 1] as codes of [64, 64] require"


@fault("matrices", on=MO)
def scales_of_rows_in_modelopt(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{O_}.weight_scale"]
        stored.shape, stored.data = [64], stored.data * 64
    return f"{O_}.weight_scale has shape [64], not [1] or []"


@fault("matrices", on=CT)
def fp8_codes_stored_as_bytes(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{O_}.weight"].dtype = "U8"
    return f"{O_}.weight is U8, not F8_E4M3"


@fault("matrices", on=CT)
def fp8_codes_stored_as_e5m2(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{O_}.weight"].dtype = "F8_E5M2"
    return f"{O_}.weight is F8_E5M2, not F8_E4M3"


# schemes


@fault("fused_groups", "config", on=FOREIGN)  # a server gives the fused layer one scheme
def members_of_a_fused_layer_in_two_schemes(folder: Path) -> str:
    name = f"{LAYER}.mlp.up_proj"
    with edit_tensors(folder) as tensors:
        file = tensors[f"{name}.weight_packed"].file
        for stored in [stored for stored in tensors if stored.startswith(f"{name}.")]:
            del tensors[stored]
        weight = torch.frombuffer(source_bytes(folder, f"{name}.weight"), dtype=torch.bfloat16).reshape(128, 64)
        scales = fp8_scale(weight.float().abs().amax(1, keepdim=True))
        tensors[f"{name}.weight"] = Stored(file, "F8_E4M3", [128, 64], bytes_of(quantize_rows(weight, scales)))
        tensors[f"{name}.weight_scale"] = Stored(file, "F32", [128, 1], bytes_of(scales))
    return f"{LAYER}.mlp.gate_up_proj: its members are in different schemes: FP8 W8A8, NVFP4 W4A4"


@fault("manifest", on=CT)
def fp8_recorded_as_nvfp4(folder: Path) -> str:
    with edit_json(folder / "nvquant_manifest.json") as manifest:
        recorded_group(manifest, "self_attn.o_proj")["scheme"] = "nvfp4"
    return f"{O_} is stored as ['fp8'], not nvfp4"


@fault("manifest", on=MO)
def fp8_inputs_not_recorded(folder: Path) -> str:
    with edit_json(folder / "nvquant_manifest.json") as manifest:
        del recorded_group(manifest, "self_attn.o_proj")["input"]
    return f"{O_}: input statistics do not fit scheme fp8"


@fault("manifest", on=CT)
def recipe_without_fp8(folder: Path) -> str:
    with edit_json(folder / "nvquant_manifest.json") as manifest:
        manifest["recipe"]["quantize"].pop()
    return "_proj is fp8, but recipe nvfp4-fp8 makes it not quantized"


@fault("protected", "config", on=FOREIGN)  # it is no target of the config either
def embedding_in_fp8(folder: Path) -> str:
    name = "model.embed_tokens"
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{name}.weight"]
        weight = torch.frombuffer(stored.data, dtype=torch.bfloat16).reshape(stored.shape)
        scales = fp8_scale(weight.float().abs().amax(1, keepdim=True))
        tensors[f"{name}.weight"] = Stored(
            stored.file, "F8_E4M3", stored.shape, bytes_of(quantize_rows(weight, scales))
        )
        tensors[f"{name}.weight_scale"] = Stored(stored.file, "F32", [stored.shape[0], 1], bytes_of(scales))
    return f"{name} (embedding) is quantized"
