"""vLLM's rules for names, row by row as they were observed on its own functions."""

from __future__ import annotations

from typing import Any

import pytest
from nvquant.recipe.vllm_rules import (
    REFUSED,
    UNQUANTIZED,
    compressed_tensors_verdict,
    modelopt_verdict,
    serving_names,
)

FULL = "model.language_model.layers.5.self_attn"  # a full-attention layer of Gemma 4: no v_proj on disk
SERVED = "language_model.model.layers.5.self_attn"
TEXT = "model.language_model.layers.5.mlp"
EVERYTHING = "re:.*"


def ct(ignore: list[str] | None = None, *targets: list[str]) -> dict[str, Any]:
    groups = {f"group_{at}": {"targets": names} for at, names in enumerate(targets or ([EVERYTHING],))}
    return {"quant_method": "compressed-tensors", "ignore": ignore or [], "config_groups": groups}


def modelopt(*exclude: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(exclude)}


def of(prefix: str, *leaves: str) -> list[str]:
    return [f"{prefix}.{leaf}_proj" for leaf in leaves]


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        (of(FULL, "q", "k"), REFUSED),  # the phantom v_proj: vLLM issue 47473
        (["re:.*(q|k)_proj$"], REFUSED),
        (of(FULL, "q", "k", "v"), UNQUANTIZED),  # v need not exist
        (of(FULL, "qkv"), UNQUANTIZED),
        (["re:.*self_attn.*"], UNQUANTIZED),
        (["re:.*v_proj$"], UNQUANTIZED),  # qkv_proj itself ends in v_proj
        (["re:.*(q|k|v)_proj$"], UNQUANTIZED),
        ([r"re:.*\.layers\.\d+\.self_attn\..*"], UNQUANTIZED),
        (of(FULL, "o"), "group_0"),
        ([], "group_0"),
        (["self_attn"], "group_0"),  # an exact name, not a part of one
        (["re:self_attn.*"], "group_0"),  # anchored at the start
    ],
)
def test_ignore_of_a_fused_attention_layer(entries: list[str], verdict: str) -> None:
    assert compressed_tensors_verdict(f"{FULL}.qkv_proj", ct(entries)) == verdict


def test_ignore_of_up_proj_by_regex_takes_the_whole_fused_layer() -> None:
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", ct(["re:.*up_proj$"])) == UNQUANTIZED
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", ct(of(TEXT, "up"))) == REFUSED
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", ct(["re:.*gate_proj$"])) == REFUSED
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", ct(of(TEXT, "gate", "up"))) == UNQUANTIZED


def test_regexes_are_not_renamed_and_exact_names_are() -> None:
    anchored = [r"re:^model\.language_model\.layers.*"]
    # Under the name that the multimodal class builds, the regex finds nothing; under the file's name it would.
    assert compressed_tensors_verdict(f"{SERVED}.qkv_proj", ct(anchored)) == "group_0"
    assert compressed_tensors_verdict(f"{SERVED}.qkv_proj", ct([], anchored)) == UNQUANTIZED
    assert compressed_tensors_verdict(f"{FULL}.qkv_proj", ct(anchored)) == REFUSED
    assert compressed_tensors_verdict(f"{FULL}.qkv_proj", ct([], anchored)) == REFUSED
    assert compressed_tensors_verdict(f"{FULL}.o_proj", ct(of(FULL, "o"))) == UNQUANTIZED


@pytest.mark.parametrize(
    ("targets", "verdict"),
    [
        (of(FULL, "q", "k"), UNQUANTIZED),
        ([r"re:.*self_attn\.(q|k|v|o)_proj$"], "group_0"),
        ([r"re:.*self_attn\.(q|k|o)_proj$"], UNQUANTIZED),
        (of(FULL, "q", "k", "v"), "group_0"),
        (of(FULL, "qkv"), "group_0"),
        ([r"re:.*\.layers\.\d+\.self_attn\.(qkv|q|k|v|o)_proj$"], "group_0"),
        (["Linear"], "group_0"),
        (["Attention"], UNQUANTIZED),
        ([], UNQUANTIZED),
    ],
)
def test_targets_of_a_fused_attention_layer(targets: list[str], verdict: str) -> None:
    assert compressed_tensors_verdict(f"{FULL}.qkv_proj", ct([], targets)) == verdict


