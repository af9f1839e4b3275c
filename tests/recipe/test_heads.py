"""Which tensors the head and the embedding are, and whether the model's class makes them one."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from nvquant.recipe.heads import is_tied, stored_head, tie_of, token_embedding

FLAGS = (None, True, False)
COMPOSITES = ("gemma3", "gemma4", "qwen3_vl", "qwen3_5", "llava", "mistral3", "qwen2_5_vl")


def flagged(kind: str, top: bool | None, text: bool | None, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{} if flag is None else {"tie_word_embeddings": flag} for flag in (top, text)]
    return {"model_type": kind, **parts[0], "text_config": parts[1], **more}


@pytest.mark.parametrize("kind", COMPOSITES)
def test_of_a_composite_model_it_is_what_transformers_makes_of_the_whole_config(kind: str) -> None:
    for top in FLAGS:
        for text in FLAGS:
            config = flagged(kind, top, text)
            made: Any = transformers.CONFIG_MAPPING[kind](**{k: v for k, v in config.items() if k != "model_type"})
            assert tie_of(config) is made.tie_word_embeddings, (top, text)


@pytest.mark.parametrize(("kind", "default"), [("llama", False), ("gemma2", True), ("gpt2", True), ("qwen2", False)])
def test_where_nothing_is_written_the_class_has_its_own_default(kind: str, default: bool) -> None:
    assert tie_of({"model_type": kind}) is default
    for stated in (True, False):
        assert tie_of({"model_type": kind, "tie_word_embeddings": stated}) is stated


def test_numbers_of_a_config_are_not_handed_to_its_class() -> None:
    assert tie_of(flagged("gemma3", None, None, num_hidden_layers=10**12)) is True
    assert tie_of({"model_type": "gemma2", "num_hidden_layers": 10**12, "layer_types": 3}) is True


def test_of_a_class_that_nobody_knows_only_what_is_written_counts() -> None:
    assert tie_of({"model_type": "unheard_of"}) is None and not is_tied({"model_type": "unheard_of"})
    assert tie_of({}) is None
    assert tie_of(flagged("unheard_of", None, True)) is True
    assert tie_of(flagged("unheard_of", False, True)) is False


LAYER = {"model.layers.0.mlp.up_proj.weight": (128, 64), "model.layers.0.mlp.down_proj.weight": (64, 128)}


def test_of_several_tables_the_embedding_is_that_of_tokens() -> None:
    gemma3n = {
        "model.embed_tokens_per_layer.weight": (600, 512),
        "model.embed_tokens.weight": (512, 64),
        "vision_tower.embeddings.position_embedding.weight": (1024, 64),
        **LAYER,
    }
    assert token_embedding(gemma3n, {"hidden_size": 64}) == "model.embed_tokens.weight"
    gpt2 = {"transformer.wpe.weight": (64, 32), "transformer.wte.weight": (512, 32), "transformer.h.0.ln.weight": (3,)}
    assert token_embedding(gpt2, {}) == "transformer.wte.weight"
    assert token_embedding({"transformer.ln.weight": (3,)}, {}) is None


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight"]
)
def test_the_head_is_the_one_nearest_to_the_top(name: str) -> None:
    assert stored_head({"mtp.model.inner.lm_head.weight": (512, 64), name: (512, 64), **LAYER}) == name


def test_a_head_in_a_layer_that_only_drafts_is_none_of_the_models() -> None:
    assert stored_head({"model.layers.1.shared_head.lm_head.weight": (512, 64), **LAYER}) is None
