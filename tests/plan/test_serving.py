"""Serving under every recipe: weights, KV cache and ceiling against arithmetic by hand, on the real shapes of a 31B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.errors import CheckFailed, InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.forecast import kv_cache_bytes
from nvquant.plan.gpus import GPUS
from nvquant.plan.plan import Plan
from nvquant.plan.serving import Load, OnGpu, Refused, Row, Serving, as_json, forecast_serving
from nvquant.recipe.load import load_recipe, shipped_recipes
from support.synthetic_gemma4 import write_synthetic_gemma4

Tiny = Callable[[str], Checkpoint]
CONTEXT = 65536
# K and V of 10 full layers with 4 heads of 512 (which compute both from k_proj), and of 50 sliding layers with 16 heads
# of 256 and a window of 1024; one byte each.
KV_31B_FP8 = 10 * 2 * 4 * 512 * 65536 + 50 * 2 * 16 * 256 * 1024
TOWERS_31B = 1_139_100_768 + 12_386_304
OUTPUT_31B = {
    "BF16": 62_546_177_752,
    "nvfp4": 32_633_255_032,
    "nvfp4-full": 20_446_509_992,
    "nvfp4-a16": 20_446_508_352,
}
OVERHEAD = 1_500_000_000


def forecast(
    source: Checkpoint, load: Load, recipes: list[str] | None = None, layout: str = "compressed-tensors"
) -> Serving:
    chosen = [load_recipe(name) for name in recipes or shipped_recipes()]
    return forecast_serving(source, chosen, LAYOUTS[layout], "model", load)


def rows_of(serving: Serving) -> dict[str, Row]:
    return {row.name: row for row in serving.rows if isinstance(row, Row)}


def on(row: Row, gpu: str) -> OnGpu:
    return next(found for found in row.gpus if found.gpu == gpu)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The 31B, whose files are gone: a forecast opens none of them again."""
    source = open_checkpoint(write_synthetic_gemma4(tmp_path_factory.mktemp("31b")))
    for shard in source.folder.glob("*.safetensors"):
        shard.unlink()
    return source


@pytest.fixture(scope="module")
def at_64k(large: Checkpoint) -> Serving:
    return forecast(large, Load(CONTEXT, 1, "fp8"))


def test_the_kv_cache_of_the_31b_at_64k_is_that_worked_out_by_hand(large: Checkpoint) -> None:
    assert KV_31B_FP8 == 2_684_354_560 + 419_430_400 == 3_103_784_960
    assert kv_cache_bytes(large.config, CONTEXT, 1) == KV_31B_FP8
    assert kv_cache_bytes(large.config, CONTEXT) == 6_207_569_920
    (row, *_) = rows_of(forecast(large, Load(CONTEXT, 8, "bf16"))).values()
    assert row.kv_bytes == 8 * 6_207_569_920


def test_layers_that_share_keys_and_values_store_none_and_their_unused_matrices_are_not_loaded(tiny: Tiny) -> None:
    load = Load(100, 3, "fp8")
    stored, absent = (rows_of(forecast(tiny(name), load)) for name in ("gemma4_e2b_unused_kv", "gemma4_e2b"))
    # Layers 0 to 4 of 8 store: four sliding ones with a window of 16 and heads of 32, a full one with heads of 64.
    assert {row.kv_bytes for row in stored.values()} == {3 * 2 * (4 * 32 * 16 + 64 * 100)}
    assert sum(info.nbytes for info in tiny("gemma4_e2b").infos().values()) == absent["BF16"].weight_bytes
    assert {name: row.weight_bytes for name, row in stored.items()} == {
        name: row.weight_bytes for name, row in absent.items()
    }


def test_memory_is_weights_cache_and_overhead(at_64k: Serving) -> None:
    rows = rows_of(at_64k)
    assert list(rows) == ["BF16", *shipped_recipes()]
    assert at_64k.tower_bytes == TOWERS_31B
    for name, size in OUTPUT_31B.items():
        assert rows[name].weight_bytes == size
        assert rows[name].read_bytes == size - TOWERS_31B, "the embedding is the head, so it is read"
        assert rows[name].total_bytes == size + KV_31B_FP8 + OVERHEAD


def test_a_card_of_32_gb_serves_64k_with_an_fp8_cache_under_nvfp4_full_but_not_nvfp4(at_64k: Serving) -> None:
    rows = rows_of(at_64k)
    card = {name: on(rows[name], "RTX 5090") for name in OUTPUT_31B}
    assert {name: (found.fits, found.fits_by_default) for name, found in card.items()} == {
        "BF16": (False, False),
        "nvfp4": (False, False),
        "nvfp4-full": (True, True),
        "nvfp4-a16": (True, True),
    }
    assert card["nvfp4"].tokens_per_second is None
    small = on(rows["nvfp4-full"], "RTX 4090")
    assert (small.fits, small.fits_by_default) == (True, False), "25.05 of 25.76 GB"


