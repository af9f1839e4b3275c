"""Faults of files, of names, of copied bytes and of the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from support.raw_safetensors import INDEX_NAME
from verify.breaking import (
    FULL_LAYER,
    LAYER,
    MANIFEST,
    Fault,
    bytes_of,
    edit_json,
    edit_tensors,
    flip_last_byte,
    listing,
    recorded_group,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)


# index


@fault("index")
def total_size_wrong(folder: Path) -> str:
    with edit_json(folder / INDEX_NAME) as index:
        index["metadata"]["total_size"] += 2
    return "total_size"


@fault("index")
def index_points_to_the_wrong_shard(folder: Path) -> str:
    name = f"{LAYER}.mlp.down_proj.weight_packed"
    with edit_json(folder / INDEX_NAME) as index:
        index["weight_map"][name] = "model-00001-of-00004.safetensors"
    return f"{name} is listed in model-00001-of-00004.safetensors, but is stored in model-00002-of-00004.safetensors"


@fault("index")
def shard_that_the_index_does_not_name(folder: Path) -> str:
    shutil.copyfile(folder / "model-00004-of-00004.safetensors", folder / "consolidated.safetensors")
    with edit_json(folder / MANIFEST) as manifest:
        manifest["files"]["consolidated.safetensors"] = manifest["files"]["model-00004-of-00004.safetensors"]
    return "model.embed_tokens.weight is stored in consolidated.safetensors and in model-00004-of-00004.safetensors"


@fault("index")
def index_entry_that_is_no_name(folder: Path) -> str:
    with edit_json(folder / INDEX_NAME) as index:
        index["weight_map"]["model.norm.weight"] = ["model-00004-of-00004.safetensors"]
    return "model.norm.weight is listed in ['model-00004-of-00004.safetensors'], which is not a shard"


# tokenizer, side_files


@fault("tokenizer", "side_files")  # it was in the source
def tokenizer_missing(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "vocabulary"


@fault("tokenizer", "side_files")  # it differs from the source's
def generation_config_cut_off(folder: Path) -> str:
    path = folder / "generation_config.json"
    path.write_text(path.read_text()[:-5])
    return "generation_config.json is not readable JSON"


@fault("tokenizer", "side_files")  # it was in the source
def chat_template_missing_after_calibration_on_chats(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink()
    with edit_json(folder / MANIFEST) as manifest:
        manifest["calibration"]["framing"] = "chat"
    return "chat template"


@fault("side_files")
def chat_template_missing(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink()
    return "chat_template.jinja is missing"


@fault("side_files")
def tokenizer_changed(folder: Path) -> str:
    with edit_json(folder / "tokenizer_config.json") as settings:
        settings["eos_token"] = "<s>"
    return "tokenizer_config.json differs"


# names, untouched, config_source


@fault("names")
def norm_lost(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        del tensors["model.norm.weight"]
    return "model.norm.weight is missing"


@fault("names", on="gemma4-mlp-ct")
def v_proj_invented(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{FULL_LAYER}.self_attn.v_proj.weight"] = tensors[f"{FULL_LAYER}.self_attn.k_proj.weight"]
    return f"{FULL_LAYER}.self_attn.v_proj.weight is added"


@fault("names")
def norm_widened(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        norm = tensors["model.norm.weight"]
        values = torch.frombuffer(norm.data, dtype=torch.bfloat16).float()
        norm.dtype, norm.data = "F32", bytes_of(values)
    return "model.norm.weight is F32 [64], but the source has BF16 [64]"


@fault("untouched")
def byte_of_a_norm_changed(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.input_layernorm.weight"].data[3] ^= 1
    return f"{LAYER}.input_layernorm.weight differs from the source, from byte 3 of 128 on"


@fault("untouched", on="gemma4-mlp-ct")
def layer_scalar_reset(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{FULL_LAYER}.layer_scalar"].data[:] = bytes_of(torch.ones(1, dtype=torch.bfloat16))
    return f"{FULL_LAYER}.layer_scalar differs"


@fault("config_source")
def head_dim_changed(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["head_dim"] = 32
    return "head_dim is 32, but the source has 16"


@fault("config_source", on="gemma4-mlp-ct")
def nested_key_dropped(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["text_config"]["global_head_dim"]
    return "text_config.global_head_dim is missing"


# manifest, hashes, marlin


@fault("manifest")
def manifest_cut_off(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-40])
    return "not readable JSON"


@fault("manifest")
def manifest_without_a_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["recipe"]
    return "has a missing or wrong key (recipe is missing)"


@fault("manifest")
def manifest_with_a_member_that_is_no_name(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded_group(manifest, "mlp.down_proj")["members"] = [7]
    return "members.0 is wrong: Input should be a valid string)"


@fault("manifest")
def manifest_of_the_other_layout(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["format"] = "modelopt"
    return "format is modelopt"


@fault("manifest")
def manifest_of_an_unknown_quantizer(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["quantizer"] = "magic"
    return "quantizer magic is unknown"


@fault("manifest")
def manifest_of_another_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["scheme"] = "nvfp4-a16"
    return "down_proj is nvfp4, but recipe nvfp4-full makes it nvfp4-a16"


@fault("manifest")
def manifest_of_a_narrower_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["modules"] = ["mlp"]
    return "_proj is nvfp4, but recipe nvfp4-full makes it not quantized"


@fault("manifest", on="gemma4-mlp-ct")
def manifest_of_a_recipe_that_matches_nothing(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["modules"] = ["re:.*ffn.*"]
    return "pattern 're:.*ffn.*' matches no matrix"


@fault("manifest")
def manifest_without_a_group(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["layers"][1]["groups"][f"{LAYER}.mlp.down_proj"]
    return f"{LAYER}.mlp.down_proj is quantized but not recorded"


@fault("manifest")
def manifest_with_swapped_files(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        first, second = manifest["layers"][:2]
        first["file"], second["file"] = second["file"], first["file"]
    return "lies in ['model-00001-of-00004.safetensors'], not in model-00002-of-00004.safetensors"


@fault("marlin")
def flushed_blocks_claimed_wrongly(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded_group(manifest, "mlp.down_proj")["marlin_flushed_blocks"] = 3
    return f"{LAYER}.mlp.down_proj: 0 blocks, but the manifest records 3"


@fault("hashes")
def hash_wrong(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["files"]["model-00002-of-00004.safetensors"] = "0" * 64
    return "model-00002-of-00004.safetensors has sha256"


@fault("hashes")
def shard_without_a_hash(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["files"]["model-00002-of-00004.safetensors"]
    return "model-00002-of-00004.safetensors is not in the manifest"


@fault("hashes", "untouched")  # the byte belongs to a tensor that is not quantized
def byte_flipped_after_the_run(folder: Path) -> str:
    flip_last_byte(folder / "model-00004-of-00004.safetensors")
    return "model-00004-of-00004.safetensors has sha256"
