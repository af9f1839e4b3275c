"""The patterns of a config: literal for known models, and read as planned by vLLM's rules for every layer of all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
from nvquant.checkpoint.headers import TensorInfo
from nvquant.checkpoint.source import Checkpoint
from nvquant.convert.config import disagreements, output_configs, quantization_config, served_linears
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.coverage import Coverage, coverage_of
from nvquant.recipe.load import load_recipe, parse_recipe
from nvquant.recipe.match import select
from nvquant.recipe.schema import Recipe
from nvquant.recipe.vllm_rules import compressed_tensors_verdict, modelopt_verdict
from support.tiny_models import WRITERS

Tiny = Callable[[str], Checkpoint]
MODELS = [*WRITERS, "gemma4_e2b_unused_kv"]
RECIPES = ["nvfp4", "nvfp4-full", "nvfp4-a16"]
MLP_REGEX = r"re:.*\.layers\.\d+\.mlp\.(gate_up|gate|up|down)_proj$"
ATTENTION_REGEX = r"re:.*\.layers\.\d+\.self_attn\.(qkv|q|k|v|o)_proj$"


def recipe_of(name: str) -> Recipe:
    return load_recipe(name).model_copy(update={"experts": "bf16"})


def own(*entries: tuple[str, str]) -> Recipe:
    lines = ["name: mine", "experts: bf16", "quantize:"]
    for pattern, scheme in entries:
        lines += [f"  - modules: [{json.dumps(pattern)}]", f"    scheme: {scheme}"]
    return parse_recipe("\n".join(lines), "my.yaml")


def planned(checkpoint: Checkpoint, recipe: Recipe, layout: str = "compressed-tensors") -> Plan:
    return compute_plan(checkpoint, recipe, LAYOUTS[layout], "tiny")


def covered(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> Coverage:
    tensors = {name: TensorInfo(name, "BF16", shape, 0, 0) for name, shape in shapes.items()}
    return coverage_of(select(recipe, tensors, "model", {}), shapes)


def configs(coverage: Coverage) -> tuple[dict[str, object], dict[str, object]]:
    """A config of each layout from a coverage, with only what vLLM's rules read."""
    groups = {
        f"group_{at}": {"targets": [pattern.regex() for pattern in patterns]}
        for at, patterns in enumerate(coverage.targets.values())
    }
    divisors = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": coverage.ignore_regexes()}
    return divisors, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": coverage.ignore_globs()}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_vllm_reads_every_layer_of_every_model_as_planned(tiny: Tiny, model: str, recipe: str, layout: str) -> None:
    plan = planned(tiny(model), recipe_of(recipe), layout)
    config = quantization_config(plan)
    assert disagreements(plan, config) == []
    # The same once more, layer by layer and without the code that compares.
    verdict = modelopt_verdict if layout == "modelopt" else compressed_tensors_verdict
    quantized = {group.name for group in plan.groups}
    served = served_linears(plan)
    assert quantized <= set(served)
    group = {"nvfp4": "NVFP4", "nvfp4-full": "NVFP4", "nvfp4-a16": "W4A16_NVFP4"}[recipe]
    wanted = group if layout == "modelopt" else "group_0"
    assert {name: verdict(name, config) for name in served} == {
        name: wanted if name in quantized else "unquantized" for name in served
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_targets_match_exactly_the_quantized_modules_by_their_own_names_too(
    tiny: Tiny, model: str, recipe: str
) -> None:
    plan = planned(tiny(model), recipe_of(recipe))
    coverage = coverage_of(plan.selection, {name: info.shape for name, info in plan.source.infos().items()})
    targets = [pattern.regex()[3:] for patterns in coverage.targets.values() for pattern in patterns]
    globs = coverage.ignore_globs()
    for name, info in plan.source.infos().items():
        module = name.removesuffix(".weight")
        if len(info.shape) != 2 or module == name or name in plan.selection.unused or "embed_tokens" in module:
            continue
        assert any(re.match(target, module) for target in targets) == (module in plan.matrices), module
        assert any(fnmatchcase(module, glob) for glob in globs) == (module not in plan.matrices), module


# What is written for released models; `lm_head` always, since vLLM builds a head whether it is stored or not.
LITERAL = {
    ("llama", "nvfp4"): ([MLP_REGEX], [r"re:.*\.layers\.\d+\.self_attn\..*", "re:.*lm_head.*"]),
    ("llama", "nvfp4-full"): ([MLP_REGEX, ATTENTION_REGEX], ["re:.*lm_head.*"]),
    ("phi3", "nvfp4"): (
        [r"re:.*\.layers\.\d+\.mlp\.(down|gate_up)_proj$"],
        [r"re:.*\.layers\.\d+\.self_attn\..*", "re:.*lm_head.*"],
    ),
    ("gemma4", "nvfp4"): (
        [MLP_REGEX],
        [
            r"re:.*\.layers\.\d+\.self_attn\..*",
            *("re:.*lm_head.*", "re:.*embed_vision.*", "re:.*vision_tower.*"),
        ],
    ),
    ("gemma4", "nvfp4-full"): (
        [MLP_REGEX, ATTENTION_REGEX],
        ["re:.*lm_head.*", "re:.*embed_vision.*", "re:.*vision_tower.*"],
    ),
    ("gemma4_moe", "nvfp4"): (
        [MLP_REGEX],
        [
            r"re:.*\.layers\.\d+\.experts\..*",
            r"re:.*\.layers\.\d+\.router\..*",
            r"re:.*\.layers\.\d+\.self_attn\..*",
            *("re:.*lm_head.*", "re:.*embed_vision.*", "re:.*vision_tower.*"),
        ],
    ),
}


@pytest.mark.parametrize(("model", "recipe"), LITERAL)
def test_the_config_of_a_known_model_has_these_patterns(tiny: Tiny, model: str, recipe: str) -> None:
    config = quantization_config(planned(tiny(model), recipe_of(recipe)))
    (group,) = config["config_groups"].values()
    targets, ignore = LITERAL[model, recipe]
    assert sorted(group["targets"]) == sorted(targets)
    assert sorted(config["ignore"]) == sorted(ignore)


def test_modelopt_globs_name_blocks_and_start_with_a_star(tiny: Tiny) -> None:
    files = output_configs(planned(tiny("gemma4"), recipe_of("nvfp4"), "modelopt"))
    ignore = files["config.json"]["quantization_config"]["ignore"]
    assert sorted(ignore) == [
        *("*.layers.*.self_attn", "*.layers.*.self_attn.*"),
        *("*embed_tokens*", "*embed_vision*", "*lm_head*", "*vision_tower*"),
    ]
    assert files["hf_quant_config.json"]["quantization"]["exclude_modules"] == ignore


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_no_pattern_depends_on_the_prefix_or_names_one_member_of_a_fused_layer(
    tiny: Tiny, model: str, recipe: str
) -> None:
    plan = planned(tiny(model), recipe_of(recipe))
    coverage = coverage_of(plan.selection, {name: info.shape for name, info in plan.source.infos().items()})
    regexes = coverage.ignore_regexes() + [p.regex() for patterns in coverage.targets.values() for p in patterns]
    assert all(regex.startswith("re:.*") for regex in regexes)
    assert all(glob.startswith("*") for glob in coverage.ignore_globs())
    for regex in regexes:
        for fused, members in (("qkv", "qkv"), ("gate_up", ("gate", "up"))):
            found = [
                bool(re.match(regex[3:], f"x.layers.1.{b}.{m}_proj")) for b in ("mlp", "self_attn") for m in members
            ]
            whole = [bool(re.match(regex[3:], f"x.layers.1.{b}.{fused}_proj")) for b in ("mlp", "self_attn")]
            count = len(members)
            for at in (0, 1):
                assert set(found[at * count : (at + 1) * count]) == {whole[at]} or model == "phi3"


def test_a_users_recipe_for_some_layers_targets_and_ignores_by_their_numbers(tiny: Tiny) -> None:
    plan = planned(tiny("llama"), own((r"re:model\.layers\.(0|2)\.mlp\..*", "nvfp4")))
    config = quantization_config(plan)
    (group,) = config["config_groups"].values()
    assert group["targets"] == [r"re:.*\.layers\.(0|2)\.mlp\.(gate_up|gate|up|down)_proj$"]
    assert sorted(config["ignore"]) == [
        r"re:.*\.layers\.(1)\.mlp\.(gate_up|gate|up|down)_proj$",
        r"re:.*\.layers\.\d+\.self_attn\..*",
        "re:.*lm_head.*",
    ]
    verdicts = {i: compressed_tensors_verdict(f"model.layers.{i}.mlp.gate_up_proj", config) for i in range(3)}
    assert verdicts == {0: "group_0", 1: "unquantized", 2: "group_0"}


def test_two_schemes_make_two_groups_whose_targets_are_disjoint(tiny: Tiny) -> None:
    recipe = own((r"re:model\.layers\.(0|2)\.mlp\..*", "nvfp4"), ("attention", "nvfp4-a16"))
    plan = planned(tiny("llama"), recipe)
    config = quantization_config(plan)
    assert {
        tuple(group["targets"]): group["input_activations"] is None for group in config["config_groups"].values()
    } == {
        (ATTENTION_REGEX,): True,
        (r"re:.*\.layers\.(0|2)\.mlp\.(gate_up|gate|up|down)_proj$",): False,
    }
    for layer in served_linears(plan):
        hits = sum(
            any(re.match(target[3:], layer) for target in group["targets"])
            for group in config["config_groups"].values()
        )
        assert hits <= 1


@pytest.mark.parametrize("other", ["fp8", "nvfp4-a16", None])
def test_layers_that_lack_a_member_of_a_fused_layer_may_have_a_scheme_of_their_own(
    tiny: Tiny, other: str | None
) -> None:
    """v_proj stands in all layers but the last, so its layers are all that have one, and not all that have a qkv."""
    every, last = r"re:model\.layers\.[0-4]\.self_attn\.[qkv]_proj", r"re:model\.layers\.5\.self_attn\.[qk]_proj"
    entries = [(last, "nvfp4")] if other is None else [(every, other), (last, "nvfp4")]
    for layout in LAYOUTS:
        quantization_config(planned(tiny("gemma4_text"), own(*entries), layout))
    targets = [
        target
        for group in quantization_config(planned(tiny("gemma4_text"), own(*entries)))["config_groups"].values()
        for target in group["targets"]
    ]
    for layer in range(6):
        hits = [target for target in targets if re.match(target[3:], f"model.layers.{layer}.self_attn.qkv_proj")]
        assert len(hits) == (layer == 5 or other is not None), (layer, hits)


def test_one_layer_of_one_kind_is_named_alone(tiny: Tiny) -> None:
    name = "model.language_model.layers.5.self_attn.o_proj"
    plan = planned(tiny("gemma4"), own((name, "nvfp4")))
    for layout in LAYOUTS:
        config = quantization_config(planned(tiny("gemma4"), own((name, "nvfp4")), layout))
        assert disagreements(plan, config) == [] or layout == "modelopt"
    config = quantization_config(plan)
    assert config["config_groups"]["group_0"]["targets"] == [r"re:.*\.layers\.(5)\.self_attn\.o_proj$"]
    assert r"re:.*\.layers\.\d+\.mlp\..*" in config["ignore"]
    assert any("0|1|2|3|4" in entry and entry.endswith("o_proj$") for entry in config["ignore"])


def moe_layer(i: int, experts: str, per_expert: bool) -> dict[str, tuple[int, ...]]:
    """A layer of a mixture of experts with a dense shared expert."""
    layer = f"model.layers.{i}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}self_attn.{letter}_proj.weight": (32, 32) for letter in ("q", "k", "v", "o")
    }
    shapes[f"{layer}mlp.gate.weight"] = (4, 32)
    shapes |= {f"{layer}mlp.shared_expert.{leaf}_proj.weight": (32, 32) for leaf in ("gate", "up", "down")}
    if per_expert:
        names = [f"{experts}.{e}.{leaf}_proj.weight" for e in range(4) for leaf in ("gate", "up", "down")]
        return shapes | {layer + name: (32, 32) for name in names}
    return shapes | {layer + experts + ".gate_up_proj": (4, 64, 32), layer + experts + ".down_proj": (4, 32, 32)}


