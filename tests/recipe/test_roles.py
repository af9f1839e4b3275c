"""Roles of tensors by the names that real checkpoints give them."""

from __future__ import annotations

from typing import Any

import pytest
from nvquant.recipe.decoder import unexpected_layer
from nvquant.recipe.roles import (
    QUANTIZABLE,
    Role,
    decoder_prefix,
    describe,
    is_table,
    layer_index,
    module_of,
    role_of,
    roles_of,
    text_config,
    unused_tensors,
)

MATRIX, VECTOR, STACK, NUMBER = (64, 32), (64,), (8, 64, 32), ()
LLAMA, GEMMA4 = "model.layers.0.", "model.language_model.layers.11."

# (family, name, shape, role); names as in the families' released files.
TENSORS: list[tuple[str, str, tuple[int, ...], Role]] = [
    ("llama", "model.embed_tokens.weight", MATRIX, Role.EMBEDDING),
    ("llama", LLAMA + "self_attn.q_proj.weight", MATRIX, Role.ATTENTION),
    ("llama", LLAMA + "self_attn.o_proj.weight", MATRIX, Role.ATTENTION),
    ("llama", LLAMA + "self_attn.rotary_emb.inv_freq", VECTOR, Role.OTHER),
    ("llama", LLAMA + "mlp.gate_proj.weight", MATRIX, Role.MLP),
    ("llama", LLAMA + "mlp.down_proj.weight", MATRIX, Role.MLP),
    ("llama", LLAMA + "input_layernorm.weight", VECTOR, Role.OTHER),
    ("llama", "model.norm.weight", VECTOR, Role.OTHER),
    ("llama", "lm_head.weight", MATRIX, Role.HEAD),
    ("llama, classifier", "score.weight", MATRIX, Role.HEAD),
    ("qwen2", LLAMA + "self_attn.q_proj.bias", VECTOR, Role.OTHER),
    ("qwen3", LLAMA + "self_attn.q_norm.weight", VECTOR, Role.OTHER),
    ("phi3", LLAMA + "self_attn.qkv_proj.weight", MATRIX, Role.ATTENTION),
    ("phi3", LLAMA + "mlp.gate_up_proj.weight", MATRIX, Role.MLP),
    ("phi3-vision", "model.vision_embed_tokens.img_projection.0.weight", MATRIX, Role.TOWER),
    ("mixtral", LLAMA + "block_sparse_moe.gate.weight", MATRIX, Role.ROUTER),
    ("mixtral", LLAMA + "block_sparse_moe.experts.3.w1.weight", MATRIX, Role.EXPERT),
    ("qwen2-moe", LLAMA + "mlp.gate.weight", MATRIX, Role.ROUTER),
    ("qwen2-moe", LLAMA + "mlp.experts.5.up_proj.weight", MATRIX, Role.EXPERT),
    ("qwen2-moe", LLAMA + "mlp.shared_expert.up_proj.weight", MATRIX, Role.MLP),
    ("qwen2-moe", LLAMA + "mlp.shared_expert_gate.weight", MATRIX, Role.ROUTER),
    ("deepseek-v3", LLAMA + "mlp.shared_experts.down_proj.weight", MATRIX, Role.MLP),
    ("deepseek-v3", LLAMA + "mlp.gate.e_score_correction_bias", VECTOR, Role.OTHER),
    ("deepseek-v3", LLAMA + "self_attn.kv_a_proj_with_mqa.weight", MATRIX, Role.ATTENTION),
    ("deepseek-v3", LLAMA + "self_attn.kv_a_layernorm.weight", VECTOR, Role.OTHER),
    ("gpt-oss", LLAMA + "mlp.router.weight", MATRIX, Role.ROUTER),
    ("gpt-oss", LLAMA + "mlp.router.bias", VECTOR, Role.ROUTER),
    ("gpt-oss", LLAMA + "mlp.experts.gate_up_proj", STACK, Role.EXPERT),
    ("gpt-oss", LLAMA + "mlp.experts.down_proj_bias", MATRIX, Role.EXPERT),
    ("gpt-oss", LLAMA + "self_attn.sinks", VECTOR, Role.OTHER),
    ("llama4", "language_model.model.layers.1.feed_forward.router.weight", MATRIX, Role.ROUTER),
    ("llama4", "language_model.model.layers.1.feed_forward.experts.gate_up_proj", STACK, Role.EXPERT),
    ("llama4", "language_model.model.layers.1.feed_forward.shared_expert.up_proj.weight", MATRIX, Role.MLP),
    ("llama4", "multi_modal_projector.linear_1.weight", MATRIX, Role.PROJECTOR),
    ("llama4", "vision_model.model.layers.0.self_attn.q_proj.weight", MATRIX, Role.TOWER),
    ("gemma4", "model.language_model.embed_tokens.weight", MATRIX, Role.EMBEDDING),
    ("gemma4", GEMMA4 + "self_attn.k_proj.weight", MATRIX, Role.ATTENTION),
    ("gemma4", GEMMA4 + "mlp.up_proj.weight", MATRIX, Role.MLP),
    ("gemma4", GEMMA4 + "layer_scalar", (1,), Role.OTHER),
    ("gemma4", GEMMA4 + "pre_feedforward_layernorm.weight", VECTOR, Role.OTHER),
    ("gemma4", "model.vision_tower.encoder.layers.3.mlp.gate_proj.linear.weight", MATRIX, Role.TOWER),
    ("gemma4", "model.vision_tower.patch_embedder.position_embedding_table", STACK, Role.TOWER),
    ("gemma4", "model.vision_tower.std_bias", VECTOR, Role.TOWER),
    ("gemma4", "model.embed_vision.embedding_projection.weight", MATRIX, Role.PROJECTOR),
    ("gemma4 E2B", "model.audio_tower.layers.0.self_attn.q_proj.linear.weight", MATRIX, Role.TOWER),
    ("gemma4 E2B", "model.audio_tower.layers.0.self_attn.q_proj.input_max", NUMBER, Role.TOWER),
    ("gemma4 E2B", "model.embed_audio.embedding_projection.weight", MATRIX, Role.PROJECTOR),
    ("gemma4 E2B", "model.language_model.embed_tokens_per_layer.weight", MATRIX, Role.EMBEDDING),
    ("gemma4 E2B", "model.language_model.per_layer_model_projection.weight", MATRIX, Role.PER_LAYER_INPUT),
    ("gemma4 E2B", GEMMA4 + "per_layer_input_gate.weight", MATRIX, Role.PER_LAYER_INPUT),
    ("gemma4 E2B", GEMMA4 + "per_layer_projection.weight", MATRIX, Role.PER_LAYER_INPUT),
    ("gemma4 E2B", GEMMA4 + "post_per_layer_input_norm.weight", VECTOR, Role.PER_LAYER_INPUT),
    ("gemma4 26B", GEMMA4 + "router.proj.weight", MATRIX, Role.ROUTER),
    ("gemma4 26B", GEMMA4 + "router.per_expert_scale", VECTOR, Role.ROUTER),
    ("gemma4 26B", GEMMA4 + "experts.gate_up_proj", STACK, Role.EXPERT),
    ("gemma4 26B", GEMMA4 + "experts.down_proj", STACK, Role.EXPERT),
    ("gemma4 12B", "model.vision_embedder.patch_dense.weight", MATRIX, Role.TOWER),
    ("gemma3n", "model.language_model.layers.0.laurel.linear_left.weight", MATRIX, Role.LINEAR),
    ("gpt2", "transformer.wte.weight", MATRIX, Role.EMBEDDING),
    ("gpt2", "transformer.wpe.weight", MATRIX, Role.EMBEDDING),
    ("opt", "model.decoder.embed_positions.weight", MATRIX, Role.EMBEDDING),
    ("gpt-neox", "gpt_neox.embed_in.weight", MATRIX, Role.EMBEDDING),
    ("internlm2", "model.tok_embeddings.weight", MATRIX, Role.EMBEDDING),
    ("internlm2", "output.weight", MATRIX, Role.HEAD),
    ("internvl", "language_model.output.weight", MATRIX, Role.HEAD),
    ("chatglm", "transformer.output_layer.weight", MATRIX, Role.HEAD),
    ("rwkv", "model.layers.3.attention.output.weight", MATRIX, Role.ATTENTION),
    ("bloom", "transformer.word_embeddings_layernorm.weight", VECTOR, Role.OTHER),
    ("gpt2", "transformer.h.0.attn.c_attn.weight", MATRIX, Role.ATTENTION),
    ("gpt2", "h.0.mlp.c_fc.weight", MATRIX, Role.MLP),
    ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value.weight", MATRIX, Role.ATTENTION),
    ("gpt-neox", "embed_out.weight", MATRIX, Role.HEAD),
    ("falcon", "transformer.h.0.self_attention.query_key_value.weight", MATRIX, Role.ATTENTION),
    ("falcon", "transformer.word_embeddings.weight", MATRIX, Role.EMBEDDING),
    ("mpt", "transformer.blocks.0.ffn.up_proj.weight", MATRIX, Role.MLP),
    ("internlm2", LLAMA + "attention.wqkv.weight", MATRIX, Role.ATTENTION),
    ("internlm2", LLAMA + "feed_forward.w2.weight", MATRIX, Role.MLP),
    ("mamba2", "backbone.layers.0.mixer.in_proj.weight", MATRIX, Role.LINEAR),
    ("nemotron-h", "backbone.layers.0.mixer.q_proj.weight", MATRIX, Role.ATTENTION),
    ("nemotron-h", "backbone.layers.0.mixer.down_proj.weight", MATRIX, Role.MLP),
    ("opt", "model.decoder.layers.0.fc1.weight", MATRIX, Role.MLP),
    ("bart", "model.decoder.layers.0.encoder_attn.out_proj.weight", MATRIX, Role.CROSS_ATTENTION),
    ("longcat", LLAMA + "mlps.1.gate_proj.weight", MATRIX, Role.MLP),
    ("hunyuan v3", LLAMA + "mlp.shared_mlp.up_proj.weight", MATRIX, Role.MLP),
    ("granite-hybrid", LLAMA + "shared_mlp.input_linear.weight", MATRIX, Role.MLP),
    ("granite-moe", LLAMA + "block_sparse_moe.input_linear.weight", STACK, Role.EXPERT),
    ("granite-moe", LLAMA + "block_sparse_moe.router.layer.weight", MATRIX, Role.ROUTER),
    ("olmo-hybrid", LLAMA + "linear_attn.q_proj.weight", MATRIX, Role.LINEAR),
    ("rwkv", "rwkv.blocks.0.feed_forward.time_mix_key", (1, 1, 64), Role.OTHER),
    ("lfm2", LLAMA + "conv.in_proj.weight", MATRIX, Role.LINEAR),
    ("mamba2", "backbone.layers.0.mixer.conv1d.weight", (64, 1, 4), Role.FULL_PRECISION),
    ("qwen3-next", LLAMA + "linear_attn.in_proj_qkvz.weight", MATRIX, Role.LINEAR),
    ("qwen2-vl", "visual.blocks.0.attn.qkv.weight", MATRIX, Role.TOWER),
    ("qwen2-vl", "visual.merger.mlp.0.weight", MATRIX, Role.PROJECTOR),
    ("qwen2-vl", "visual.patch_embed.proj.weight", (64, 3, 2, 14, 14), Role.TOWER),
    ("qwen2.5-omni", "thinker.audio_tower.layers.0.self_attn.q_proj.weight", MATRIX, Role.TOWER),
    ("qwen2.5-omni", "thinker.model.layers.0.self_attn.q_proj.weight", MATRIX, Role.ATTENTION),
    ("deepseek-v3.2", LLAMA + "self_attn.indexer.weights_proj.weight", MATRIX, Role.FULL_PRECISION),
    ("deepseek-v3.2", LLAMA + "self_attn.indexer.wk.weight", MATRIX, Role.FULL_PRECISION),
    ("deepseek-v3.2", LLAMA + "self_attn.indexer.wq_b.weight", MATRIX, Role.ATTENTION),
    ("deepseek-v4", "layers.0.attn.compressor.wgate.weight", MATRIX, Role.FULL_PRECISION),
    ("deepseek-v4", "layers.0.attn.wkv.weight", MATRIX, Role.ATTENTION),
    ("mamba", "backbone.layers.0.mixer.x_proj.weight", MATRIX, Role.FULL_PRECISION),
    ("mamba", "backbone.layers.0.mixer.dt_proj.weight", MATRIX, Role.FULL_PRECISION),
    ("qwen3.5", LLAMA + "linear_attn.in_proj_a.weight", MATRIX, Role.LINEAR),
    ("qwen3.5", LLAMA + "linear_attn.conv1d.weight", (64, 1, 4), Role.FULL_PRECISION),
    ("hunyuan", LLAMA + "mlp.gate.wg.weight", MATRIX, Role.ROUTER),
    ("longcat", LLAMA + "mlp.router.classifier.weight", MATRIX, Role.ROUTER),
    ("qwen3.5", "mtp.fc.weight", MATRIX, Role.DRAFT),
    ("qwen3.5", "mtp.layers.0.mlp.experts.0.up_proj.weight", MATRIX, Role.DRAFT),
    ("qwen3.5", "mtp.pre_fc_norm_hidden.weight", VECTOR, Role.DRAFT),
    ("mimo", "model.mtp_layers.0.self_attn.q_proj.weight", MATRIX, Role.DRAFT),
    ("ernie", "model.mtp_linear_proj.0.weight", MATRIX, Role.DRAFT),
    ("longcat", "model.mtp.embed_tokens.weight", MATRIX, Role.DRAFT),
    ("eagle", "eagle3.layers.0.mlp.up_proj.weight", MATRIX, Role.DRAFT),
    ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", MATRIX, Role.TOWER),
    ("llava", "language_model.model.layers.0.mlp.up_proj.weight", MATRIX, Role.MLP),
    ("llava", "image_newline", VECTOR, Role.TOWER),
    ("smolvlm", "model.connector.modality_projection.proj.weight", MATRIX, Role.PROJECTOR),
    ("kimi-vl", "mm_projector.proj.0.weight", MATRIX, Role.PROJECTOR),
]


