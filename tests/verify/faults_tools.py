"""Faults that real tools and hands produced, in a checkpoint's bytes and configs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from support.tiny_models import tiny_llama
from torch import Tensor
from verify.breaking import (
    FULL_LAYER,
    HF_QUANT_CONFIG,
    LAYER,
    MANIFEST,
    Fault,
    Stored,
    Tensors,
    bytes_of,
    change_scalar,
    edit_ct,
    edit_json,
    edit_tensors,
    listing,
    source_bytes,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)
DOWN, UP = f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj"


# dtypes


def _retype(folder: Path, name: str, dtype: str, data: Tensor | None = None) -> str:
    with edit_tensors(folder) as tensors:
        tensors[name].dtype = dtype
        if data is not None:
            tensors[name].data = bytes_of(data)
    return name


@fault("matrices")
def packed_codes_stored_as_fp8(folder: Path) -> str:
    return _retype(folder, f"{DOWN}.weight_packed", "F8_E4M3") + " is F8_E4M3, not U8"


@fault("matrices", on="llama-mo")
def packed_codes_stored_as_fp8_in_modelopt(folder: Path) -> str:
    return _retype(folder, f"{DOWN}.weight", "F8_E4M3") + " is F8_E4M3, not U8"


@fault("matrices", on="llama-mo")
def fp8_weights_under_an_nvfp4_label(folder: Path) -> str:
    # modelopt issue 868: 8 bits a weight under a name that promises 4.
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{DOWN}.weight"]
        stored.dtype, stored.shape, stored.data = "F8_E4M3", [64, 128], bytearray(64 * 128)
    return f"{DOWN}.weight is F8_E4M3, not U8"


@fault("matrices")
def packed_codes_stored_as_signed_bytes(folder: Path) -> str:
    return _retype(folder, f"{DOWN}.weight_packed", "I8") + " is I8, not U8"


@fault("matrices")
def block_scales_stored_as_e5m2(folder: Path) -> str:
    scales = _scales(folder, DOWN).to(torch.float8_e5m2)
    return _retype(folder, f"{DOWN}.weight_scale", "F8_E5M2", scales) + " is F8_E5M2, not F8_E4M3"


@fault("matrices")
def global_scale_stored_as_bf16(folder: Path) -> str:
    value = torch.tensor([1000.0], dtype=torch.bfloat16)
    return _retype(folder, f"{DOWN}.weight_global_scale", "BF16", value) + " is BF16, not F32"


@fault("matrices")
def codes_not_packed(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{DOWN}.weight_packed"]
        stored.data = bytearray(nibble for byte in stored.data for nibble in (byte & 15, byte >> 4))
        stored.shape = [64, 128]
    return f"{DOWN}.weight_scale has shape [64, 8], not [64, 16]"


# block scales


def _scales(folder: Path, module: str) -> Tensor:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{module}.weight_scale"]
        return torch.frombuffer(stored.data, dtype=torch.float8_e4m3fn).reshape(stored.shape).float()


def _set_scales(folder: Path, module: str, data: Tensor) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{module}.weight_scale"].data[:] = bytes_of(data)
    return module


def _rearranged(folder: Path, module: str, change: Any) -> str:
    scales = _scales(folder, module).to(torch.float8_e4m3fn).view(torch.uint8)
    return _set_scales(folder, module, change(scales))


@fault("matrices")
def block_scales_padded_for_a_kernel(folder: Path) -> str:
    # Kernels want 128 rows and 4 columns at least; a server pads them itself.
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{DOWN}.weight_scale"]
        stored.shape, stored.data = [128, 8], stored.data + bytes(64 * 8)
    return f"{DOWN}.weight_scale has shape [128, 8], not [64, 8]"


@fault("weights")
def block_scales_swizzled_for_a_kernel(folder: Path) -> str:
    # The order of a 128 x 4 tile in CUTLASS: row r, column c lies at (r % 32) * 16 + r // 32 * 4 + c.
    return _rearranged(folder, UP, lambda scales: scales.reshape(4, 32, 4).transpose(0, 1)) + ": "


@fault("weights", on="llama-foreign-mo")
def block_scales_swizzled_by_another_tool(folder: Path) -> str:
    return _rearranged(folder, UP, lambda scales: scales.reshape(4, 32, 4).transpose(0, 1)) + ": relative RMSE"


@fault("weights", on="llama-foreign")
def block_scales_transposed(folder: Path) -> str:
    return _rearranged(folder, DOWN, lambda scales: scales.t()) + ": relative RMSE"


@fault("weights", on="llama-foreign")
def block_scales_shifted_by_one(folder: Path) -> str:
    return _rearranged(folder, DOWN, lambda scales: scales.flatten().roll(1)) + ": relative RMSE"


@fault("weights", on="llama-foreign")
def block_scales_in_e5m2_under_the_name_of_e4m3(folder: Path) -> str:
    return _set_scales(folder, DOWN, _scales(folder, DOWN).clamp(max=240).to(torch.float8_e5m2)) + ": relative RMSE"


@fault("weights", on="llama-foreign")
def block_scales_of_one_layer_halved(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        for name, stored in tensors.items():
            if name.startswith(LAYER) and name.endswith("weight_scale"):
                stored.data[:] = bytes(max(1, byte - 8) for byte in stored.data)
    return "the limits are 0.25 and 0.9 to 1.1"


@fault("block_scales", "weights", on="llama-foreign")  # what they decode to is no number either
def block_scales_unclamped_before_the_cast(folder: Path) -> str:
    # modelopt issue 1633: 464 and more become the byte of NaN.
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_scale"].data
        data[data.index(max(data))] = 0x7F
    return f"{DOWN}: 1 NaN"


@fault("weights", on="llama-foreign")
def layer_of_zeros_by_another_tool(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        for name, stored in tensors.items():
            if name.startswith(LAYER) and name.endswith("weight_packed"):
                stored.data[:] = bytes(len(stored.data))
    return "relative RMSE 1 and gain 0"


# global scales


@fault("weights", on="llama-foreign")
def q_k_and_v_scales_merged_without_quantizing_again(folder: Path) -> str:
    """Each was quantized under its own global scale; then one value was written for all three."""
    modules = [f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkv"]
    source = open_checkpoint(folder.parent / "source")
    divisors = []
    with edit_tensors(folder) as tensors:
        for factor, module in zip((1, 1.6, 2.2), modules, strict=True):  # in real models they differ so; here hardly
            weight = source.read(f"{module}.weight").float()
            divisor = global_scale(weight_amax(weight) * factor)
            packed = quantize_blocks(weight, divisor)
            tensors[f"{module}.weight_packed"].data = bytes_of(packed.packed)
            tensors[f"{module}.weight_scale"].data = bytes_of(packed.scales)
            divisors.append(float(divisor))
        for module in modules:
            tensors[f"{module}.weight_global_scale"].set_scalar(sum(divisors) / 3)
    return f"{modules[0]}: relative RMSE"


@fault("global_scales", "input_scales")  # nor is it what follows from calibration
def input_scale_of_an_input_that_was_never_seen(folder: Path) -> str:
    # vLLM issue 45212: an expert without calibration tokens gets 1 / 0.
    change_scalar(folder, [f"{DOWN}.input_global_scale"], lambda _: math.inf)
    return f"{DOWN}.input_global_scale is inf"


@fault("global_scales", on="llama-foreign-mo")
def input_scale_that_is_nan(folder: Path) -> str:
    change_scalar(folder, [f"{DOWN}.input_scale"], lambda _: math.nan)
    return f"{DOWN}.input_scale is nan"


# other tensors


@fault("unquantized", "untouched")  # the source has a number there
def norm_of_nan(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.input_layernorm.weight"].data[6:8] = bytes_of(torch.tensor([math.nan], dtype=torch.bfloat16))
    return f"{LAYER}.input_layernorm.weight holds a NaN at element 3"


@fault("unquantized", "untouched", on="llama-foreign")
def row_of_the_embedding_never_written(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors["model.embed_tokens.weight"].data[-128:] = b"\xff" * 128
    return f"model.embed_tokens.weight holds a NaN at element {511 * 64:,}"


@fault("names", on="qwen2-a16-ct")
def biases_lost(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]
    return "model.layers.0.self_attn.k_proj.bias is missing"


@fault("untouched", on="gemma2-a16-ct")
def norms_stored_with_their_one_added(folder: Path) -> str:
    # Gemma 2 and 3 store w - 1.
    with edit_tensors(folder) as tensors:
        for name, stored in tensors.items():
            if name.endswith("norm.weight"):
                values = torch.frombuffer(stored.data, dtype=torch.bfloat16) + 1
                stored.data = bytes_of(values)
    return "norm.weight differs"


def _twelve_layers(tensors: Tensors, order: list[int]) -> Tensors:
    """Layers in another order."""
    moved: Tensors = {}
    for name, stored in tensors.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            source = tensors[".".join([*parts[:2], str(order[int(parts[2])]), *parts[3:]])]
            moved[name] = Stored(stored.file, source.dtype, source.shape, source.data)
    return {**tensors, **moved}


@fault("untouched", "weights", on="deep-foreign")  # norms are in the wrong layer, too
def layers_sorted_as_text(folder: Path) -> str:
    order = sorted(range(12), key=str)  # 0, 1, 10, 11, 2 ...
    with edit_tensors(folder) as tensors:
        tensors.update(_twelve_layers(dict(tensors), order))
    return "model.layers.2.input_layernorm.weight differs"


@fault("untouched", "weights", on="llama-foreign")  # of the shard, which holds layer 1 with its norms
def shard_of_an_older_run_mixed_in(folder: Path) -> str:
    from verify.checkpoints import convert_good

    other = tiny_llama(folder.parent / "other", seed=5)
    models = {"llama": other}
    older = convert_good("llama-foreign", models, folder.parent / "older")
    shard = "model-00002-of-00004.safetensors"
    shutil.copyfile(older / shard, folder / shard)
    return f"{LAYER}.input_layernorm.weight differs"


# configs


@fault("config", on="deep-a16-mo")
def exclusion_of_layer_1_that_catches_layers_10_and_11(folder: Path) -> str:
    # modelopt's names are tried as substrings; layer 1 is indeed in BF16, layers 10 and 11 are not.
    with edit_tensors(folder) as tensors:
        for module in {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale_2")}:
            if module.startswith("model.layers.1."):
                packed = tensors[f"{module}.weight"]
                rows, half = packed.shape
                data = source_bytes(folder, f"{module}.weight")
                tensors[f"{module}.weight"] = Stored(packed.file, "BF16", [rows, 2 * half], data)
                del tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
    (folder / MANIFEST).unlink()
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        config["quantization_config"]["ignore"].append("model.layers.1")
        nested["quantization"]["exclude_modules"].append("model.layers.1")
    return "model.layers.10.mlp.gate_up_proj is quantized, but config.json makes it unquantized"


@fault("layout", "config", "config_source", on="gemma4-ct")  # nothing has a scheme; and the source has no such key
def quantization_config_inside_of_text_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
    return "config.json has no quantization_config"


@fault("layout")
def config_without_a_format(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        config.pop("format", None)
        for group in config["config_groups"].values():
            group.pop("format", None)

    edit_ct(folder, edit)
    return "group_0 has format None, not nvfp4-pack-quantized"


@fault("layout", on="llama-mo")
def hf_quant_config_of_another_algorithm(folder: Path) -> str:
    with edit_json(folder / HF_QUANT_CONFIG) as nested:
        nested["quantization"]["quant_algo"] = "FP8"
    return "quant_algo is FP8 in hf_quant_config.json, but NVFP4 by config.json"


@fault("kv_cache", on="llama-foreign")
def kv_scale_of_zero(folder: Path) -> str:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    edit_ct(folder, lambda config: config.update(kv_cache_scheme=scheme))
    with edit_tensors(folder) as tensors:
        file = tensors[f"{LAYER}.input_layernorm.weight"].file
        for leaf, value in (("k_scale", 0.0), ("v_scale", 1.0)):
            tensors[f"{LAYER}.self_attn.{leaf}"] = Stored(file, "F32", [1], bytes_of(torch.tensor([value])))
    return f"{LAYER}.self_attn.k_scale is not a positive scalar"


@fault("names", on="gemma4-a16-ct")
def full_attention_layers_given_a_copy_of_k_as_v(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        parts = [name for name in tensors if name.startswith(f"{FULL_LAYER}.self_attn.k_proj.")]
        for name in parts:
            tensors[name.replace("k_proj", "v_proj")] = tensors[name]
    with edit_json(folder / MANIFEST) as manifest:
        group = manifest["layers"][5]["groups"][f"{FULL_LAYER}.self_attn.qkv_proj"]
        group["members"].append(f"{FULL_LAYER}.self_attn.v_proj")
    return f"{FULL_LAYER}.self_attn.v_proj is quantized, but the source has no such weight"
