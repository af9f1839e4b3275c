"""The bandwidth ceiling: which bytes a decoded token reads, against counts by hand and the real shapes of a 31B."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.plan.ceiling import Ceiling, kv_bytes_per_value, read_bytes
from nvquant.plan.forecast import kv_cache_bytes
from support.conversions import planned
from support.synthetic_gemma4 import write_synthetic_gemma4

RTX_PRO_6000 = 1.79e12
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
SIZES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype]


EMBEDDING = Tensor("model.embed_tokens.weight", (100, 64))
HEAD = Tensor("lm_head.weight", (100, 64))
NORM = Tensor("model.norm.weight", (64,))
MATRIX = Tensor("model.layers.0.mlp.up_proj.weight", (128, 64))
PACKED = [
    Tensor("model.layers.1.mlp.up_proj.weight_packed", (128, 32), "U8"),
    Tensor("model.layers.1.mlp.up_proj.weight_scale", (128, 4), "F8_E4M3"),
    Tensor("model.layers.1.mlp.up_proj.weight_global_scale", (1,), "F32"),
    Tensor("model.layers.1.mlp.up_proj.input_global_scale", (1,), "F32"),
]
PACKED_BYTES = 128 * 32 + 128 * 4 + 4 + 4
OF_THE_DECODER = MATRIX.nbytes + PACKED_BYTES + NORM.nbytes


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("gemma") / "gemma-4-31b")


def ceiling_of(gemma: Path, recipe: str | None) -> Ceiling:
    """With an FP8 KV cache."""
    source = open_checkpoint(gemma)
    if recipe is None:
        return Ceiling(source.config, read_bytes(source.config, source.infos().values()), 1)
    entries = [entry for shard in planned(gemma, recipe).shards for entry in shard.entries]
    return Ceiling(source.config, read_bytes(source.config, entries), 1)


@pytest.mark.parametrize(
    ("recipe", "gigabytes", "short", "at_64k"),
    [(None, 61.4, 29, 28), ("nvfp4", 31.5, 57, 52), ("nvfp4-full", 19.3, 93, 80)],
)
def test_the_three_kinds_of_a_31b_on_an_rtx_pro_6000(
    gemma: Path, recipe: str | None, gigabytes: float, short: int, at_64k: int
) -> None:
    ceiling = ceiling_of(gemma, recipe)
    assert round(ceiling.weight_bytes / 1e9, 1) == gigabytes
    assert round(ceiling.tokens_per_second(RTX_PRO_6000, 0)) == short
    assert round(ceiling.tokens_per_second(RTX_PRO_6000, 65536)) == at_64k


def test_the_kv_cache_of_a_31b_by_hand(gemma: Path) -> None:
    full, sliding = 10 * 2 * 4 * 512, 50 * 2 * 16 * 256  # values of a token
    ceiling = ceiling_of(gemma, None)
    assert ceiling.kv_bytes(65536) == full * 65536 + sliding * 1024
    assert ceiling.kv_bytes(100) == (full + sliding) * 100
    assert replace(ceiling, kv_bytes_per_value=2).kv_bytes(65536) == kv_cache_bytes(ceiling.config, 65536)


def test_weights_are_read_once_for_all_users_and_keys_for_each() -> None:
    ceiling = Ceiling(LLAMA, 1_000_000)
    token = 2 * 2 * 2 * 2 * 16  # layers, keys and values, bytes, heads, size
    assert ceiling.kv_bytes(10) == 10 * token
    assert ceiling.bytes_per_step(10, users=8) == 1_000_000 + 80 * token
    assert ceiling.tokens_per_second(1e9, 10, users=8) == pytest.approx(8e9 / (1_000_000 + 80 * token))


def test_a_tied_embedding_is_read_as_the_head() -> None:
    assert read_bytes(LLAMA, [EMBEDDING, MATRIX, *PACKED, NORM]) == EMBEDDING.nbytes + OF_THE_DECODER


def test_beside_a_head_the_embedding_is_only_looked_up() -> None:
    assert read_bytes(LLAMA, [EMBEDDING, HEAD, MATRIX, *PACKED, NORM]) == HEAD.nbytes + OF_THE_DECODER


def test_a_quantized_head_counts_with_its_scales() -> None:
    parts = [replace(part, name=part.name.replace("model.layers.1.mlp.up_proj", "lm_head")) for part in PACKED]
    assert read_bytes(LLAMA, [EMBEDDING, *parts, MATRIX, NORM]) == PACKED_BYTES + MATRIX.nbytes + NORM.nbytes


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "model.vision_tower.std_bias",
        "model.embed_vision.embedding_projection.weight", "mtp.layers.0.mlp.up_proj.weight",
        "model.embed_tokens_per_layer.weight",
    ],
)  # fmt: skip
def test_what_decoding_does_not_read_does_not_count(name: str) -> None:
    tensors = [EMBEDDING, MATRIX, *PACKED, NORM]
    assert read_bytes(LLAMA, [*tensors, Tensor(name, (64, 64))]) == read_bytes(LLAMA, tensors)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 0.25),
        ({"text_config": {"num_experts": 128, "top_k_experts": 8}}, 0.0625),
        ({"num_experts": 4}, 0.0),  # how many a token uses is not known: a ceiling must not be too low
    ],
)
def test_of_experts_those_of_one_token_count(config: dict[str, Any], share: float) -> None:
    experts = Tensor("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 64))
    router = Tensor("model.layers.0.mlp.gate.weight", (8, 64))
    expected = EMBEDDING.nbytes + router.nbytes + share * experts.nbytes
    assert read_bytes(config, [EMBEDDING, router, experts]) == expected


@pytest.mark.parametrize(
    ("config", "dtype", "size"),
    [
        ({}, "auto", 2), ({}, "fp8", 1), ({}, "fp8_e4m3", 1), ({}, "bfloat16", 2),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "auto", 1),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "bfloat16", 2),
        ({"quantization_config": {"kv_cache_scheme": None}}, "auto", 2),
    ],
)  # fmt: skip
def test_bytes_of_a_cached_value(config: dict[str, Any], dtype: str, size: int) -> None:
    assert kv_bytes_per_value(config, dtype) == size
