"""Faults of the numbers that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from verify.breaking import (
    FULL_LAYER,
    LAYER,
    MANIFEST,
    Fault,
    Stored,
    change_scalar,
    edit_json,
    edit_tensors,
    listing,
    recorded_group,
    source_bytes,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)


# block_scales


def _set_block_scale(folder: Path, value: Callable[[int], int]) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # [64, 8]
        at = next(i for i in range(13, len(data)) if data[i] < 0x70)  # not the one that holds the amax
        data[at] = value(data[at])
        return f"first at row {at // 8}, block {at % 8}: byte 0x{data[at]:02X}"


@fault("block_scales", "weights")  # what it decodes to is not the source's either
def block_scale_that_is_nan(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0x7F)


@fault("block_scales", "weights")
def block_scale_that_is_negative_nan(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0xFF)


@fault("block_scales", "weights")
def block_scale_that_is_negative(folder: Path) -> str:
    return _set_block_scale(folder, lambda byte: byte | 0x80)


@fault("block_scales", "weights")
def block_scale_that_is_zero(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0)


# global_scales, fused_groups


@fault("global_scales", "weight_scales", "weights")  # nor is it the recorded one, nor does it decode the weights
def weight_global_scale_stored_as_multiplier(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: 1 / scale)


@fault("global_scales", "weight_scales", "weights", on="llama-mo")
def weight_global_scale_stored_as_divisor(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_scale_2"], lambda scale: 1 / scale)


@fault("global_scales", "input_scales")  # nor is it what follows from calibration
def input_global_scale_that_is_zero(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_global_scale"], lambda _: 0.0)


@fault("global_scales", "input_scales", on="llama-mo")
def input_global_scale_that_is_infinite(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_scale"], lambda _: float("inf"))


@fault("fused_groups", "weight_scales", "weights")  # nor is it the recorded one, nor does it decode the weights
def gate_and_up_with_different_scales(folder: Path) -> str:
    change_scalar(folder, [f"{LAYER}.mlp.up_proj.weight_global_scale"], lambda scale: scale * 2)
    return f"{LAYER}.mlp.gate_up_proj: weight global scales differ: gate_proj"


@fault("fused_groups", "input_scales", on="gemma4-mo")  # nor is it what follows from calibration
def q_and_k_with_different_input_scales(folder: Path) -> str:
    name = f"{FULL_LAYER}.self_attn.k_proj.input_scale"
    change_scalar(folder, [name], lambda scale: scale * (1 + 2**-23))
    return f"{FULL_LAYER}.self_attn.qkv_proj: input global scales differ: q_proj"


@fault("fused_groups", "manifest")  # which records v_proj as quantized
def v_proj_left_out_of_the_fused_layer(folder: Path) -> str:
    module = f"{LAYER}.self_attn.v_proj"
    weight = source_bytes(folder, f"{module}.weight")
    with edit_tensors(folder) as tensors:
        packed = tensors[f"{module}.weight_packed"]
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            del tensors[f"{module}.{leaf}"]
        tensors[f"{module}.weight"] = Stored(packed.file, "BF16", [packed.shape[0], packed.shape[1] * 2], weight)
    return f"{module} is not quantized, but the rest of {LAYER}.self_attn.qkv_proj is"


# input_scales, weight_scales


@fault("weight_scales", "weights")  # neither the scales nor the codes are what mse chooses from
def quantizer_claimed_wrongly(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["quantizer"] = "mse"
    return "weight_global_scale"


@fault("input_scales")
def input_scale_ten_times_off(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_global_scale"], lambda scale: scale * 10)


@fault("input_scales", on="gemma4-mo")
def input_scale_an_ulp_off(folder: Path) -> str:
    return change_scalar(folder, [f"{FULL_LAYER}.mlp.down_proj.input_scale"], lambda scale: scale * (1 + 2**-23))


@fault("input_scales")
def observed_amax_changed(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded_group(manifest, "mlp.down_proj")["input"]["observed_amax"] *= 1.5
    return f"{LAYER}.mlp.down_proj: calibrated amax"


@fault("weight_scales", "weights")  # the source has another amax
def weight_amax_changed(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded_group(manifest, "mlp.down_proj")["weight_amax"] *= 2
    return f"{LAYER}.mlp.down_proj.weight_global_scale"


@fault("weight_scales", "weights")  # nor do they decode the weights
def block_scales_halved(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data
        data[:] = bytes(max(1, byte - 8) for byte in data)
    return f"{LAYER}.mlp.down_proj: its largest block scale is 224, but its recorded amax asks for about 448"


# weights


def _swap_nibbles(folder: Path, name: str) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[name].data
        data[:] = bytes((byte >> 4) | (byte & 15) << 4 for byte in data)
    return name.rpartition(".")[0]


@fault("weights")
def nibbles_swapped(folder: Path) -> str:
    return _swap_nibbles(folder, f"{LAYER}.mlp.down_proj.weight_packed")


@fault("weights", on="gemma4-mo")
def nibbles_swapped_in_modelopt(folder: Path) -> str:
    return _swap_nibbles(folder, f"{FULL_LAYER}.mlp.down_proj.weight")


@fault("weights", on="llama-foreign")
def nibbles_swapped_by_another_tool(folder: Path) -> str:
    return _swap_nibbles(folder, f"{LAYER}.mlp.down_proj.weight_packed") + ": relative RMSE 1."


@fault("weights")
def one_code_off_by_one(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_packed"].data  # [64, 64]
        at = next(i for i, byte in enumerate(data) if i > 100 and byte & 7 in (2, 3))
        data[at] -= 1
    return f"1 of 8,192 elements are not the nearest under their stored scale (first at row 1, column {(at - 64) * 2}"


@fault("weights")
def matrix_of_zeros(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{LAYER}.mlp.down_proj.weight_packed"]
        stored.data[:] = bytes(len(stored.data))
    return f"{LAYER}.mlp.down_proj"


@fault("weights", on="llama-foreign")
def matrix_of_zeros_by_another_tool(folder: Path) -> str:
    matrix_of_zeros(folder)
    return f"{LAYER}.mlp.down_proj: relative RMSE 1 and gain 0"


@fault("weights")
def block_scales_of_two_rows_swapped(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # [64, 8]
        data[8:16], data[16:24] = data[16:24], data[8:16]
    return f"{LAYER}.mlp.down_proj: "


@fault("weights", on="gemma4-mo")
def block_scales_of_two_rows_swapped_under_mse(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{FULL_LAYER}.mlp.down_proj.weight_scale"].data
        data[8:16], data[16:24] = data[16:24], data[8:16]
    return f"{FULL_LAYER}.mlp.down_proj: "


@fault("weights", on="llama-foreign")
def two_percent_of_the_blocks_wrong(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # 512 blocks
        quiet = sorted(range(len(data)), key=lambda i: data[i])[:11]  # too little to show in the whole matrix
        for at in quiet:
            data[at] -= 8
    return f"{LAYER}.mlp.down_proj: 11 of 512 blocks exceed the limits of error and gain"


@fault("weights", on="llama-foreign")
def gain_of_a_matrix_wrong(folder: Path) -> str:
    change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: scale / 1.15)
    return "gain 1.15"


def _swap_layers(folder: Path, leaves: tuple[str, ...]) -> str:
    with edit_tensors(folder) as tensors:
        for leaf in leaves:
            one, other = (tensors[f"model.layers.{i}.mlp.down_proj.{leaf}"] for i in (0, 1))
            one.data, other.data = other.data, one.data
    return "model.layers.0.mlp.down_proj"


@fault("weight_scales", "input_scales", "weights")  # the recorded amaxes are swapped too
def two_layers_swapped(folder: Path) -> str:
    return _swap_layers(folder, ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))


@fault("weights", on="llama-foreign")
def two_layers_swapped_by_another_tool(folder: Path) -> str:
    return _swap_layers(folder, ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))


@fault("global_scales", "weights", on="llama-foreign")  # what it decodes to is not the source's either
def scale_stored_as_multiplier_by_another_tool(folder: Path) -> str:
    return change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: 1 / scale)


@fault("config_source", on="llama-foreign")
def key_added_by_another_tool(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["sliding_window"] = 4096
    return "sliding_window is added"