def test_a_tensor_has_the_role_that_its_architecture_gives_it() -> None:
    found = [(architecture, name, role_of(name, shape), role) for architecture, name, shape, role in TENSORS]
    assert [row for row in found if row[2] is not row[3]] == []


def test_only_the_text_decoders_matrices_can_be_quantized() -> None:
    assert QUANTIZABLE == {Role.MLP, Role.ATTENTION, Role.LINEAR}


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"], "model.layers"),
        (["model.language_model.layers.0.layer_scalar"], "model.language_model.layers"),
        (["transformer.h.3.attn.c_attn.weight"], "transformer.h"),
        (["h.0.attn.c_attn.weight"], "h"),
        (["model.embed_tokens.weight", "lm_head.weight"], None),
        ([], None),
        # More layers in the tower than in the decoder.
        (
            [f"model.vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(9)]
            + ["model.language_model.layers.0.mlp.up_proj.weight"],
            "model.language_model.layers",
        ),
        (["mtp.layers.0.mlp.up_proj.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in "01")], "model.layers"),
    ],
)
def test_the_decoder_is_the_largest_stack_of_layers_outside_of_towers(names: list[str], prefix: str | None) -> None:
    assert decoder_prefix(dict.fromkeys(names, MATRIX)) == prefix


WIDE, NARROW = (64, 64), (32, 32)
# (the decoder, other stacks with the number and shape of their matrices, config.json)
STACKS: list[tuple[str, dict[str, tuple[int, tuple[int, ...]]], dict[str, Any]]] = [
    # A tower with more layers under a name that tells nothing.
    ("model.layers", {"model.layers": (2, WIDE), "vit_g.layers": (9, NARROW)},
     {"num_hidden_layers": 2, "hidden_size": 64}),
    ("model.layers", {"model.layers": (2, WIDE), "encoder.layers": (9, WIDE)}, {"num_hidden_layers": 2}),
    ("llm.model.layers", {"llm.model.layers": (2, WIDE), "patch.model.layers": (9, NARROW)},
     {"llm_config": {"num_hidden_layers": 2, "hidden_size": 64}, "hidden_size": 32}),
    # As many layers and as wide: the name decides.
    ("model.decoder.layers", {"model.encoder.layers": (4, WIDE), "model.decoder.layers": (4, WIDE)},
     {"num_hidden_layers": 4, "hidden_size": 64}),
    ("model.language_model.layers", {"model.tower.layers": (4, WIDE), "model.language_model.layers": (3, WIDE)}, {}),
    # Fewer tensors, but the layers that the config counts.
    ("transformer.h", {"transformer.h": (6, WIDE), "adapter.blocks": (3, WIDE)}, {"n_layer": 6}),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "stacks", "config"), STACKS)
