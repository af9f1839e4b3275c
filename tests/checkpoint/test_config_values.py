"""Numbers of a config are whole and within reason, and no size is beyond the tensors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.config_sizes import check_sizes
from nvquant.checkpoint.config_values import config_int, config_kinds, config_largest, config_part
from nvquant.checkpoint.headers import TensorInfo
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from nvquant.plan.forecast import kv_cache_bytes
from nvquant.recipe.roles import share_of_experts, unused_tensors
from support.tiny_models import tiny_llama

NO_NUMBERS: list[Any] = [{}, [], [3], "3", "", True, 2.5, -1, 1e308, 10**13, "x" * 70_000, {"a": {}}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_what_is_no_number_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(InputError, match=r"^config\.json: head_dim is .*, not a whole number from 0 to ") as caught:
        config_int({"head_dim": value}, "head_dim")
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_numbers_are_read_and_absent_ones_have_a_default() -> None:
    config: dict[str, Any] = {"a": 7, "b": None, "c": 0, "d": 4.0, "e": [1, 9, 3]}
    assert [config_int(config, key, 5) for key in "abcdz"] == [7, 5, 5, 4, 5]
    assert config_largest(config, "e") == 9 and config_largest(config, "a") == 7 and config_largest(config, "z", 2) == 2
    assert config_kinds({"layer_types": ["x", "y"]}) == ["x", "y"] and config_kinds({}) == []
    assert config_part({"p": {"q": 1}}, "p") == {"q": 1} and config_part({"p": [1]}, "p") == {}
    for kinds in ("full", [["x"]], {}, 3):
        with pytest.raises(InputError, match="layer_types is"):
            config_kinds({"layer_types": kinds})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_kv_shared_layers", "sliding_window", "num_attention_heads"])
@pytest.mark.parametrize("value", [{}, [1], "x", 10**13], ids=repr)
def test_every_reader_of_a_config_refuses_what_is_no_number(key: str, value: Any) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, key: value}
    with pytest.raises(InputError, match=f"config.json: {key} is"):
        unused_tensors(config, [])
        kv_cache_bytes(config, 100)


def test_a_billion_layers_make_no_list() -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="num_hidden_layers is 1000000000, not a whole number from 0 to 10,000"):
        kv_cache_bytes({"num_hidden_layers": 10**9, "hidden_size": 64}, 100)
    assert time.monotonic() - began < 5


def test_numbers_of_experts_are_numbers() -> None:
    assert share_of_experts({"num_experts": 8, "num_experts_per_tok": 2}) == 0.25
    with pytest.raises(InputError, match="num_local_experts is"):
        share_of_experts({"num_local_experts": [8]})


BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000, but the weights have 2 layers"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is 1000000000"),
    ({"vision_config": {"depth": 10**6}}, "vision_config.depth is 1000000"),
    ({"num_layers": 10**9}, "num_layers is 1000000000"),
    ({"vocab_size": 10**9}, "vocab_size is 1000000000, but no tensor has an axis of more than 384"),
    ({"head_dim": 10**8}, "head_dim is 100000000"),
    ({"num_experts": 10**9}, "num_experts is 1000000000"),
    ({"num_labels": 10**9}, "num_labels is 1000000000"),
    ({"intermediate_size": [128, 10**10]}, "intermediate_size is 10000000000"),
    ({"a": {"b": {"hidden_size": 10**8}}}, "b.hidden_size is 100000000"),
    ({"n_positions": 10**6}, "n_positions is 1000000, but the position tables have 64 rows"),
]


@pytest.mark.parametrize(("config", "words"), BEYOND, ids=[words[:24] for _, words in BEYOND])
def test_a_size_beyond_the_tensors_is_refused(config: dict[str, Any], words: str) -> None:
    infos = [
        TensorInfo("model.embed.weight", "BF16", (384, 64), 0, 384 * 64 * 2),
        TensorInfo("model.layers.1.mlp.up_proj.weight", "BF16", (128, 64), 0, 128 * 64 * 2),
        TensorInfo("wpe.weight", "BF16", (64, 64), 0, 64 * 64 * 2),
    ]
    with pytest.raises(InputError) as caught:
        check_sizes(config, infos)
    assert words in str(caught.value)


def test_large_numbers_that_build_nothing_are_left_alone() -> None:
    info = TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (128, 64), 0, 128 * 64 * 2)
    check_sizes(
        {
            "max_position_embeddings": 10_485_760,
            "rope_theta": 10_000_000,
            "model_max_length": 10**30,
            "eos_token_id": [10**6, 2],
            "sliding_window": 10**7,
            "vocab_size": 262_144,
            "vision_config": {"num_hidden_layers": 27, "image_size": 896, "hidden_size": 1152},
            "quantization_config": {"head_dim": 10**12},
        },
        [info],
    )


def test_a_folder_with_such_a_config_is_not_opened(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="num_hidden_layers is 1000000000, but the weights have"):
        open_checkpoint(folder)
