"""Which matrices a recipe takes, and every request that is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from nvquant.checkpoint.headers import TensorInfo
from nvquant.checkpoint.source import Checkpoint
from nvquant.errors import InputError, ShapeError
from nvquant.recipe.load import load_recipe, parse_recipe
from nvquant.recipe.match import Selection, select
from nvquant.recipe.roles import Role
from nvquant.recipe.schema import Recipe

Tiny = Callable[[str], Checkpoint]
Q, K, V, O_, GATE, UP, DOWN = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def own(*entries: tuple[str | list[str], str], more: str = "") -> Recipe:
    """A user's recipe from (patterns, scheme) pairs."""
    lines = ["name: mine", "quantize:"]
    for modules, scheme in entries:
        patterns = json.dumps([modules] if isinstance(modules, str) else modules)
        lines += [f"  - modules: {patterns}", f"    scheme: {scheme}"]
    return parse_recipe("\n".join([*lines, more]), "my.yaml")


def infos(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, 0, 0) for name, shape in shapes.items()}


def plain(layers: int = 2, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama; `more` with dots written as two underscores."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 32)}
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (32,)
        shapes |= {f"model.layers.{i}.{leaf}.weight": (32, 32) for leaf in (Q, K, V, O_, GATE, UP, DOWN)}
    shapes["model.norm.weight"] = (32,)
    return shapes | {name.replace("__", "."): shape for name, shape in more.items()}


def chosen(recipe: Recipe, checkpoint: Checkpoint) -> Selection:
    return select(recipe, checkpoint.infos(), "tiny", checkpoint.config)


def refused(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None, dtype: str = "BF16"
) -> str:
    with pytest.raises(InputError) as caught:
        select(recipe, infos(shapes, dtype), "model", config or {})
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.endswith(".") and "\n" not in message
    return message


# model: matrices under nvfp4, nvfp4-full; fused groups under nvfp4, nvfp4-full.
FITS = {
    "llama": (9, 21, 6, 12),
    "qwen2": (9, 21, 6, 12),
    "qwen3": (9, 21, 6, 12),
    "phi3": (6, 12, 6, 12),
    "gemma2": (9, 21, 6, 12),
    "gemma3_text": (9, 21, 6, 12),
    "gemma4": (18, 41, 12, 24),
    "gemma4_text": (18, 41, 12, 24),
    "gemma4_e2b": (24, 50, 16, 32),
    "gemma4_e2b_unused_kv": (24, 50, 16, 32),
    "gemma4_unified": (18, 41, 12, 24),
}


@pytest.mark.parametrize("name", FITS)
def test_the_shipped_recipes_fit_every_family(tiny: Tiny, name: str) -> None:
    mlp, full, mlp_groups, full_groups = FITS[name]
    for recipe, matrices, groups in (("nvfp4", mlp, mlp_groups), ("nvfp4-full", full, full_groups)):
        selection = chosen(load_recipe(recipe), tiny(name))
        assert (len(selection.schemes), len(selection.groups)) == (matrices, groups)
        assert set(selection.schemes.values()) == {"nvfp4"}
    weight_only = chosen(load_recipe("nvfp4-a16"), tiny(name))
    assert list(weight_only.schemes) == list(selection.schemes)
    assert set(weight_only.schemes.values()) == {"nvfp4-a16"}


@pytest.mark.parametrize("name", [*FITS, "gemma4_moe"])
def test_only_text_matrices_are_taken_and_each_by_one_group(tiny: Tiny, name: str) -> None:
    recipe = load_recipe("nvfp4-full").model_copy(update={"experts": "bf16"})
    selection = chosen(recipe, tiny(name))
    infos_of = tiny(name).infos()
    prefix = r"^model\.(language_model\.)?layers\.\d+\.(mlp|self_attn)\.(qkv|q|k|v|o|gate_up|gate|up|down)_proj$"
    assert all(re.match(prefix, module) for module in selection.schemes)
    assert all(len(infos_of[f"{module}.weight"].shape) == 2 for module in selection.schemes)
    assert sorted(m for group in selection.groups for m in group.members) == sorted(selection.schemes)
    for group in selection.groups:
        fused = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "gate": "gate_up_proj", "up": "gate_up_proj"}
        for member in group.members:
            parent, _, leaf = member.rpartition(".")
            assert f"{parent}.{fused.get(leaf.removesuffix('_proj'), leaf)}" == group.name
    assert set(selection.roles) == set(infos_of)


def test_a_layer_without_v_proj_has_a_group_of_q_and_k(tiny: Tiny) -> None:
    groups = {group.name: group.members for group in chosen(load_recipe("nvfp4-full"), tiny("gemma4")).groups}
    layer = "model.language_model.layers.5.self_attn."
    assert groups[layer + "qkv_proj"] == (layer + "q_proj", layer + "k_proj")
    assert len(groups["model.language_model.layers.4.self_attn.qkv_proj"]) == 3


