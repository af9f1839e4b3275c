"""Faults of checkpoints with error feedback, whose codes verify cannot recompute."""

from __future__ import annotations

from pathlib import Path

from verify.breaking import FULL_LAYER, LAYER, MANIFEST, Fault, change_scalar, edit_json, edit_tensors, listing
from verify.breaking import recorded_group as group_in

FAULTS: list[Fault] = []
fault = listing(FAULTS)
ON = "llama-gptq-ct"
DOWN = f"{LAYER}.mlp.down_proj"


def _swap(data: bytearray, one: slice, other: slice) -> None:
    data[one], data[other] = data[other], data[one]


@fault("weights", on=ON)
def fed_back_rows_swapped(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        codes, scales = tensors[f"{DOWN}.weight_packed"], tensors[f"{DOWN}.weight_scale"]  # [64, 64], [64, 8]
        _swap(codes.data, slice(64 * 5, 64 * 6), slice(64 * 9, 64 * 10))
        _swap(scales.data, slice(8 * 5, 8 * 6), slice(8 * 9, 8 * 10))
    return f"{DOWN}: 2 of 64 rows exceed the limit of error 0.5 (first row 5)"


@fault("weights", on="gemma4-gptq-mo")
def fed_back_rows_swapped_in_modelopt(folder: Path) -> str:
    name = f"{FULL_LAYER}.mlp.down_proj"
    with edit_tensors(folder) as tensors:
        for leaf in ("weight", "weight_scale"):
            stored = tensors[f"{name}.{leaf}"]
            width = len(stored.data) // stored.shape[0]
            _swap(stored.data, slice(width, 2 * width), slice(0, width))
    return f"{name}: 2 of 64 rows exceed the limit of error 0.5 (first row 0)"


@fault("weights", on=ON)
def block_scales_of_fed_back_rows_swapped_with_the_next_block(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_scale"].data
        for at in (0, 8, 16):  # the first blocks of three rows, whose scales become twice as large
            data[at] += 8
    return f"{DOWN}: 3 of 512 blocks exceed the limit of error 0.5, more than 0.1 %"


@fault("weights", on=ON)
def fed_back_codes_shifted_by_a_byte(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_packed"].data
        data[:] = data[1:] + data[:1]
    return f"{DOWN}: relative RMSE 1."


@fault("weights", on=ON)
def a_fed_back_row_of_zeros(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{DOWN}.weight_packed"].data[64 * 7 : 64 * 8] = bytes(64)
    return f"{DOWN}: 1 of 64 rows exceed the limit of error 0.5 (first row 7)"


@fault("global_scales", "weight_scales", "weights", on=ON)  # nor is it the recorded one, nor does it decode the weights
def global_scale_of_a_fed_back_group_as_multiplier(folder: Path) -> str:
    return change_scalar(folder, [f"{DOWN}.weight_global_scale"], lambda scale: 1 / scale)


@fault("weight_scales", "weights", on=ON)  # nor does it decode to the source's weights
def global_scale_of_a_fed_back_group_wrong(folder: Path) -> str:
    return change_scalar(folder, [f"{DOWN}.weight_global_scale"], lambda scale: scale / 1.2)


@fault("weight_scales", on=ON)
def global_scale_of_a_fed_back_group_an_ulp_off(folder: Path) -> str:
    return change_scalar(folder, [f"{DOWN}.weight_global_scale"], lambda scale: scale * (1 + 2**-23))


@fault("weights", on=ON)
def amax_and_global_scale_of_a_fed_back_group_far_from_the_source(folder: Path) -> str:
    """Block scales make up for the global scale, so that only the amaxes show it."""
    with edit_json(folder / MANIFEST) as manifest:
        group_in(manifest, "mlp.down_proj")["weight_amax"] *= 4
    change_scalar(folder, [f"{DOWN}.weight_global_scale"], lambda scale: scale / 4)
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_scale"].data
        data[:] = bytes(byte - 16 for byte in data)
    return f"{DOWN}: the source's amax is "


@fault("weight_scales", "input_scales", "weights", on=ON)  # the recorded amaxes are swapped too
def two_fed_back_layers_swapped(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            one, other = (tensors[f"model.layers.{at}.mlp.down_proj.{leaf}"] for at in (0, 1))
            one.data, other.data = other.data, one.data
    return "model.layers.0.mlp.down_proj"


@fault("manifest", on=ON)
def record_of_error_feedback_lost(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del group_in(manifest, "mlp.down_proj")["feedback"]
    return f"{DOWN}: the record of error feedback does not fit the quantizer"


@fault("manifest", on="llama-a16-ct")
def error_feedback_recorded_of_mse(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        group_in(manifest, "mlp.down_proj")["feedback"] = {"damping": 0.03}
    return f"{DOWN}: the record of error feedback does not fit the quantizer"


@fault("manifest", "weights", on=ON)  # nor are the codes those of mse
def error_feedback_claimed_as_mse(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["quantizer"] = "mse"
    return "the record of error feedback does not fit the quantizer"


@fault("manifest", on="gemma4-gptq-a16-head-ct")
def calibration_of_a_weight_only_checkpoint_lost(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["calibration"] = None
    return "calibration is recorded although no group requires it, or missing for groups that do"


@fault("weights", on="gemma4-gptq-a16-head-ct")
def one_code_of_the_head_beside_fed_back_layers_off_by_one(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors["lm_head.weight_packed"].data
        at = next(at for at, byte in enumerate(data) if byte & 7 in (2, 3))
        data[at] -= 1
    return "lm_head: 1 of "


@fault("weights", on="gemma4-gptq-a16-head-ct")
def block_scale_of_the_head_beside_fed_back_layers_out_of_reach(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors["lm_head.weight_scale"].data
        data[3] -= 16
    return "lm_head: "


@fault("weights", on="llama-gptq-fp8-mo")
def one_fp8_code_beside_fed_back_matrices_off_by_one(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.self_attn.o_proj.weight"].data
        at = next(at for at, byte in enumerate(data) if byte & 7 == 3)
        data[at] -= 1
    return f"{LAYER}.self_attn.o_proj: 1 of "