def test_the_decoder_is_the_stack_that_the_config_describes(
    prefix: str, stacks: dict[str, tuple[int, tuple[int, ...]]], config: dict[str, Any]
) -> None:
    shapes = {
        f"{stack}.{layer}.mlp.{leaf}.weight": shape
        for stack, (count, shape) in stacks.items()
        for layer in range(count)
        for leaf in ("up_proj", "down_proj")
    }
    assert decoder_prefix(shapes, config) == prefix
    roles = roles_of(shapes, config)
    assert {name.startswith(prefix + ".") for name, role in roles.items() if role in QUANTIZABLE} == {True}
    assert all(role in QUANTIZABLE for name, role in roles.items() if name.startswith(prefix + "."))


def test_layers_behind_those_that_the_config_counts_are_draft_layers() -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": MATRIX for layer in range(4)}
    roles = roles_of(shapes, {"text_config": {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}})
    assert list(roles.values()) == [Role.MLP] * 3 + [Role.DRAFT]
    assert Role.DRAFT not in roles_of(shapes, {}).values()
    assert unexpected_layer(shapes, {"num_hidden_layers": 4}, "model.layers") is None
    assert unexpected_layer(shapes, {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, "model.layers") is None
    assert unexpected_layer(shapes, {"num_hidden_layers": 3}, "model.layers") == "model.layers.3.mlp.up_proj.weight"
    marked = shapes | {"model.layers.3.eh_proj.weight": MATRIX}
    assert unexpected_layer(marked, {"num_hidden_layers": 3}, "model.layers") is None


@pytest.mark.parametrize("config", [{"architectures": ["GPT2LMHeadModel"]}, {}])
def test_the_transposed_matrices_of_gpt2_are_not_quantized(config: dict[str, Any]) -> None:
    shapes = {"h.0.attn.c_attn.weight": (64, 192), "h.0.attn.c_proj.weight": (64, 64), "h.0.mlp.c_fc.weight": (64, 256)}
    assert set(roles_of(shapes, config).values()) == {Role.TRANSPOSED}


def test_linears_of_the_same_names_are_quantized() -> None:
    """GPT-BigCode and StarCoder 2 have linears where GPT-2 has its Conv1D."""
    shapes = {"h.0.attn.c_attn.weight": (96, 64), "h.0.attn.c_proj.weight": (64, 64), "h.0.mlp.c_fc.weight": (256, 64)}
    assert set(roles_of(shapes, {}).values()) == {Role.ATTENTION, Role.MLP}


def test_mamba_1_is_built_without_quantization_and_mamba_2_with() -> None:
    first = {f"backbone.layers.0.mixer.{leaf}.weight": MATRIX for leaf in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    second = {f"backbone.layers.0.mixer.{leaf}.weight": MATRIX for leaf in ("in_proj", "out_proj")}
    assert set(roles_of(first, {}).values()) == {Role.FULL_PRECISION}
    assert set(roles_of(second, {}).values()) == {Role.LINEAR}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.59.layer_scalar", 59),
        ("model.layers_extra.0.weight", None),
        ("model.norm.weight", None),
        ("model.layers.x.weight", None),
        ("model.layers.²", None),  # a digit to str.isdigit, no number to int
        ("mtp.model.layers.0.weight", None),
    ],
)
def test_a_layers_number_is_read_after_the_prefix(name: str, number: int | None) -> None:
    assert layer_index(name, "model.layers") == number
    assert layer_index(name, None) is None


