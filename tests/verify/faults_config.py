"""Faults of what the config says and of what is stored for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import torch_dtype
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from verify.breaking import (
    FULL_LAYER,
    GEMMA,
    HF_QUANT_CONFIG,
    LAYER,
    MANIFEST,
    Fault,
    Stored,
    bytes_of,
    edit_ct,
    edit_json,
    edit_tensors,
    listing,
    source_bytes,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)


# layout


@fault("layout", "config")  # without a group nothing has a scheme
def config_group_that_is_no_map(folder: Path) -> str:
    edit_ct(folder, lambda config: config["config_groups"].update(group_0="nvfp4"))
    return "config_groups is not a map of groups"


@fault("layout", on="llama-mo")
def hf_quant_config_missing(folder: Path) -> str:
    (folder / HF_QUANT_CONFIG).unlink()
    return HF_QUANT_CONFIG


@fault("layout", on="llama-mo")
def hf_quant_config_excludes_less(folder: Path) -> str:
    with edit_json(folder / HF_QUANT_CONFIG) as nested:
        nested["quantization"]["exclude_modules"] = []
    return "exclude_modules"


@fault("layout")
def hf_quant_config_beside_compressed_tensors(folder: Path) -> str:
    (folder / HF_QUANT_CONFIG).write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    return HF_QUANT_CONFIG


@fault("layout")
def format_of_another_compressor(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "float-quantized"
    return "float-quantized"


@fault("layout", "config")  # under modelopt's rules nothing has a scheme
def method_of_the_other_layout(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["quantization_config"]["quant_method"] = "modelopt"
    return "63 tensors have the names of compressed-tensors"


@fault("layout", "config")  # without a config nothing has a scheme
def config_without_quantization(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["quantization_config"]
    return "quantization_config"


# matrices


def _drop(folder: Path, name: str) -> str:
    with edit_tensors(folder) as tensors:
        del tensors[name]
    return " lacks ".join(name.rsplit(".", 1))


@fault("matrices")
def missing_block_scales(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.up_proj.weight_scale")


@fault("matrices", on="llama-mo")
def missing_global_scale(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.down_proj.weight_scale_2")


@fault("matrices", "manifest")  # which records the matrix as W4A4
def missing_input_scale(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.down_proj.input_global_scale")


@fault("matrices", "manifest", on="llama-a16-ct")  # which records the matrix as weight-only
def input_scale_in_a_weight_only_checkpoint(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        scale = tensors[f"{LAYER}.mlp.down_proj.weight_global_scale"]
        tensors[f"{LAYER}.mlp.down_proj.input_global_scale"] = Stored(scale.file, "F32", [1], bytearray(scale.data))
    return f"{LAYER}.mlp.down_proj also has input_global_scale"


@fault("matrices")
def block_scales_stored_as_bytes(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"].dtype = "U8"
    return f"{LAYER}.mlp.up_proj.weight_scale is U8, not F8_E4M3"


@fault("matrices")
def block_scales_of_another_shape(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"].shape.reverse()
    return f"{LAYER}.mlp.up_proj.weight_scale has shape [4, 128], not [128, 4]"


@fault("matrices", on="llama-mo")
def global_scale_a_row(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{LAYER}.mlp.up_proj.weight_scale_2"]
        stored.shape, stored.data = [2], stored.data * 2
    return f"{LAYER}.mlp.up_proj.weight_scale_2 has shape [2]"


@fault("matrices")
def unquantized_weight_left_beside_the_packed(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        packed = tensors[f"{LAYER}.mlp.up_proj.weight_packed"]
        data = source_bytes(folder, f"{LAYER}.mlp.up_proj.weight")
        tensors[f"{LAYER}.mlp.up_proj.weight"] = Stored(packed.file, "BF16", [128, 64], data)
    return f"{LAYER}.mlp.up_proj also has weight"


# config


@fault("config", on="gemma4-mlp-ct")
def ignoring_q_and_k_but_not_the_phantom_v(folder: Path) -> str:
    # What llm-compressor writes for Gemma 4: a list of the modules that exist. vLLM refuses it.
    def edit(config: dict[str, Any]) -> None:
        kept = [entry for entry in config["ignore"] if "self_attn" not in entry]
        names = [f"{GEMMA}.{i}.self_attn.{x}_proj" for i in range(6) for x in "qkvo" if (i, x) != (5, "v")]
        config["ignore"] = kept + names

    edit_ct(folder, edit)
    return f"{FULL_LAYER}.self_attn.qkv_proj is not quantized, but config.json makes it refused"


@fault("config")
def target_dropped_from_the_config(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        targets = config["config_groups"]["group_0"]["targets"]
        config["config_groups"]["group_0"]["targets"] = [target for target in targets if "mlp" not in target]

    edit_ct(folder, edit)
    return "model.layers.0.mlp.gate_up_proj is quantized, but config.json makes it unquantized"


@fault("config")
def ignoring_one_member_of_each_fused_layer(folder: Path) -> str:
    edit_ct(folder, lambda config: config["ignore"].append("re:.*up_proj$"))
    return "mlp.gate_up_proj is quantized, but config.json makes it unquantized"


@fault("config", on="gemma4-mlp-ct")
def targets_that_reach_the_vision_tower(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        config["ignore"] = [entry for entry in config["ignore"] if "vision" not in entry]
        config["config_groups"]["group_0"]["targets"].append("re:.*vision_tower.*")

    edit_ct(folder, edit)
    return "is not quantized, but config.json makes it nvfp4"


@fault("config")
def targets_that_reach_the_embedding(folder: Path) -> str:
    edit_ct(folder, lambda config: config["config_groups"]["group_0"]["targets"].append("re:.*embed_tokens$"))
    return "model.embed_tokens is not quantized, but config.json makes it nvfp4"


@fault("config")
def weight_only_config_of_a_w4a4_checkpoint(folder: Path) -> str:
    edit_ct(folder, lambda config: config["config_groups"]["group_0"].update(input_activations=None))
    return "config.json assigns nvfp4-a16 to 21 matrices, but 21 of them have an input scale"


@fault("config", on="llama-a16-mo")
def w4a4_config_of_a_weight_only_checkpoint(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = group["weights"]
        config["quantization_config"]["quant_algo"] = nested["quantization"]["quant_algo"] = "NVFP4"
    return "config.json assigns nvfp4 to 21 matrices, but 0 of them have an input scale"


@fault("config")
def strategy_that_servers_do_not_take_for_nvfp4(folder: Path) -> str:
    edit_ct(folder, lambda config: config["config_groups"]["group_0"]["weights"].update(strategy="group"))
    return "config.json makes it another scheme"


@fault("config")
def unknown_key_among_the_numbers(folder: Path) -> str:
    edit_ct(folder, lambda config: config["config_groups"]["group_0"]["input_activations"].update(amax=3.0))
    return "config.json makes it refused"


@fault("config", on="llama-mo")
def head_not_excluded(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        config["quantization_config"]["ignore"] = nested["quantization"]["exclude_modules"] = ["*embed_tokens*"]
    return "lm_head is not quantized, but config.json makes it nvfp4"


@fault("config")
def pattern_that_does_not_compile(folder: Path) -> str:
    edit_ct(folder, lambda config: config["ignore"].append("re:.*(mlp"))
    return "config.json makes it refused"


# protected


@fault("protected", "config", "manifest", on="gemma4-mlp-ct")  # the tower is neither a target nor recorded
def vision_tower_quantized(folder: Path) -> str:
    module = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    with edit_tensors(folder) as tensors:
        stored = tensors.pop(f"{module}.weight")
        weight = torch.frombuffer(stored.data, dtype=torch_dtype(stored.dtype)).view(stored.shape)
        scale = global_scale(weight_amax(weight))
        packed = quantize_blocks(weight, scale)
        rows, cols = stored.shape
        parts = {
            "weight_packed": ("U8", [rows, cols // 2], packed.packed),
            "weight_scale": ("F8_E4M3", [rows, cols // 16], packed.scales),
            "weight_global_scale": ("F32", [1], scale.view(1)),
            "input_global_scale": ("F32", [1], scale.view(1)),
        }
        for leaf, (dtype, shape, tensor) in parts.items():
            tensors[f"{module}.{leaf}"] = Stored(stored.file, dtype, shape, bytes_of(tensor))
    return module


@fault("protected", "names")  # it is not the embedding, and the source has none
def head_written_for_a_tied_model(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = embedding.data[2:] + embedding.data[:2]
        tensors["lm_head.weight"] = Stored(embedding.file, "BF16", embedding.shape, head)
    return "lm_head.weight differs from model.embed_tokens.weight"


@fault("names")
def tied_head_written_twice(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return "lm_head.weight is added"


# kv_cache


@fault("kv_cache")
def kv_cache_of_integers(folder: Path) -> str:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["kv_cache"]["dtype"] = "fp8"
    edit_ct(folder, lambda config: config.update(kv_cache_scheme=scheme))
    return "kv_cache_scheme is"


@fault("kv_cache")
def kv_cache_scheme_that_the_recipe_did_not_ask_for(folder: Path) -> str:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    edit_ct(folder, lambda config: config.update(kv_cache_scheme=scheme))
    return "the recipe requires bf16"


@fault("kv_cache", "names")  # the source has no such tensor
def kv_scale_without_a_scheme(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        one = bytes_of(torch.ones(1))
        tensors[f"{LAYER}.self_attn.k_scale"] = Stored("model-00002-of-00004.safetensors", "F32", [1], one)
    return f"{LAYER}.self_attn.k_scale is stored"
