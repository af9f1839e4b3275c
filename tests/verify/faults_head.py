"""Faults of a quantized head."""

from __future__ import annotations

from pathlib import Path

import torch
from verify.breaking import HF_QUANT_CONFIG, MANIFEST, Fault, change_scalar, edit_ct, edit_json, edit_tensors, listing

FAULTS: list[Fault] = []
fault = listing(FAULTS)
GEMMA_EMBEDDING = "model.language_model.embed_tokens.weight"


@fault("weights", on="gemma4-head-ct")
def head_of_other_rows(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        codes = tensors["lm_head.weight_packed"]
        codes.data[:] = codes.data[64:] + codes.data[:64]
    return "lm_head: "


@fault("weights", on="llama-head-ct")
def head_with_a_scale_of_another_row(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        scales = tensors["lm_head.weight_scale"]
        scales.data[:4] = scales.data[4:8]
    return "1 of 512 row scales differ from the quantizer's (first at row 0: "


@fault("untouched", on="gemma4-head-ct")
def embedding_changed_beside_the_head(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[GEMMA_EMBEDDING].data[6] ^= 1
    return f"{GEMMA_EMBEDDING} differs from the source"


@fault("names", on="gemma4-head-ct")
def head_with_a_tensor_beside_it(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors["lm_head.bias"] = tensors["model.language_model.norm.weight"]
    return "lm_head.bias is added"


@fault("architecture", "config_source", on="gemma4-head-ct")
def head_tied_again_in_the_text_config(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["text_config"]["tie_word_embeddings"] = True
    return "lm_head is quantized, but config.json ties it to the embedding"


@fault("architecture", "config_source", on="llama-head-ct")
def head_tied_again(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["tie_word_embeddings"] = True
    return "lm_head is quantized, but config.json ties it to the embedding"


@fault("config_source", on="gemma4-head-ct")
def text_config_that_does_not_untie_the_head(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["text_config"]["tie_word_embeddings"]
    return "text_config.tie_word_embeddings is missing"


@fault("protected", "manifest", on="llama-head-ct")
def head_that_the_recipe_does_not_quantize(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["recipe"]["head"]
    return "lm_head (head) is quantized"


@fault("manifest", on="llama-head-ct")
def head_not_recorded(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["head"]
    return "lm_head is quantized but not recorded"


@fault("manifest", on="llama-head-ct")
def head_recorded_in_another_file(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["head"]["file"] = "model-00001-of-00005.safetensors"
    return "lm_head lies in"


@fault("manifest", "input_scales", on="gemma4-head-ct")  # no norm gives that bound
def bound_recorded_of_a_layer(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        group = next(iter(manifest["layers"][1]["groups"].values()))
        group["input_bound"] = 3.0
    return "a bound of its inputs is recorded, which only the head has"


@fault("input_scales", on="llama-head-mo")
def input_scale_of_the_head_halved(folder: Path) -> str:
    return change_scalar(folder, ["lm_head.input_scale"], lambda value: value / 2)


@fault("input_scales", on="llama-head-mo")
def bound_and_input_scale_of_the_head_too_small(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["head"]["group"]["input_bound"] /= 4
    change_scalar(folder, ["lm_head.input_scale"], lambda value: value / 4)
    return "lm_head: the bound of its inputs is"


@fault("input_scales", "untouched", on="llama-head-mo")  # the norm is not the source's either
def norm_before_the_head_doubled(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        norm = tensors["model.norm.weight"]
        doubled = 2 * torch.frombuffer(norm.data, dtype=torch.bfloat16)
        norm.data[:] = bytes(doubled.view(torch.uint8).numpy())
    return "lm_head: the bound of its inputs is"


@fault("weight_scales", "weights", on="llama-head-mo")  # nor does it decode to the source's weights
def weight_scale_of_the_head_doubled(folder: Path) -> str:
    return change_scalar(folder, ["lm_head.weight_scale"], lambda value: 2 * value)


@fault("matrices", on="llama-head-mo")
def head_without_its_codes_scale(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        del tensors["lm_head.weight_scale"]
    return "lm_head lacks weight_scale"


@fault("config", on="llama-head-ct")
def head_ignored(folder: Path) -> str:
    edit_ct(folder, lambda config: config["ignore"].append("re:.*lm_head.*"))
    return "lm_head is quantized, but config.json makes it unquantized"


@fault("config", on="gemma4-head-ct")
def head_named_as_one_class_alone_builds_it(folder: Path) -> str:
    def rename(config: dict[str, dict[str, dict[str, list[str]]]]) -> None:
        for group in config["config_groups"].values():
            group["targets"] = [
                target.replace("re:.*lm_head$", "re:language_model.lm_head$") for target in group["targets"]
            ]

    edit_ct(folder, rename)
    return "lm_head is quantized, but config.json makes it refused"


@fault("config", on="llama-head-mo")
def head_not_listed(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        for one in (config["quantization_config"], nested["quantization"]):
            del one["quantized_layers"]["lm_head"]
    return "lm_head is quantized, but config.json makes it unquantized"


@fault("marlin", on="gemma4-head-ct")
def flushed_blocks_of_the_head_miscounted(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["head"]["group"]["marlin_flushed_blocks"] += 7
    return "lm_head: 0 blocks, but the manifest records 7"


@fault("global_scales", "weight_scales", "weights", on="gemma4-head-ct")  # nor the recorded one, nor the source's
def global_scale_of_the_head_negative(folder: Path) -> str:
    return change_scalar(folder, ["lm_head.weight_global_scale"], lambda value: -value)
