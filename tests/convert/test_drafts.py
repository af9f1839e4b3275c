"""Draft layers (MTP) are copied byte for byte and stay unquantized under the names that vLLM builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.convert.checks import check_conversion
from nvquant.convert.config import output_configs
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.recipe.roles import Role
from nvquant.recipe.vllm_rules import UNQUANTIZED, compressed_tensors_verdict, modelopt_verdict
from nvquant.verify.structure import verify_structure
from support.conversions import edit_config, experts_in_bf16, planned, raw, tensors_in
from support.tiny_hybrids import add_tensors, draft_layer, tiny_delta_net, tiny_latent
from support.tiny_models import tiny_gemma4, tiny_llama
from torch import Tensor

ONE_SHARD = {"shards": 1}
FC = {"mtp.fc.weight": torch.full((64, 128), 0.25, dtype=torch.bfloat16)}


def qwen(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    tiny_delta_net(folder)
    return edit_config(folder, mtp_num_hidden_layers=1), draft_layer(folder, "model.layers.2.", "mtp.layers.0.") | FC


def qwen_with_experts(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    source, more = qwen(folder)
    experts = {
        name.replace(".mlp.", f".mlp.experts.{expert}."): value
        for name, value in more.items()
        if ".mlp." in name
        for expert in range(2)
    }
    return source, {name: value for name, value in more.items() if ".mlp." not in name} | experts


def deepseek(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Its draft layer is stored as one more layer of the decoder."""
    tiny_latent(folder)
    more = draft_layer(folder, "model.layers.2.", "model.layers.3.")
    more |= {"model.layers.3.eh_proj.weight": FC["mtp.fc.weight"].clone()}
    more |= {"model.layers.3.shared_head.head.weight": torch.ones(512, 64, dtype=torch.bfloat16)}
    more |= {"model.layers.3.embed_tokens.weight": torch.ones(512, 64, dtype=torch.bfloat16)}
    return edit_config(folder, num_nextn_predict_layers=1), more


