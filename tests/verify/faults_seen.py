"""Faults of files that belong to another model, or to none."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.tiny_tokenizer import write_tiny_tokenizer
from verify.breaking import LAYER, MANIFEST, Fault, edit_json, edit_tensors, listing

FAULTS: list[Fault] = []
fault = listing(FAULTS)


# tokenizer


@fault("tokenizer", "side_files")  # nor is it the source's
def tokenizer_of_a_larger_model(folder: Path) -> str:
    write_tiny_tokenizer(folder, "llama", vocab_size=700)
    return "with id 699, but the model's vocabulary has 512"


@fault("tokenizer", "side_files")
def tokenizer_of_another_family(folder: Path) -> str:
    # Its special tokens are the last ones, as Qwen's and Llama 3's are: id 2 is a character.
    write_tiny_tokenizer(folder, "qwen")
    with edit_json(folder / "tokenizer.json") as tokenizer:
        for entry in tokenizer["added_tokens"]:
            old, entry["id"] = entry["id"], 511 - entry["id"]
            tokenizer["model"]["vocab"] = {
                token: old if number == entry["id"] else number for token, number in tokenizer["model"]["vocab"].items()
            } | {entry["content"]: entry["id"]}
    return "which is not a special token in tokenizer.json"


@fault("tokenizer", "side_files")
def settings_of_another_tokenizer(folder: Path) -> str:
    with edit_json(folder / "tokenizer_config.json") as settings:
        settings["eos_token"] = {"content": "<|eot_id|>"}
    return "tokenizer_config.json has eos_token '<|eot_id|>', which tokenizer.json does not contain"


@fault("tokenizer", "side_files", on="gemma2-a16-ct")
def tokenizer_that_adds_no_bos_any_more(folder: Path) -> str:
    with edit_json(folder / "tokenizer_config.json") as settings:
        settings["add_bos_token"] = False
    return "tokenizer_config.json has add_bos_token false: gemma2 models collapse on text without BOS"


@fault("side_files")
def generation_config_of_another_model(folder: Path) -> str:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 128009], "temperature": 0.6}))
    return "generation_config.json differs"


@fault("side_files", on="gemma4-ct")
def chat_template_of_another_model(folder: Path) -> str:
    write_tiny_tokenizer(folder.parent / "llama", "llama")
    shutil.copyfile(folder.parent / "llama" / "chat_template.jinja", folder / "chat_template.jinja")
    return "chat_template.jinja differs"


# other weights


@fault("index", "names")  # nor has the source such tensors
def adapter_left_in_the_folder(folder: Path) -> str:
    save_file({f"base_model.{LAYER}.mlp.down_proj.lora_A.weight": torch.ones(4, 128)}, folder / "adapter.safetensors")
    (folder / "adapter.safetensors").rename(folder / "adapter_model.safetensors")
    with edit_json(folder / MANIFEST) as manifest:
        blob = (folder / "adapter_model.safetensors").read_bytes()
        manifest["files"]["adapter_model.safetensors"] = hashlib.sha256(blob).hexdigest()
    return "adapter_model.safetensors is not in the index"


@fault("index")
def adapter_settings_left_in_the_folder(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return "adapter_config.json lies beside the shards"


@fault("index")
def pickled_weights_left_in_the_folder(folder: Path) -> str:
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "pytorch_model.bin")
    return "pytorch_model.bin lies beside the shards"


# architecture


# The source says otherwise, and the recipe refuses such a model.
@fault("architecture", "manifest", "config_source")
def fewer_layers_in_the_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["num_hidden_layers"] = 2
    return "num_hidden_layers is 2, but layer 2 is stored"


@fault("architecture", "config_source")
def more_layers_in_the_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["num_hidden_layers"] = 5
    return "num_hidden_layers is 5, but layer 3 is not stored (2 missing)"


@fault("architecture", "index", "names", on="llama-foreign")  # its shard is empty now, and the source has it
def layer_lost(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            del tensors[name]
    return "num_hidden_layers is 3, but layer 1 is not stored (1 missing)"


@fault("architecture", "config_source")
def head_untied_in_the_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["tie_word_embeddings"] = False
    return "tie_word_embeddings is false, but no head is stored"


@fault("protected", "config_source", on="untied-a16-ct")  # the source says otherwise
def head_tied_in_the_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["tie_word_embeddings"] = True
    return "lm_head.weight differs from model.embed_tokens.weight, although the config ties them"


@fault("architecture", "tokenizer", "config_source")  # the tokenizer has more tokens than that, too
def vocabulary_cut_in_the_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["vocab_size"] = 500
    return "vocab_size is 500, but model.embed_tokens.weight has 512 rows"


@fault("config_source")
def rope_theta_changed(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["rope_parameters"]["rope_theta"] = 500000.0
    return "rope_parameters.rope_theta is 500000.0, but the source has 10000.0"


@fault("config_source", on="llama-foreign")
def rope_scaling_lost_by_another_tool(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["rope_parameters"]
    return "rope_parameters is missing"


@fault("config_source", on="llama-foreign")
def dtype_float32_in_the_config_alone(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["dtype"] = "float32"
    return "dtype is 'float32', but the source has 'bfloat16'"


@fault("config_source", on="gemma4-ct")
def full_attention_layers_called_sliding(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["text_config"]["layer_types"] = ["sliding_attention"] * 6
    return "text_config.layer_types is"