@pytest.mark.parametrize(
    ("layer", "verdict"),
    [
        (f"{TEXT}.gate_up_proj", "group_0"),
        (f"{TEXT}.down_proj", "group_0"),
        ("model.vision_tower.encoder.layers.3.mlp.gate_proj.linear", UNQUANTIZED),
        ("model.embed_vision.embedding_projection", UNQUANTIZED),
        ("lm_head", UNQUANTIZED),
    ],
)
def test_an_mlp_target_with_a_final_dollar_spares_the_tower(layer: str, verdict: str) -> None:
    assert compressed_tensors_verdict(layer, ct([], [r"re:.*mlp\.(gate|up|down)_proj$"])) == verdict


def test_without_the_final_dollar_the_tower_is_matched_too() -> None:
    config = ct([], [r"re:.*mlp\.(gate|up|down)_proj"])
    layer = "model.vision_tower.encoder.layers.3.mlp.gate_proj.linear"
    assert compressed_tensors_verdict(layer, config) == "group_0"


def test_up_proj_by_regex_targets_the_fused_layer_itself() -> None:
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", ct([], ["re:.*up_proj$"])) == "group_0"


def test_a_layer_number_without_a_dot_behind_it_hits_other_layers() -> None:
    for i in (5, 50):
        layer = f"model.layers.{i}.mlp.down_proj"
        assert compressed_tensors_verdict(layer, ct(["re:.*layers.5"])) == UNQUANTIZED
        assert compressed_tensors_verdict(layer, ct([r"re:.*\.5\..*"])) == (UNQUANTIZED if i == 5 else "group_0")


def test_ignore_is_asked_before_targets_and_groups_in_their_order() -> None:
    layer = f"{TEXT}.down_proj"
    assert compressed_tensors_verdict(layer, ct([layer], [layer])) == UNQUANTIZED
    assert compressed_tensors_verdict(layer, ct([], ["re:.*down.*"], [layer])) == "group_0"
    assert compressed_tensors_verdict(layer, ct([], ["re:.*nothing"], [layer])) == "group_1"
    assert compressed_tensors_verdict(layer, ct([], ["Linear"], [layer])) == "group_1", "names come before classes"


def test_members_of_a_fused_target_may_lie_in_two_groups_and_the_first_members_wins() -> None:
    config = ct([], of(TEXT, "gate"), of(TEXT, "up"))
    assert compressed_tensors_verdict(f"{TEXT}.gate_up_proj", config) == "group_0"


def test_a_bare_lm_head_does_not_reach_the_multimodal_head() -> None:
    assert compressed_tensors_verdict("language_model.lm_head", ct(["lm_head"])) == "group_0"
    assert compressed_tensors_verdict("lm_head", ct(["lm_head"])) == REFUSED, "it depends on who serves"
    assert compressed_tensors_verdict("lm_head", ct(["re:.*lm_head"])) == UNQUANTIZED


def test_linear_hits_projectors_and_towers_unless_they_are_ignored() -> None:
    for layer in ("model.embed_vision.embedding_projection", "model.vision_tower.encoder.layers.0.mlp.fc1"):
        assert compressed_tensors_verdict(layer, ct([], ["Linear"])) == "group_0"
        assert compressed_tensors_verdict(layer, ct(["re:.*vision.*"], ["Linear"])) == UNQUANTIZED


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        (of(FULL, "q", "k"), REFUSED),
        (of(FULL, "q", "k", "v"), UNQUANTIZED),
        (of(FULL, "qkv"), UNQUANTIZED),
        ([f"{FULL}*"], UNQUANTIZED),
        ([f"{FULL}.*"], UNQUANTIZED),
        (["*self_attn*"], UNQUANTIZED),
        (["self_attn"], UNQUANTIZED),  # a part of the name is enough
        (["*.layers.*.self_attn.*"], UNQUANTIZED),
        (["re:.*self_attn.*"], "NVFP4"),  # no regular expressions here
        (["*mlp*"], "NVFP4"),
        (["lm_head"], "NVFP4"),
        ([], "NVFP4"),
    ],
)
def test_modelopt_exclusion_of_a_fused_attention_layer(entries: list[str], verdict: str) -> None:
    assert modelopt_verdict(f"{FULL}.qkv_proj", modelopt(*entries)) == verdict