def test_keys_and_values_that_no_layer_reads_are_left_alone(tiny: Tiny) -> None:
    selection = chosen(load_recipe("nvfp4-full"), tiny("gemma4_e2b_unused_kv"))
    assert len(selection.unused) == 9
    assert not any(f"{module}.weight" in selection.unused for module in selection.schemes)
    assert all(selection.roles[name] is Role.OTHER for name in selection.unused)
    groups = {group.name: group.members for group in selection.groups}
    layer = "model.language_model.layers.6.self_attn."
    assert groups[layer + "qkv_proj"] == (layer + "q_proj",)
    same = own(("re:.*language_model.*self_attn.*_proj", "nvfp4"), ("mlp", "nvfp4"))
    assert chosen(same, tiny("gemma4_e2b_unused_kv")).schemes == selection.schemes


def test_a_mixture_of_experts_is_refused_unless_a_users_recipe_leaves_the_experts(tiny: Tiny) -> None:
    with pytest.raises(InputError) as caught:
        chosen(load_recipe("nvfp4"), tiny("gemma4_moe"))
    assert str(caught.value) == (
        "tiny is a mixture of experts (model.language_model.layers.0.experts.down_proj and 11 more), and nvquant "
        "does not quantize experts yet: write a recipe with `experts: bf16` to leave them in BF16."
    )
    selection = chosen(own(("mlp", "nvfp4"), more="experts: bf16"), tiny("gemma4_moe"))
    assert len(selection.schemes) == 18


@pytest.mark.parametrize("experts", ["refuse", "bf16"])
def test_experts_are_never_taken_by_a_pattern(tiny: Tiny, experts: str) -> None:
    for pattern in ("re:.*experts.*", "re:.*_proj$", "model.language_model.layers.0.experts.gate_up_proj"):
        words = "nvquant does not quantize experts yet" if experts == "refuse" else r"matches .*(experts|tower).*,"
        with pytest.raises(InputError, match=words):
            chosen(own((pattern, "nvfp4"), more=f"experts: {experts}"), tiny("gemma4_moe"))


def test_modules_come_in_the_models_order_whatever_the_recipes() -> None:
    shapes = plain(2)
    forwards = select(own(("attention", "nvfp4"), ("mlp", "nvfp4")), infos(shapes), "m", {})
    backwards = select(own(("mlp", "nvfp4"), ("attention", "nvfp4")), infos(shapes), "m", {})
    assert list(forwards.schemes) == list(backwards.schemes)
    assert list(forwards.schemes)[:3] == [f"model.layers.0.{leaf}" for leaf in (Q, K, V)]


def test_a_users_patterns_are_exact_names_or_regular_expressions_from_the_start() -> None:
    exact = own((["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"], "nvfp4-a16"))
    assert set(select(exact, infos(plain()), "m", {}).schemes) == {"model.layers.1." + leaf for leaf in (GATE, UP)}
    by_regex = own((r"re:model\.layers\.1\.mlp\.(gate|up)_proj$", "nvfp4"))
    assert set(select(by_regex, infos(plain()), "m", {}).schemes) == {"model.layers.1." + leaf for leaf in (GATE, UP)}
    assert "matches no matrix" in refused(own((r"re:layers\.1\.mlp.*", "nvfp4")), plain())
    assert "matches no matrix" in refused(own(("model.layers.1.mlp", "nvfp4")), plain())
    assert "matches no matrix" in refused(own(("model.layers.1.mlp.up_proj.weight", "nvfp4")), plain())


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is() -> None:
    assert refused(own(("re:.*fc1$", "nvfp4")), plain()) == (
        "recipe mine: pattern 're:.*fc1$' matches no matrix of model, whose text matrices are "
        "model.layers.N.mlp.down_proj, model.layers.N.mlp.gate_proj, model.layers.N.mlp.up_proj, "
        "model.layers.N.self_attn.k_proj and 3 more: correct the pattern."
    )
    assert "whose text matrices are none: choose a recipe that quantizes other matrices, or another model." in refused(
        own(("mlp", "nvfp4")), {"model.norm.weight": (32,)}
    )
    assert "matches no matrix" in refused(own(("attention", "nvfp4")), {"model.layers.0.mlp.up_proj.weight": (32, 32)})


