"""Faults of the configs of checkpoints with attention in FP8 beside MLPs in NVFP4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verify.breaking import (
    FULL_LAYER,
    GEMMA,
    HF_QUANT_CONFIG,
    LAYER,
    Fault,
    edit_ct,
    edit_json,
    listing,
)

FAULTS: list[Fault] = []
fault = listing(FAULTS)
V, O_ = (f"{LAYER}.self_attn.{leaf}_proj" for leaf in "vo")
CT, MO = "llama-fp8-ct", "llama-fp8-mo"


# configs of compressed-tensors


def _group_with(config: dict[str, Any], bits: int) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = config["config_groups"]
    return next(group for group in groups.values() if group["weights"]["num_bits"] == bits)


def _name_of(config: dict[str, Any], bits: int) -> str:
    return next(name for name, group in config["config_groups"].items() if group["weights"]["num_bits"] == bits)


@fault("layout", "config", on=CT)  # vLLM rounds no inputs under the form of the whole config, and finds no scheme
def fp8_group_without_its_format(folder: Path) -> str:
    edit_ct(folder, lambda config: _group_with(config, 8).update(format=None))
    return "has format mixed-precision, not float-quantized"


@fault("layout", on=CT)
def fp8_group_in_the_form_of_nvfp4(folder: Path) -> str:
    edit_ct(folder, lambda config: _group_with(config, 8).update(format="nvfp4-pack-quantized"))
    return "has format nvfp4-pack-quantized, not float-quantized"


@fault("layout", on="gemma4-fp8-ct")
def nvfp4_group_in_the_form_of_fp8(folder: Path) -> str:
    edit_ct(folder, lambda config: _group_with(config, 4).update(format="float-quantized"))
    return "has format float-quantized, not nvfp4-pack-quantized"


@fault("layout", on=CT)
def form_of_one_group_for_the_whole_config(folder: Path) -> str:
    edit_ct(folder, lambda config: config.update(format="nvfp4-pack-quantized"))
    return "the config has format nvfp4-pack-quantized, not mixed-precision"


@fault("layout")
def mixed_form_of_a_config_with_one_group(folder: Path) -> str:
    edit_ct(folder, lambda config: config.update(format="mixed-precision"))
    return "the config has format mixed-precision, not nvfp4-pack-quantized"


@fault("config", on=CT)
def fp8_group_with_static_inputs(folder: Path) -> str:
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    edit_ct(folder, lambda config: _group_with(config, 8).update(input_activations=inputs))
    return "self_attn.qkv_proj is quantized, but config.json makes it FP8 with calibrated inputs"


@fault("config", on=CT)
def projection_moved_to_the_other_group(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        fp8 = _group_with(config, 8)
        fp8["targets"] = [target.replace("|o)_proj", ")_proj") for target in fp8["targets"]]
        _group_with(config, 4)["targets"].append(r"re:.*self_attn\.o_proj$")

    edit_ct(folder, edit)
    return "model.layers.0.self_attn.o_proj is stored in FP8 W8A8, but config.json makes it nvfp4"


@fault("config", on="gemma4-fp8-ct")
def mlp_of_one_layer_moved_to_the_other_group(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        groups = config["config_groups"]
        fp8 = _name_of(config, 8)
        groups[fp8]["targets"].append(r"re:.*\.layers\.3\.mlp\..*")
        config["config_groups"] = {fp8: groups.pop(fp8), **groups}

    edit_ct(folder, edit)
    return f"{GEMMA}.3.mlp.gate_proj is stored in NVFP4 W4A4, but config.json makes it fp8"


@fault("config", on=CT)
def ignore_that_reaches_attention(folder: Path) -> str:
    edit_ct(folder, lambda config: config["ignore"].append("re:.*self_attn.*"))
    return "model.layers.0.self_attn.qkv_proj is quantized, but config.json makes it unquantized"


# configs of modelopt


def _edit_lists(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change `quantized_layers` in both files."""
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        edit(config["quantization_config"]["quantized_layers"])
        edit(nested["quantization"]["quantized_layers"])


@fault("config", on=MO)
def module_missing_from_the_list(folder: Path) -> str:
    _edit_lists(folder, lambda listed: listed.pop(O_))
    return f"{O_} is quantized, but config.json makes it unquantized"


@fault("config", on="gemma4-fp8-mo")  # vLLM reads it by q_proj, others do not
def member_of_a_fused_layer_missing_from_the_list(folder: Path) -> str:
    _edit_lists(folder, lambda listed: listed.pop(f"{FULL_LAYER}.self_attn.k_proj"))
    return f"{FULL_LAYER}.self_attn.k_proj is quantized, but quantized_layers does not list it"


@fault("config", on="gemma4-fp8-mo")  # llama.cpp's converter refuses it
def listed_module_that_does_not_exist(folder: Path) -> str:
    _edit_lists(folder, lambda listed: listed.update({f"{FULL_LAYER}.self_attn.v_proj": {"quant_algo": "FP8"}}))
    return f"quantized_layers lists {FULL_LAYER}.self_attn.v_proj, which is not stored"


@fault("config", on=MO)
def module_listed_with_the_other_algorithm(folder: Path) -> str:
    _edit_lists(folder, lambda listed: listed.update({O_: {"quant_algo": "NVFP4", "group_size": 16}}))
    return f"{O_} is stored in FP8 W8A8, but config.json makes it nvfp4"


@fault("config", on=MO)
def members_listed_with_two_algorithms(folder: Path) -> str:
    _edit_lists(folder, lambda listed: listed.update({V: {"quant_algo": "NVFP4", "group_size": 16}}))
    return f"{LAYER}.self_attn.qkv_proj is quantized, but config.json makes it refused"


@fault("layout", on=MO)
def lists_that_differ(folder: Path) -> str:
    with edit_json(folder / HF_QUANT_CONFIG) as nested:
        nested["quantization"]["quantized_layers"][O_]["quant_algo"] = "NVFP4"
    return (
        f"quantized_layers has {{'quant_algo': 'NVFP4'}} for {O_} in {HF_QUANT_CONFIG}, "
        f"but {{'quant_algo': 'FP8'}} by config.json"
    )


@fault("layout", "config", on=MO)  # vLLM refuses a mixed config without a list
def list_missing(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["quantization_config"]["quantized_layers"]
    return "quantized_layers has {'quant_algo'"


@fault("config", on=MO)
def exclusion_that_reaches_attention(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        config["quantization_config"]["ignore"].append("*self_attn*")
        nested["quantization"]["exclude_modules"].append("*self_attn*")
    return "model.layers.0.self_attn.qkv_proj is quantized, but config.json makes it unquantized"