@pytest.mark.parametrize(
    ("name", "context", "rate"),
    # 1.79 TB/s over 61.4, 31.5 and 19.3 GB of weights, and 3.1 GB of cache at 64K
    [
        ("BF16", CONTEXT, 28),
        ("nvfp4", 1, 57),
        ("nvfp4", CONTEXT, 52),
        ("nvfp4-full", 1, 93),
        ("nvfp4-full", CONTEXT, 80),
    ],
)
def test_the_ceiling_of_one_user(large: Checkpoint, name: str, context: int, rate: int) -> None:
    found = on(rows_of(forecast(large, Load(context, 1, "fp8")))[name], "RTX PRO 6000")
    assert found.tokens_per_second == found.tokens_per_second_alone
    assert round(found.tokens_per_second or 0) == rate


def test_users_share_the_weights_and_not_the_cache(large: Checkpoint) -> None:
    row = rows_of(forecast(large, Load(CONTEXT, 8, "fp8")))["nvfp4"]
    found, read = on(row, "RTX PRO 6000"), OUTPUT_31B["nvfp4"] - TOWERS_31B
    assert found.tokens_per_second == pytest.approx(1792e9 * 8 / (read + 8 * KV_31B_FP8))
    assert found.tokens_per_second_alone == pytest.approx(1792e9 / (read + KV_31B_FP8))
    assert not on(row, "L40S").fits


def test_a_recipe_of_any_name_is_a_row(large: Checkpoint) -> None:
    mine = load_recipe("nvfp4").model_copy(update={"name": "mine"})
    serving = forecast_serving(large, [mine], LAYOUTS["modelopt"], "model", Load(1))
    assert list(rows_of(serving)) == ["BF16", "mine"]
    assert not serving.refuses("mine")


def test_a_recipe_that_does_not_fit_is_a_row_with_the_reason(tiny: Tiny) -> None:
    serving = forecast(tiny("gemma4_moe"), Load(64))
    assert list(rows_of(serving)) == ["BF16"]
    refused = [row for row in serving.rows if isinstance(row, Refused)]
    assert [row.recipe for row in refused] == shipped_recipes()
    assert all(row.reason.startswith("model is a mixture of experts") for row in refused)
    assert all(serving.refuses(name) for name in shipped_recipes())


def test_a_plan_that_the_conversion_refuses_is_a_row_with_the_reason(tiny: Tiny) -> None:
    def check(plan: Plan) -> None:
        raise CheckFailed(f"{plan.recipe.name} fails: try another one.")

    recipes = [load_recipe("nvfp4")]
    serving = forecast_serving(tiny("llama"), recipes, LAYOUTS["modelopt"], "model", Load(64), check)
    assert serving.rows[1:] == (Refused("nvfp4", "nvfp4 fails: try another one."),)


def test_a_context_beyond_the_model_s_and_a_quantized_source_are_refused(tiny: Tiny) -> None:
    source = tiny("llama")
    limit = source.config["max_position_embeddings"]
    forecast(source, Load(limit))
    with pytest.raises(InputError, match=rf"--context {limit + 1}: the model supports {limit} tokens: use --context"):
        forecast(source, Load(limit + 1))
    quantized = replace(source, config={**source.config, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(InputError, match=r"quantization_config of config\.json names fp8"):
        forecast(quantized, Load(64))


def test_the_document_has_exactly_these_keys(tiny: Tiny) -> None:
    document = as_json(forecast(tiny("gemma4"), Load(64, 2, "fp8"), ["nvfp4"]))
    assert list(document) == ["context", "users", "kv_cache", "overhead_bytes", "tower_bytes", "rows"]
    assert [document[key] for key in ("context", "users", "kv_cache", "overhead_bytes")] == [64, 2, "fp8", OVERHEAD]
    keys = ["name", "recipe", "weight_bytes", "read_bytes", "kv_bytes", "total_bytes", "gpus", "refused"]
    assert all(list(row) == keys for row in document["rows"])
    assert [(row["name"], row["recipe"]) for row in document["rows"]] == [("BF16", None), ("nvfp4", "nvfp4")]
    gpus = document["rows"][0]["gpus"]
    assert [gpu["gpu"] for gpu in gpus] == list(GPUS)
    assert list(gpus[0]) == [
        *("gpu", "memory_bytes", "fits", "fits_by_default", "tokens_per_second", "tokens_per_second_alone")
    ]
    refused = as_json(forecast(tiny("gemma4_moe"), Load(64), ["nvfp4"]))["rows"][1]
    assert list(refused) == keys
    assert refused["weight_bytes"] is None and refused["gpus"] == [] and "mixture of experts" in refused["refused"]


def test_a_gpu_has_a_size_near_its_memory_and_a_bandwidth() -> None:
    assert all(0.93 < kind.memory_bytes / 2**30 / kind.size_gb < 1.03 for kind in GPUS.values())
    assert all(200e9 < kind.bandwidth_bytes <= 8000e9 for kind in GPUS.values())