@pytest.mark.parametrize(
    ("name", "pattern", "touched", "what"),
    [
        ("gemma4", "re:.*mlp.*", "model.vision_tower.encoder.layers.0.mlp.", "vision and audio"),
        ("gemma4", "re:.*self_attn.*_proj", "model.vision_tower.encoder.layers.0.self_attn.", "vision and audio"),
        ("gemma4", "re:.*embedding_projection", "model.embed_vision.embedding_projection", "projector"),
        ("gemma4", "re:.*embed_tokens", "model.language_model.embed_tokens", "embedding"),
        ("gemma4", "model.language_model.norm", "model.language_model.norm", "other text"),
        ("gemma4", "model.language_model.layers.0.input_layernorm", "layers.0.input_layernorm", "other text"),
        ("gemma4_e2b", "re:.*audio_tower.*q_proj", "model.audio_tower.", "vision and audio"),
        ("gemma4_e2b", "re:.*embed_audio.*", "model.embed_audio.embedding_projection", "projector"),
        ("gemma4_e2b", "re:.*embed_tokens_per_layer", "embed_tokens_per_layer", "embedding"),
        ("gemma4_e2b", "re:.*per_layer_model_projection", "per_layer_model_projection", "per-layer input"),
        ("gemma4_e2b", r"re:.*layers\.\d+\.per_layer_input_gate", "per_layer_input_gate", "per-layer input"),
        ("gemma4_moe", "re:.*router.*", "model.language_model.layers.0.router.proj", "router"),
        ("phi3", "lm_head", "lm_head", "head"),
        ("phi3", "re:.*", "lm_head", "head"),
        ("llama", "re:.*", "model.embed_tokens", "embedding"),
    ],
)
def test_what_vllm_serves_unquantized_is_refused(tiny: Tiny, name: str, pattern: str, touched: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(own((pattern, "nvfp4"), more="experts: bf16"), tiny(name))
    message = str(caught.value)
    assert message.startswith(f"recipe mine: pattern '{pattern}' matches ")
    assert touched in message
    assert f"({what}), which vLLM serves unquantized: limit the pattern" in message


def test_a_tied_head_is_not_on_disk_and_so_matches_nothing(tiny: Tiny) -> None:
    for pattern in ("lm_head", "re:.*lm_head"):
        with pytest.raises(InputError, match="matches no matrix of tiny"):
            chosen(own((pattern, "nvfp4")), tiny("gemma4"))


def test_another_stack_of_layers_is_not_the_decoder() -> None:
    shapes = plain(2) | {f"mtp.layers.0.{leaf}.weight": (32, 32) for leaf in (GATE, UP, DOWN)}
    selection = select(own(("mlp", "nvfp4")), infos(shapes), "m", {})
    assert len(selection.schemes) == 6
    assert not any(module.startswith("mtp") for module in selection.schemes)
    message = refused(own((r"re:(.*\.)?layers\.\d+\.mlp\..*", "nvfp4")), shapes)
    assert "matches mtp.layers.0.mlp.gate_proj" in message


@pytest.mark.parametrize(
    ("taken", "left"),
    [([Q], [K, V]), ([Q, K], [V]), ([V], [Q, K]), ([GATE], [UP]), ([UP], [GATE])],
)
def test_half_of_a_fused_group_is_refused(taken: list[str], left: list[str]) -> None:
    names, missing = ([f"model.layers.0.{leaf}" for leaf in leaves] for leaves in (taken, left))
    assert refused(own((names, "nvfp4")), plain()) == (
        f"recipe mine quantizes {', '.join(names)}, but not {', '.join(missing)}, which vLLM fuses with it: "
        "quantize all of them or none."
    )


def test_overlapping_entries_are_refused_even_with_one_scheme() -> None:
    for second in (r"re:model\.layers\.0\.mlp.*", "model.layers.0.mlp.down_proj", "mlp"):
        message = refused(own(("mlp", "nvfp4"), (second, "nvfp4")), plain())
        assert message.startswith(f"recipe mine: '{second}' matches model.layers.0.mlp.")
        assert message.endswith("which an earlier entry already quantizes: change one of the two patterns.")
    assert "change one of the two patterns" in refused(own((["mlp", "mlp"], "nvfp4")), plain())


def test_schemes_that_differ_within_a_group_are_refused() -> None:
    layer = "model.layers.0.mlp."
    message = refused(own((layer + "gate_proj", "nvfp4"), (layer + "up_proj", "nvfp4-a16")), plain(1))
    assert message == (
        f"recipe mine: {layer}gate_proj, {layer}up_proj have different schemes, but vLLM fuses them: "
        f"give them the same scheme."
    )
    q, k, v = (f"model.layers.0.{leaf}" for leaf in (Q, K, V))
    message = refused(own((q, "fp8"), ([k, v], "nvfp4")), plain(1))
    assert message == (
        f"recipe mine: {q}, {k}, {v} have different schemes, but vLLM fuses them: give them the same scheme."
    )
    mixed = own(("mlp", "nvfp4"), ("attention", "nvfp4-a16"))
    schemes = select(mixed, infos(plain()), "m", {}).schemes
    assert {scheme for module, scheme in schemes.items() if ".mlp." in module} == {"nvfp4"}
    assert {scheme for module, scheme in schemes.items() if ".self_attn." in module} == {"nvfp4-a16"}


def test_a_second_entry_in_another_scheme_may_not_reach_into_the_first() -> None:
    for pattern in (r"re:.*\.gate_proj$", "model.layers.0.mlp.gate_proj"):
        assert refused(own(("mlp", "nvfp4"), (pattern, "fp8")), plain()) == (
            f"recipe mine: '{pattern}' matches model.layers.0.mlp.gate_proj, which an earlier entry already quantizes: "
            f"change one of the two patterns."
        )


def test_fp8_and_nvfp4_stand_side_by_side(tiny: Tiny) -> None:
    schemes = chosen(load_recipe("nvfp4-fp8"), tiny("gemma4")).schemes
    assert {scheme for module, scheme in schemes.items() if ".mlp." in module} == {"nvfp4"}
    assert {scheme for module, scheme in schemes.items() if ".self_attn." in module} == {"fp8"}
    assert len(schemes) == 41


@pytest.mark.parametrize("cols", [72, 24, 8, 1])
def test_columns_that_are_no_whole_blocks_are_refused_by_name(cols: int) -> None:
    shapes = plain() | {"model.layers.1.mlp.down_proj.weight": (32, cols)}
    with pytest.raises(ShapeError, match=rf"model\.layers\.1\.mlp\.down_proj\.weight has shape \[32, {cols}\]"):
        select(own(("mlp", "nvfp4")), infos(shapes), "m", {})
    assert len(select(own(("attention", "nvfp4")), infos(shapes), "m", {}).schemes) == 8


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8", "F64"])
def test_other_dtypes_than_those_of_a_source_are_refused(dtype: str) -> None:
    message = refused(own(("mlp", "nvfp4")), plain(), dtype=dtype)
    assert message.startswith(
        f"model.layers.0.mlp.gate_proj.weight is stored as {dtype}, but nvquant reads BF16, F16 and F32"
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_sources_may_be_bf16_f16_or_f32(dtype: str) -> None:
    assert len(select(own(("mlp", "nvfp4")), infos(plain(), dtype), "m", {}).schemes) == 6


def test_a_selector_without_matrices_leaves_the_others() -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (32, 32), "model.layers.0.mlp.gate_proj.weight": (32, 32)}
    found = select(own((["attention", "mlp", "linear"], "nvfp4")), infos(shapes), "m", {})
    assert set(found.schemes) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"}


def test_a_recipe_whose_selectors_all_find_nothing_is_refused() -> None:
    shapes = {"model.layers.0.input_layernorm.weight": (32,)}
    assert refused(own((["attention", "mlp"], "nvfp4")), shapes).startswith(
        "recipe mine: patterns 'attention' and 'mlp' match no matrix of model, whose text matrices are none"
    )


def test_the_selector_linear_takes_projections_of_linear_attention_and_leaves_gates_with_all_they_are_fused_with() -> (
    None
):
    delta = {
        f"model.layers.0.linear_attn.{leaf}.weight": (32, 32)
        for leaf in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    }
    odd = {"model.layers.0.laurel.linear_right.weight": (32, 8)}
    found = select(own(("linear", "nvfp4")), infos(delta | odd), "m", {})
    assert [(group.name.rpartition(".")[2], len(group.members)) for group in found.groups] == [
        ("in_proj_qkvz", 2),
        ("out_proj", 1),
    ]
    kimi = {
        f"model.layers.0.linear_attn.{leaf}.weight": (32, 32)
        for leaf in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "o_proj")
    }
    assert set(select(own(("linear", "nvfp4")), infos(kimi), "m", {}).schemes) == {"model.layers.0.linear_attn.o_proj"}


def test_a_gate_of_a_recurrence_is_quantized_where_a_pattern_names_it() -> None:
    shapes = {f"model.layers.0.linear_attn.{leaf}.weight": (32, 32) for leaf in ("in_proj_a", "in_proj_b")}
    assert len(select(own(("re:.*in_proj_[ab]$", "nvfp4")), infos(shapes), "m", {}).schemes) == 2


def test_a_selector_takes_only_matrices() -> None:
    shapes = plain(1) | {"model.layers.0.mlp.conv.weight": (32, 16, 4), "model.layers.0.mlp.up_proj.bias": (32,)}
    assert set(select(own(("mlp", "nvfp4")), infos(shapes), "m", {}).schemes) == {
        f"model.layers.0.{leaf}" for leaf in (GATE, UP, DOWN)
    }
