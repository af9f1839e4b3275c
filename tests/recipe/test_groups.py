"""Fused groups: which matrices share their global scales."""

from __future__ import annotations

from nvquant.recipe.groups import FusedGroup, fused_groups, fused_name

LAYER = "model.layers.3."


def test_members_are_named_after_the_fused_module() -> None:
    for member in ("q_proj", "k_proj", "v_proj"):
        assert fused_name(LAYER + "self_attn." + member) == LAYER + "self_attn.qkv_proj"
    for member in ("gate_proj", "up_proj"):
        assert fused_name(LAYER + "mlp." + member) == LAYER + "mlp.gate_up_proj"
    for alone in ("mlp.down_proj", "self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert fused_name(LAYER + alone) == LAYER + alone
    assert fused_name("q_proj") == "q_proj", "without a parent there is nothing to fuse with"


def test_members_are_in_the_order_of_fusion_whatever_the_order_on_disk() -> None:
    names = ["v_proj", "o_proj", "k_proj", "q_proj"]
    assert fused_groups(LAYER + "self_attn." + name for name in names) == (
        FusedGroup(
            LAYER + "self_attn.qkv_proj",
            (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj", LAYER + "self_attn.v_proj"),
        ),
        FusedGroup(LAYER + "self_attn.o_proj", (LAYER + "self_attn.o_proj",)),
    )


def test_an_absent_member_is_not_invented() -> None:
    (group,) = fused_groups([LAYER + "self_attn.k_proj", LAYER + "self_attn.q_proj"])
    assert group.members == (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj")


def test_layers_and_towers_are_not_mixed() -> None:
    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "tower.layers.1.mlp.up_proj"]
    assert [group.members for group in fused_groups(names)] == [(name,) for name in names]
    assert fused_groups([]) == ()
