"""The share of the decoder's matrices that a recipe leaves as in the source."""

from __future__ import annotations

from nvquant.recipe.kept import kept_shares, kept_words
from nvquant.recipe.roles import roles_of

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.mlp.up_proj.weight": (60, 10),
    "model.layers.0.mlp.experts.gate_up_proj": (2, 10, 10),
    "model.layers.0.self_attn.q_proj.weight": (20, 10),
    "model.layers.0.mlp.gate.weight": (90, 90),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.linear_attn.in_proj_a.weight": (90, 90),
    "model.layers.0.self_attn.slope_rate": (90, 90, 1),
}


def test_shares_count_elements_of_matrices_that_servers_could_load_quantized() -> None:
    roles = roles_of(SHAPES, {})
    shares = kept_shares(SHAPES, roles, {"model.layers.0.mlp.up_proj.weight"}, "model.layers")
    assert shares == {"experts": 0.2, "text attention": 0.2}
    assert kept_words(shares) == (
        "Of the decoder's matrices, 40.0% stay as in the source: experts 20.0%, text attention 20.0%."
    )


def test_nothing_is_stated_where_every_matrix_is_quantized() -> None:
    wanted = {name for name in SHAPES if ".layers." in name}
    assert kept_words(kept_shares(SHAPES, roles_of(SHAPES, {}), wanted, "model.layers")) is None
