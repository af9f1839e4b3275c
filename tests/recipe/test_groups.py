"""Fused groups: which matrices share their global scales, by the names that real checkpoints give them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from nvquant.recipe.groups import FUSIONS, FusedGroup, Fusions, members_called

LAYER = "model.layers.3."
ATTENTION, MLP, DELTA = LAYER + "self_attn.", LAYER + "mlp.", LAYER + "linear_attn."

# (architecture, parent, stored leaves, fused layers with their members); every other leaf stands alone.
MODELS: list[tuple[str, str, str, dict[str, str]]] = [
    ("LlamaForCausalLM", ATTENTION, "q_proj k_proj v_proj o_proj", {"qkv_proj": "q_proj k_proj v_proj"}),
    ("LlamaForCausalLM", MLP, "down_proj up_proj gate_proj", {"gate_up_proj": "gate_proj up_proj"}),
    ("Gemma4ForConditionalGeneration", ATTENTION, "k_proj q_proj o_proj", {"qkv_proj": "q_proj k_proj"}),
    ("Phi3ForCausalLM", ATTENTION, "qkv_proj o_proj", {}),
    ("NemotronForCausalLM", MLP, "up_proj down_proj", {}),
    ("AfmoeForCausalLM", ATTENTION, "q_proj k_proj v_proj gate_proj", {"qkv_proj": "q_proj k_proj v_proj"}),
    (
        "Qwen3_5ForConditionalGeneration",
        DELTA,
        "in_proj_z in_proj_qkv in_proj_a in_proj_b out_proj",
        {"in_proj_qkvz": "in_proj_qkv in_proj_z", "in_proj_ba": "in_proj_b in_proj_a"},
    ),
    ("Qwen3NextForCausalLM", DELTA, "in_proj_qkvz in_proj_ba out_proj", {}),
    (
        "DeepseekV3ForCausalLM",
        ATTENTION,
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        {"fused_qkv_a_proj": "q_a_proj kv_a_proj_with_mqa"},
    ),
    ("DeepseekV2ForCausalLM", ATTENTION, "q_proj kv_a_proj_with_mqa kv_b_proj o_proj", {}),
    ("MiniCPM3ForCausalLM", ATTENTION, "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", {}),
    (
        "KimiK3ForCausalLM",
        ATTENTION,
        "q_a_proj kv_a_proj_with_mqa g_proj",
        {"fused_qkv_a_g_proj": "q_a_proj kv_a_proj_with_mqa g_proj"},
    ),
    (
        "KimiLinearForCausalLM",
        ATTENTION,
        "q_proj k_proj v_proj b_proj f_a_proj f_b_proj g_a_proj g_b_proj o_proj",
        {"in_proj_qkvgfab": "q_proj k_proj v_proj b_proj f_a_proj"},
    ),
    ("OlmoHybridForCausalLM", DELTA, "q_proj k_proj v_proj g_proj", {"in_proj_qkvg": "q_proj k_proj v_proj g_proj"}),
    ("Step3p5ForCausalLM", ATTENTION, "q_proj k_proj v_proj g_proj", {"qkv_proj": "q_proj k_proj v_proj"}),
    ("BailingMoeV3ForCausalLM", ATTENTION, "q_proj k_proj v_proj b_proj", {"qkvb_proj": "q_proj k_proj v_proj b_proj"}),
    ("K2HorizonForCausalLM", ATTENTION, "q_proj k_proj v_proj", {"qk_proj": "q_proj k_proj"}),
    ("InternLM2ForCausalLM", LAYER + "feed_forward.", "w1 w2 w3", {"gate_up_proj": "w1 w3"}),
    ("Lfm2ForCausalLM", LAYER + "feed_forward.", "w1 w2 w3", {"w13": "w1 w3"}),
    ("MixtralForCausalLM", LAYER + "block_sparse_moe.experts.2.", "w1 w2 w3", {"gate_up_proj": "w1 w3"}),
    ("Qwen3MoeForCausalLM", MLP + "experts.2.", "gate_proj up_proj", {"gate_up_proj": "gate_proj up_proj"}),
    ("Qwen2MoeForCausalLM", MLP + "shared_expert.", "gate_proj up_proj", {"gate_up_proj": "gate_proj up_proj"}),
    ("ExaoneForCausalLM", "transformer.h.3.mlp.", "c_fc_0 c_fc_1 c_proj", {"gate_up_proj": "c_fc_0 c_fc_1"}),
    ("BertModel", "encoder.layer.3.attention.self.", "query key value", {"qkv_proj": "query key value"}),
    ("DeepseekV4ForCausalLM", "layers.3.attn.", "wq_a wq_b wkv wo_a", {"fused_wqa_wkv": "wq_a wkv"}),
    ("PhiForCausalLM", MLP, "fc1 fc2", {}),
    ("FalconH1ForCausalLM", LAYER + "mamba.", "in_proj out_proj conv1d", {}),
]


@pytest.mark.parametrize(("model", "parent", "leaves", "fused"), MODELS, ids=[f"{m}-{p}" for m, p, *_ in MODELS])
def test_a_model_fuses_as_its_class_in_vllm(model: str, parent: str, leaves: str, fused: dict[str, str]) -> None:
    modules = [parent + leaf for leaf in leaves.split()]
    fusions = Fusions(modules, {"architectures": [model]})
    groups = {group.name: group.members for group in fusions.groups(modules)}
    expected = {parent + name: tuple(parent + leaf for leaf in members.split()) for name, members in fused.items()}
    alone = set(modules) - {module for members in expected.values() for module in members}
    assert groups == expected | {module: (module,) for module in alone}
    for name, members in expected.items():
        assert {fusions.name(module) for module in members} == {name}
        assert set(members) <= {parent + leaf for leaf in fusions.members(members[0])}


def test_members_are_in_the_order_of_fusion_whatever_the_order_on_disk() -> None:
    modules = [ATTENTION + leaf for leaf in ("v_proj", "o_proj", "k_proj", "q_proj")]
    assert Fusions(modules, {}).groups(modules) == (
        FusedGroup(ATTENTION + "qkv_proj", (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj")),
        FusedGroup(ATTENTION + "o_proj", (ATTENTION + "o_proj",)),
    )


def test_an_absent_member_is_not_invented_but_named_to_the_server() -> None:
    modules = [ATTENTION + "k_proj", ATTENTION + "q_proj"]
    fusions = Fusions(modules, {})
    (group,) = fusions.groups(modules)
    assert group.members == (ATTENTION + "q_proj", ATTENTION + "k_proj")
    assert fusions.members(ATTENTION + "q_proj") == ("q_proj", "k_proj", "v_proj")


def test_a_layer_that_shares_keys_is_fused_as_the_others_under_its_path() -> None:
    modules = [ATTENTION + "q_proj", *(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")]
    assert Fusions(modules, {}).name(ATTENTION + "q_proj") == ATTENTION + "qkv_proj"


def test_a_hybrid_fuses_each_layer_by_what_stands_in_it() -> None:
    latent, delta = "model.layers.0.self_attn.", "model.layers.1.self_attn."
    modules = [latent + "q_proj", latent + "kv_a_proj_with_mqa"]
    modules += [delta + leaf for leaf in ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")]
    fusions = Fusions(modules, {})
    assert fusions.name(latent + "q_proj") == latent + "q_proj"
    assert fusions.name(delta + "q_proj") == delta + "in_proj_qkvgfab"


def test_layers_and_towers_are_not_mixed() -> None:
    names = ["model.layers.1.mlp.up_proj", "tower.layers.1.mlp.gate_proj", "model.layers.1.mlp.x.gate_proj"]
    assert [group.members for group in Fusions(names, {}).groups(names)] == [(name,) for name in names]
    both = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
    assert len(Fusions(both, {}).groups(both)) == 2, "two layers"
    assert Fusions([], {}).groups([]) == ()
    assert Fusions(["q_proj", "k_proj"], {}).name("q_proj") == "q_proj", "without a parent nothing is fused"


def test_a_fused_name_alone_gives_the_members_of_most_models() -> None:
    assert members_called("qkv_proj") == ("q_proj", "k_proj", "v_proj")
    assert members_called("gate_up_proj") == ("gate_proj", "up_proj")
    assert members_called("in_proj_qkvz") == ("in_proj_qkv", "in_proj_z")
    assert members_called("down_proj") == ()
    assert all(len(fusion.members) > 1 and fusion.beside <= set(fusion.members) for fusion in FUSIONS)


VLLM = sorted(Path(__file__).parents[2].glob(".venv-vllm/lib/python3.*/site-packages/vllm"))
# Mapped, but of no text decoder's quantized linears: convolutions, a hyper-connection, an attention's own class.
NOT_FUSED = {"conv1d", "input_mix_weight_down_block_inject"}


@pytest.mark.skipif(not VLLM, reason="needs vLLM's files (make vllm)")
def test_every_fusion_that_vllm_lists_is_in_the_table() -> None:
    """`packed_modules_mapping` of all its model classes, read from the files: each fuses for one model at least."""
    listed: dict[tuple[str, ...], str] = {}
    for path in [*VLLM[0].glob("model_executor/models/**/*.py"), *VLLM[0].glob("models/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if not any("packed_modules_mapping" in ast.unparse(target) for target in targets if target is not None):
                continue
            for mapping in (part for part in ast.walk(node) if isinstance(part, ast.Dict)):
                for key, value in zip(mapping.keys, mapping.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.List):
                        members = tuple(ast.literal_eval(item).rpartition(".")[2] for item in value.elts)
                        listed[members] = str(key.value)
    pairs = {members: name for members, name in listed.items() if len(set(members)) > 1 and name not in NOT_FUSED}
    assert len(pairs) > 20
    known = [set(fusion.members) for fusion in FUSIONS]
    unknown = {name: members for members, name in pairs.items() if not any(set(members) <= row for row in known)}
    # The towers' own q, k, v, an adapter of GLM-4V, and an index whose two stored parts the row of qkv_proj names.
    assert set(unknown.values()) == {
        ("q", "k", "v"), ("gate_proj", "dense_h_to_4h"), ("q_proj", "k_proj", "v_proj", "index_qk_proj")
    }, unknown  # fmt: skip