@pytest.mark.parametrize("per_expert", [True, False], ids=["one by one", "together"])
def test_experts_routers_and_shared_experts_are_told_apart(per_expert: bool) -> None:
    shapes = {k: v for i in range(2) for k, v in moe_layer(i, "mlp.experts", per_expert).items()}
    for config, verdict in zip(
        configs(covered(own(("mlp", "nvfp4")), shapes)), (compressed_tensors_verdict, modelopt_verdict), strict=True
    ):
        taken = "NVFP4" if verdict is modelopt_verdict else "group_0"
        layer = "model.layers.1."
        assert verdict(layer + "mlp.shared_expert.gate_up_proj", config) == taken
        assert verdict(layer + "mlp.shared_expert.down_proj", config) == taken
        # vLLM asks modelopt for the block of experts, compressed-tensors for the first expert's matrices.
        asked = (
            ["mlp.experts"] if verdict is modelopt_verdict else ["mlp.experts.0.gate_proj", "mlp.experts.0.down_proj"]
        )
        for name in ("mlp.gate", "self_attn.qkv_proj", "self_attn.o_proj", *asked):
            assert verdict(layer + name, config) == "unquantized"


def test_experts_stored_one_by_one_need_one_pattern() -> None:
    shapes = {k: v for i in range(2) for k, v in moe_layer(i, "block_sparse_moe.experts", True).items()}
    coverage = covered(own(("attention", "nvfp4")), shapes)
    expert_patterns = [pattern for pattern in coverage.ignore if "experts" in pattern.path]
    assert [pattern.regex() for pattern in expert_patterns] == [r"re:.*\.layers\.\d+\.block_sparse_moe\.experts\..*"]
    assert expert_patterns[0].globs() == [
        "*.layers.*.block_sparse_moe.experts",
        "*.layers.*.block_sparse_moe.experts.*",
    ]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_experts_of_gemma4_are_unquantized_under_every_name(tiny: Tiny, layout: str) -> None:
    config = quantization_config(planned(tiny("gemma4_moe"), recipe_of("nvfp4"), layout))
    for i in range(6):
        block = f"model.language_model.layers.{i}.experts"
        if layout == "modelopt":
            assert modelopt_verdict(block, config) == "unquantized"
        else:
            assert compressed_tensors_verdict(f"{block}.0.gate_proj", config) == "unquantized"


def test_names_of_other_decoders_give_patterns_of_their_own() -> None:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (64, 32)}
    for i in range(3):
        shapes |= {f"transformer.h.{i}.attn.{leaf}.weight": (32, 32) for leaf in ("c_attn", "c_proj")}
        shapes |= {f"transformer.h.{i}.mlp.{leaf}.weight": (32, 32) for leaf in ("c_fc", "c_proj")}
    coverage = covered(own(("mlp", "nvfp4")), shapes)
    assert [p.regex() for p in coverage.targets["nvfp4"]] == [r"re:.*\.h\.\d+\.mlp\.(c_fc|c_proj)$"]
    assert [p.regex() for p in coverage.ignore] == [r"re:.*\.h\.\d+\.attn\..*"]