def test_the_text_part_of_a_config_is_found() -> None:
    inner = {"num_hidden_layers": 2}
    assert text_config(inner) is inner
    for key in ("text_config", "llm_config", "language_config"):
        assert text_config({key: inner, "num_hidden_layers": 9}) is inner
    assert text_config({"text_config": None, "hidden_size": 1}) == {"text_config": None, "hidden_size": 1}


def test_keys_and_values_of_sharing_layers_are_unused() -> None:
    config: dict[str, Any] = {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2}}
    parts = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "q_proj.weight", "o_proj.weight", "q_norm.weight")
    names = [f"model.language_model.layers.{i}.self_attn.{part}" for i in range(4) for part in parts]
    tower = ["model.vision_tower.encoder.layers.3.self_attn.k_proj.weight"]
    found = unused_tensors(config, names + tower)
    assert found == {f"model.language_model.layers.{i}.self_attn.{part}" for i in (2, 3) for part in parts[:3]}
    config["text_config"]["num_kv_shared_layers"] = 0
    assert unused_tensors(config, names) == frozenset()
    assert unused_tensors({}, names) == frozenset()


def test_names_are_shown_up_to_a_limit() -> None:
    assert describe(["a", "b", "c"]) == "a, b, c"
    assert describe(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert describe([], 3) == ""
    assert module_of("a.b.weight") == "a.b"
    assert module_of("a.weight_scale") == "a.weight_scale"


@pytest.mark.parametrize(
    "module",
    [
        "vision_tower.embeddings.position_embedding",  # SigLIP, CLIP
        "model.visual.pos_embed",  # Qwen3-VL
        "vision_model.gated_positional_embedding.tile_embedding",  # Llama 3.2
        "model.decoder.embed_positions",
        "bert.embeddings.token_type_embeddings",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",  # T5
        "model.embed_vision.embedding",  # Gemma 3n
    ],
)
def test_a_table_is_known_by_its_name_wherever_it_stands(module: str) -> None:
    assert is_table(module)


@pytest.mark.parametrize(
    "module",
    [
        "vision_model.embeddings.patch_embedding",  # a linear in SigLIP 2
        "model.visual.patch_embed.proj",
        "model.embed_vision.embedding_projection",
        "model.audio_embed.fc1",
        "embed_out",
    ],
)
def test_what_multiplies_is_no_table(module: str) -> None:
    assert not is_table(module)
