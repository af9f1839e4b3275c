"""config.json of the output: the source's own, and a quantization config that says what the tensors are."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import transformers
from nvquant.convert.config import disagreements, output_configs, quantization_config
from nvquant.recipe.roles import Role
from nvquant.recipe.schema import KvCache, QuantizeEntry, Recipe
from support.conversions import COMPRESSED_TENSORS, MODELOPT, Conversions, TinyModels, planned, recipe_for
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.tiny_models import WRITERS, tiny_gemma4

RECIPES = ("nvfp4", "nvfp4-full", "nvfp4-a16")
LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip


def entries(config: dict[str, Any]) -> list[str]:
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    return [*targets, *config["ignore"]] if config["quant_method"] == "compressed-tensors" else config["ignore"]


def served_name(module: str) -> str:
    """What vLLM's multimodal class calls a module, fused."""
    parent, _, leaf = module.rpartition(".")
    name = f"{parent}.{FUSED.get(leaf, leaf)}"
    for old, new in (("model.language_model.", "language_model.model."), ("model.vision_tower", "vision_tower")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def is_quantized(name: str, config: dict[str, Any]) -> bool:
    """vLLM's reading, written once more: regular expressions from the start of the name; globs, of which `X*` is
    read as `X` and `X.*`."""
    if config["quant_method"] == "modelopt":
        globs = [g for e in config["ignore"] for g in ([e[:-1], f"{e[:-1]}.*"] if re.search(r"[^.]\*$", e) else [e])]
        return not any(fnmatchcase(name, glob) or glob in name for glob in globs) and "vision_tower" not in name

    def matches(patterns: list[str]) -> bool:
        return any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)

    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    return matches(targets) and not matches(config["ignore"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", WRITERS)
def test_exactly_the_quantized_matrices_are_read_as_such(tiny: TinyModels, name: str, recipe: str, layout: str) -> None:
    plan = planned(tiny(name), recipe_for(name, recipe), layout)
    config = quantization_config(plan)
    assert disagreements(plan, config) == []
    unread = (Role.EMBEDDING, Role.EXPERT)
    for tensor, info in plan.source.infos().items():
        if len(info.shape) == 2 and tensor.endswith(".weight") and plan.selection.roles[tensor] not in unread:
            module = tensor.removesuffix(".weight")
            assert is_quantized(served_name(module), config) == (module in plan.matrices), module
    assert not is_quantized("language_model.lm_head", config)
    assert not is_quantized("lm_head", config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_31b_is_described_by_patterns_and_not_by_lists(tmp_path: Path, layout: str) -> None:
    for recipe in RECIPES:
        config = quantization_config(planned(write_synthetic_gemma4(tmp_path / recipe), recipe, layout))
        assert len(json.dumps(config)) < 2500
        assert not [entry for entry in entries(config) if re.search(r"layers\.[0-9]", entry)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_entry_may_begin_anywhere_in_a_name(tiny: TinyModels, name: str) -> None:
    """vLLM renames modules of multimodal models, and does not rename in regular expressions."""
    for recipe in RECIPES:
        mine = recipe_for(name, recipe)
        assert all(e.startswith("re:.*") for e in entries(quantization_config(planned(tiny(name), mine))))
        assert all(e.startswith("*") for e in entries(quantization_config(planned(tiny(name), mine, MODELOPT))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_entry_names_q_or_k_without_v(tiny: TinyModels, layout: str) -> None:
    """On full layers, which have no v_proj, vLLM refuses a fused module of which only some members are ignored."""
    for recipe in RECIPES:
        config = quantization_config(planned(tiny("gemma4"), recipe, layout))
        for entry in entries(config):
            pattern = entry.removeprefix("re:")
            matched = {
                leaf: bool(re.match(pattern, f"x.layers.5.self_attn.{leaf}_proj"))
                if entry.startswith("re:")
                else fnmatchcase(f"x.layers.5.self_attn.{leaf}_proj", pattern)
                for leaf in ("q", "k", "v", "qkv")
            }
            if matched["q"] or matched["k"]:
                assert all(matched.values()), entry


def test_towers_and_projectors_are_listed(tiny: TinyModels) -> None:
    for layout in LAYOUTS:
        ignored = " ".join(quantization_config(planned(tiny("gemma4_e2b"), layout=layout))["ignore"])
        for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "per_layer", "lm_head"):
            assert part in ignored


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_text", "gemma4_e2b"])
def test_config_json_is_the_sources_key_by_key_with_one_key_more(
    tiny: TinyModels, done: Conversions, name: str, layout: str
) -> None:
    def pairs(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text(), object_pairs_hook=list)

    before, after = pairs(tiny(name)), pairs(done(name, layout=layout))
    assert after[: len(before)] == before
    assert [key for key, _ in after[len(before) :]] == ["quantization_config"]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "gemma4_e2b", "gemma4_unified"])
def test_google_form_of_the_config_is_kept(done: Conversions, name: str) -> None:
    text = (done(name) / "config.json").read_text()
    assert "global_head_dim" in text
    assert "num_global_key_value_heads" in text
    assert "per_layer_config" not in text


def test_transformers_form_of_the_config_is_kept_too(tiny: TinyModels, tmp_path: Path) -> None:
    transformers.AutoConfig.from_pretrained(tiny("gemma4")).save_pretrained(tmp_path)
    for shard in tiny("gemma4").glob("model*"):
        (tmp_path / shard.name).hardlink_to(shard)
    before = json.loads((tmp_path / "config.json").read_text())
    before["architectures"] = ["Gemma4ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert "per_layer_config" in before["text_config"]
    after = output_configs(planned(tmp_path))["config.json"]
    assert after.pop("quantization_config")
    assert after == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_tensors_validates_what_is_written(tiny: TinyModels, recipe: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    written = quantization_config(planned(tiny("gemma4"), recipe))
    read = QuantizationConfig.model_validate(written)
    (group,) = read.config_groups.values()
    assert (read.format, read.quant_method) == ("nvfp4-pack-quantized", "compressed-tensors")
    assert (group.weights.num_bits, group.weights.group_size, group.weights.strategy) == (4, 16, "tensor_group")
    if recipe == "nvfp4-a16":
        assert group.input_activations is None
    else:
        assert group.input_activations.dynamic == "local"
        assert (group.input_activations.num_bits, group.input_activations.group_size) == (4, 16)


@pytest.mark.parametrize(("recipe", "algorithm"), [("nvfp4-full", "NVFP4"), ("nvfp4-a16", "W4A16_NVFP4")])
def test_modelopt_says_the_same_in_both_of_its_files(tiny: TinyModels, recipe: str, algorithm: str) -> None:
    files = output_configs(planned(tiny("gemma4"), recipe, MODELOPT))
    assert set(files) == {"config.json", "hf_quant_config.json"}
    one, other = files["config.json"]["quantization_config"], files["hf_quant_config.json"]["quantization"]
    assert one["quant_algo"] == other["quant_algo"] == algorithm
    assert one["ignore"] == other["exclude_modules"]
    assert other["group_size"] == 16
    assert one["quant_method"] == "modelopt"


def own(*quantize: tuple[str, str], **more: Any) -> Recipe:
    rows = tuple(QuantizeEntry(modules=(module,), scheme=scheme) for module, scheme in quantize)
    return Recipe(name="own", quantize=rows, **more)


def test_an_fp8_cache_is_said_in_all_files(tiny: TinyModels) -> None:
    recipe = own(("mlp", "nvfp4"), kv_cache=KvCache(dtype="fp8"))
    scheme = quantization_config(planned(tiny("llama"), recipe))["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
    files = output_configs(planned(tiny("llama"), recipe, MODELOPT))
    assert files["config.json"]["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert files["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_a_mixed_recipe_has_a_group_for_each_scheme(tiny: TinyModels) -> None:
    config = quantization_config(planned(tiny("gemma4"), own(("mlp", "nvfp4"), ("attention", "nvfp4-a16"))))
    weight_only = {name: group["input_activations"] is None for name, group in config["config_groups"].items()}
    assert sorted(weight_only.values()) == [False, True]
    targets = {weight_only[name]: " ".join(group["targets"]) for name, group in config["config_groups"].items()}
    assert "mlp" in targets[False]
    assert "self_attn" in targets[True]


def test_some_layers_only_are_named_by_their_numbers(tiny: TinyModels) -> None:
    for layout in LAYOUTS:
        plan = planned(tiny("gemma4"), own((r"re:model\.language_model\.layers\.[13]\.mlp\..*", "nvfp4")), layout)
        config = quantization_config(plan)
        mlps = {f"language_model.model.layers.{n}.mlp.gate_up_proj": n in (1, 3) for n in range(6)}
        assert {name: is_quantized(name, config) for name in mlps} == mlps


def test_the_config_does_not_depend_on_how_the_shards_are_cut(tmp_path: Path) -> None:
    one, five = (planned(tiny_gemma4(tmp_path / str(shards), shards=shards)) for shards in (1, 5))
    assert json.dumps(quantization_config(one)) == json.dumps(quantization_config(five))