def mimo(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """vLLM builds `model.mtp_layers.0` as the layer behind the decoder's."""
    tiny_llama(folder, **ONE_SHARD)
    more = draft_layer(folder, "model.layers.2.", "model.mtp_layers.0.")
    more |= {"model.mtp_layers.0.input_proj.weight": FC["mtp.fc.weight"].clone()}
    return edit_config(folder, num_nextn_predict_layers=1), more


def of_a_vision_model(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    tiny_gemma4(folder, **ONE_SHARD)
    return folder, draft_layer(folder, "model.language_model.layers.0.", "mtp.layers.0.")


def drafter_beside(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    tiny_llama(folder, **ONE_SHARD)
    return folder, draft_layer(folder, "model.layers.2.", "eagle.layers.0.")


SOURCES: dict[str, tuple[Callable[[Path], tuple[Path, dict[str, Tensor]]], list[str]]] = {
    "qwen3.5": (qwen, ["mtp.layers.0.mlp.gate_up_proj", "mtp.layers.0.self_attn.qkv_proj", "mtp.fc"]),
    "qwen3.5-moe": (qwen_with_experts, ["mtp.layers.0.mlp.experts.0.gate_proj", "mtp.fc"]),
    "deepseek": (deepseek, ["model.layers.3.self_attn.fused_qkv_a_proj", "model.layers.3.mtp_block.mlp.down_proj"]),
    "mimo": (mimo, ["model.layers.3.self_attn.qkv_proj", "model.mtp_layers.3.mtp_block.mlp.down_proj"]),
    "vision": (of_a_vision_model, ["mtp.layers.0.mlp.gate_up_proj"]),
    "eagle": (drafter_beside, ["eagle.layers.0.mlp.down_proj"]),
}


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("name", SOURCES)
def test_draft_layers_are_copied_and_left_out_of_the_config(name: str, layout: str, tmp_path: Path) -> None:
    write, built = SOURCES[name]
    source, more = write(tmp_path / "source")
    add_tensors(source, more)
    plan = planned(source, experts_in_bf16("nvfp4-a16"), layout)
    assert {plan.selection.roles[tensor] for tensor in more} == {Role.DRAFT}
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    stored = tensors_in(tmp_path / "out")
    assert {tensor: raw(stored[tensor]) for tensor in more} == {tensor: raw(value) for tensor, value in more.items()}
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    verdict = modelopt_verdict if layout == "modelopt" else compressed_tensors_verdict
    assert {layer: verdict(layer, config) for layer in built} == dict.fromkeys(built, UNQUANTIZED)
    report = verify_structure(tmp_path / "out", source)
    assert [check for check in report.checks if not check.passed] == []


@pytest.mark.parametrize("name", ["qwen3.5", "deepseek"])
def test_draft_layers_do_not_enter_the_walk(name: str, tmp_path: Path) -> None:
    source, more = SOURCES[name][0](tmp_path / "source")
    before = planned(source, experts_in_bf16("nvfp4-full"))
    add_tensors(source, more)
    plan = planned(source, experts_in_bf16("nvfp4-full"))
    assert plan.layers == before.layers == [0, 1, 2]
    assert list(plan.matrices) == list(before.matrices)
    assert not set(more) & {tensor for tensors in plan.tensors_by_layer().values() for tensor in tensors}


def test_layers_that_the_config_does_not_count_are_refused(tmp_path: Path) -> None:
    source = edit_config(tiny_llama(tmp_path / "source"), num_hidden_layers=2)
    with pytest.raises(InputError, match=r"stores model\.layers\.2\..*describes fewer decoder layers"):
        planned(source, "nvfp4-a16")


def test_a_config_that_omits_draft_layers_fails_verify(tmp_path: Path) -> None:
    """As other tools write it: `Linear` is the target, and no entry of the ignore list matches the draft layer."""
    source, more = qwen(tmp_path / "source")
    add_tensors(source, more)
    plan = planned(source, "nvfp4-a16")
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    (tmp_path / "out" / "nvquant_manifest.json").unlink()
    config = output_configs(plan)["config.json"]
    quantization = config["quantization_config"]
    assert any("mtp" in entry for entry in quantization["ignore"])
    quantization["ignore"] = [entry for entry in quantization["ignore"] if "mtp" not in entry]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    report = verify_structure(tmp_path / "out", source)
    faults = {check.name: check.finding.faults for check in report.checks if not check.passed}
    assert any("mtp.layers.0.mlp.gate_up_proj is not quantized" in fault for fault in faults["config"])


# Other tensors that the model's class does not read

FOREIGN = {
    "mtp.layers.0.mlp.experts.gate_up_proj": torch.full((2, 64, 64), 0.5, dtype=torch.bfloat16),
    "model.ngram_embeddings.0.weight": torch.full((100, 64), 0.5, dtype=torch.bfloat16),
    "model.ngram_proj.weight": torch.full((64, 64), 0.25, dtype=torch.bfloat16),
    "medusa_head.0.weight": torch.full((512, 64), 0.125, dtype=torch.bfloat16),
}
BUILT = ["model.ngram_proj", "medusa_head.0", "mtp.layers.0.mlp.experts", "mtp.fc"]


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_tensors_that_the_class_does_not_read_are_copied_listed_and_left_unquantized(
    layout: str, tmp_path: Path
) -> None:
    source, more = qwen(tmp_path / "source")
    more |= FOREIGN
    add_tensors(source, more)
    plan = planned(source, "nvfp4-full", layout)
    assert set(check_conversion(plan)) == set(more)
    plan = planned(source, "nvfp4-a16", layout)
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    stored = tensors_in(tmp_path / "out")
    assert {tensor: raw(stored[tensor]) for tensor in more} == {tensor: raw(value) for tensor, value in more.items()}
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    verdict = modelopt_verdict if layout == "modelopt" else compressed_tensors_verdict
    assert {layer: verdict(layer, config) for layer in BUILT} == dict.fromkeys(BUILT, UNQUANTIZED)
    assert [check for check in verify_structure(tmp_path / "out", source).checks if not check.passed] == []


@pytest.mark.parametrize("name", ["model.ngram_proj.weight", "mtp.layers.0.mlp.experts.gate_up_proj"])
def test_a_tensor_that_was_neither_converted_nor_copied_fails_verify(name: str, tmp_path: Path) -> None:
    source, _ = qwen(tmp_path / "source")
    plan = planned(source, "nvfp4-a16")
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    add_tensors(source, {name: FOREIGN[name]})
    faults = {
        check.name: check.finding.faults
        for check in verify_structure(tmp_path / "out", source).checks
        if not check.passed
    }
    assert faults["names"] == [f"{name} is missing"]


def test_a_matrix_in_a_layer_that_the_class_does_not_read_is_not_quantized(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", **ONE_SHARD)
    add_tensors(source, {"model.layers.1.adapter.down_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16)})
    with pytest.raises(
        InputError, match=r"stores model\.layers\.1\.adapter\.down_proj\.weight, which LlamaForCausalLM does not read"
    ):
        check_conversion(planned(source, "nvfp4-full"))