@pytest.mark.parametrize(
    ("entry", "excluded"),
    [
        ("model.layers.1*", [1, 10, 19]),  # becomes the part `model.layers.1`
        ("model.layers.1.*", [1]),
        ("*.layers.1.*", [1]),
        ("*.layers.1*", [1]),  # becomes `*.layers.1` and `*.layers.1.*`
    ],
)
def test_modelopt_wildcards_and_layer_numbers(entry: str, excluded: list[int]) -> None:
    found = [
        i
        for i in (0, 1, 2, 10, 19, 21)
        if modelopt_verdict(f"model.layers.{i}.mlp.down_proj", modelopt(entry)) == UNQUANTIZED
    ]
    assert found == excluded


def test_modelopt_always_leaves_vision_towers() -> None:
    for layer in ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision_model.layers.0.mlp.fc1"):
        assert modelopt_verdict(layer, modelopt("nothing")) == UNQUANTIZED
    assert modelopt_verdict("model.audio_tower.layers.0.mlp.fc1", modelopt("nothing")) == "NVFP4"


def test_modelopt_splits_a_wildcard_before_it_renames() -> None:
    # `model.audio_tower*` is not renamed as a whole, `model.audio_tower.*` is.
    assert modelopt_verdict("model.audio_tower.layers.0.mlp.fc1", modelopt("model.audio_tower*")) == UNQUANTIZED
    assert modelopt_verdict("model.vision_embedder.patch_dense", modelopt("model.vision_embedder*")) == UNQUANTIZED


def test_modelopt_reads_the_older_key_and_the_weight_only_algorithm() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "exclude_modules": ["*self_attn*"]}
    assert modelopt_verdict(f"{FULL}.qkv_proj", config) == UNQUANTIZED
    assert modelopt_verdict(f"{TEXT}.down_proj", config) == "W4A16_NVFP4"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.layers.0.mlp.down_proj", []),
        (
            "model.language_model.layers.0.mlp.down_proj",
            ["language_model.model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"],
        ),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", ["vision_tower.encoder.layers.0.mlp.fc1"]),
        ("model.embed_vision.embedding_projection", ["embed_vision.embedding_projection"]),
        ("model.audio_tower.layers.0.fc", ["audio_tower.layers.0.fc"]),
        ("lm_head", ["language_model.lm_head"]),
    ],
)
def test_a_module_is_served_under_these_names(module: str, names: list[str]) -> None:
    assert serving_names(module) == [module, *names]


def test_a_config_without_groups_or_lists_quantizes_nothing_by_name() -> None:
    assert compressed_tensors_verdict(f"{TEXT}.down_proj", {}) == UNQUANTIZED
    assert compressed_tensors_verdict(f"{TEXT}.down_proj", ct([], [])) == UNQUANTIZED
    assert modelopt_verdict(f"{TEXT}.down_proj", {"quant_algo": "NVFP4"}) == "NVFP4"


# modelopt's list of modules (MIXED_PRECISION), compared with vLLM 0.32's `_resolve_quant_algo` on 4,000 random lists


def mixed(listed: dict[str, Any], *exclude: str) -> dict[str, Any]:
    layers = {name: {"quant_algo": entry} if isinstance(entry, str) else entry for name, entry in listed.items()}
    return modelopt(*exclude) | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


PLAIN = "model.layers.5.self_attn"


@pytest.mark.parametrize(
    ("listed", "verdict"),
    [
        (dict.fromkeys(of(PLAIN, "q", "k", "v"), "FP8"), "FP8"),
        (dict.fromkeys(of(PLAIN, "q", "k"), "FP8"), "FP8"),  # v need not exist
        ({**dict.fromkeys(of(PLAIN, "q", "k"), "FP8"), f"{PLAIN}.v_proj": "NVFP4"}, REFUSED),
        ({f"{PLAIN}.qkv_proj": "NVFP4", f"{PLAIN}.q_proj": "FP8"}, "NVFP4"),  # its own name comes first
        (dict.fromkeys(of(PLAIN, "q", "k", "v"), "fp8"), "FP8"),
        (dict.fromkeys(of(PLAIN, "q", "k", "v"), "NVFP4_AWQ"), UNQUANTIZED),  # no algorithm of a linear layer
        ({f"{PLAIN}.q_proj": {"group_size": 16}}, REFUSED),
        ({f"{PLAIN}.q_proj": "FP8", f"{PLAIN}.k_proj": 8}, REFUSED),
        (dict.fromkeys(of(PLAIN, "o"), "FP8"), UNQUANTIZED),
        ({f"{PLAIN}.qkv_proj.linear": "FP8"}, "FP8"),  # a module below it
        ({"model.layers.50.self_attn.q_proj": "FP8"}, UNQUANTIZED),
        ({"re:.*self_attn.*": "FP8", "*self_attn*": "FP8"}, UNQUANTIZED),  # exact names only
        ({}, REFUSED),
    ],
)
def test_a_fused_layer_has_the_algorithm_of_its_listed_members(listed: dict[str, Any], verdict: str) -> None:
    assert modelopt_verdict(f"{PLAIN}.qkv_proj", mixed(listed)) == verdict


def test_members_are_looked_up_where_the_model_does_not_fuse_them_too() -> None:
    listed = dict.fromkeys(of(PLAIN, "q", "k", "v"), "FP8")
    assert modelopt_verdict(f"{PLAIN}.qkv_proj", mixed(listed), ()) == "FP8"
    assert modelopt_verdict(f"{PLAIN}.qkvz_proj", mixed(listed), ()) == UNQUANTIZED
    assert modelopt_verdict(f"{PLAIN}.qkvz_proj", mixed(listed), ("q_proj", "z_proj")) == "FP8"


@pytest.mark.parametrize("prefix", [FULL, SERVED])
def test_a_list_may_name_layers_as_either_class_does(prefix: str) -> None:
    """The text-only class renames no `language_model.model.`, so only the name in the files is safe."""
    listed = dict.fromkeys(of(prefix, "q", "k"), "FP8")
    assert modelopt_verdict(f"{SERVED}.qkv_proj", mixed(listed)) == "FP8"
    assert modelopt_verdict(f"{FULL}.qkv_proj", mixed(listed)) == ("FP8" if prefix == FULL else REFUSED)


def test_members_listed_under_both_prefixes_must_agree() -> None:
    both = {f"{FULL}.q_proj": "FP8", f"{SERVED}.k_proj": "NVFP4"}
    assert modelopt_verdict(f"{SERVED}.qkv_proj", mixed(both)) == REFUSED


def test_a_listed_head_is_found_under_every_name() -> None:
    for layer in ("lm_head", "language_model.lm_head"):
        assert modelopt_verdict(layer, mixed({"lm_head": "FP8"})) == "FP8"
        assert modelopt_verdict(layer, mixed({f"{PLAIN}.o_proj": "FP8"})) == UNQUANTIZED


def test_an_exclusion_comes_before_the_list() -> None:
    listed = {f"{TEXT}.down_proj": "NVFP4"}
    assert modelopt_verdict(f"{TEXT}.down_proj", mixed(listed)) == "NVFP4"
    assert modelopt_verdict(f"{TEXT}.down_proj", mixed(listed, "*mlp.down_proj")) == UNQUANTIZED


def test_a_listed_tower_is_quantized_and_one_algorithm_for_all_layers_spares_it() -> None:
    for layer in ("vision_tower.encoder.layers.0.mlp.fc1", "vit_large_projector.fc1"):
        assert modelopt_verdict(layer, mixed({layer: "FP8"})) == "FP8"
        assert modelopt_verdict(layer, modelopt()) == UNQUANTIZED
