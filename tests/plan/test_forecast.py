"""Forecasts: the census, the KV cache worked out by hand, the GPUs that fit, the memory of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.forecast import (
    as_json,
    census,
    fits,
    fixed_memory,
    forecast_memory,
    kv_cache_bytes,
    serving_bytes,
)
from nvquant.plan.gpus import GPUS, GpuModel
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe
from support import synthetic_gemma4

Tiny = Callable[[str], Checkpoint]
TOKENS = 8192
# 50 sliding layers of 16 heads of 256 with a window of 1024, 10 full layers of 4 heads of 512; K and V, 2 bytes each.
KV_31B = 50 * 2 * 2 * 16 * 256 * 1024 + 10 * 2 * 2 * 4 * 512 * 8192


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(synthetic_gemma4.write_synthetic_gemma4(tmp_path_factory.mktemp("31b")))


def planned(source: Checkpoint, recipe: str, layout: str = "compressed-tensors") -> Plan:
    chosen = load_recipe(recipe).model_copy(update={"experts": "bf16"})
    return compute_plan(source, chosen, LAYOUTS[layout], "model")


def as_transformers_writes_it(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with `per_layer_config` for the full layers instead of the two `global` keys."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    own = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    text["per_layer_config"] = {f"{i:02d}": own for i in full}
    return config


def test_kv_cache_of_the_31b_is_that_worked_out_by_hand() -> None:
    assert KV_31B == 1_509_949_440
    released = synthetic_gemma4.config()
    assert kv_cache_bytes(released, TOKENS) == KV_31B
    assert kv_cache_bytes(as_transformers_writes_it(released), TOKENS) == KV_31B
    assert kv_cache_bytes(released, 512) == 512 * (50 * 4 * 16 * 256 + 10 * 4 * 4 * 512), "shorter than the window"


@pytest.mark.parametrize(
    ("config", "tokens", "size"),
    [
        # Llama: 2 layers, 2 KV heads of 16.
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, 100, 25_600),
        # No head_dim and no KV heads: 64 / 4 = 16, 4 heads.
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 100, 51_200),
        # A window without layer types says nothing about which layers have it.
        (
            {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8, "sliding_window": 10},
            100,
            2 * 2 * 8 * 100,
        ),
        (
            {
                "num_hidden_layers": 3,
                "num_attention_heads": 1,
                "head_dim": 8,
                "sliding_window": 10,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            100,
            2 * 2 * 8 * (10 + 100 + 10),
        ),
        # The last of three layers uses another's keys and values.
        (
            {
                "num_hidden_layers": 3,
                "num_attention_heads": 1,
                "head_dim": 8,
                "num_kv_shared_layers": 1,
                "sliding_window": 10,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            100,
            2 * 2 * 8 * (10 + 100),
        ),
        ({}, 100, 0),
    ],
)
def test_kv_cache_of_small_configs(config: dict[str, Any], tokens: int, size: int) -> None:
    assert kv_cache_bytes(config, tokens) == size
    assert kv_cache_bytes({"text_config": config}, tokens) == size


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-full", "nvfp4-a16"])
@pytest.mark.parametrize("model", ["llama", "phi3", "gemma4", "gemma4_e2b_unused_kv", "gemma4_moe"])
def test_groups_add_up_to_the_totals(tiny: Tiny, model: str, recipe: str, layout: str) -> None:
    plan = planned(tiny(model), recipe, layout)
    groups = census(plan)
    assert sum(group.tensors for group in groups) == plan.tensors
    assert sum(group.bytes_out for group in groups) == plan.tensor_bytes
    assert sum(group.bytes_in for group in groups) == sum(info.nbytes for info in tiny(model).infos().values())
    assert len({(group.name, group.scheme) for group in groups}) == len(groups)


def test_the_census_of_the_31b_is_that_of_its_parts(large: Checkpoint) -> None:
    found = {(g.name, g.scheme): (g.tensors, g.bytes_in, g.bytes_out) for g in census(planned(large, "nvfp4-full"))}
    assert found == {
        ("embedding", "BF16"): (1, 2_818_572_288, 2_818_572_288),
        ("other text", "BF16"): (421, 2_663_032, 2_663_032),
        ("text MLP", "nvfp4"): (720, 41_617_981_440, 20_808_990_720 * 9 // 16 + 180 * 8),
        ("text attention", "nvfp4"): (920, 16_955_473_920, 8_477_736_960 * 9 // 16 + 230 * 8),
        ("vision and audio", "BF16"): (355, 1_139_100_768, 1_139_100_768),
        ("projector", "BF16"): (1, 12_386_304, 12_386_304),
    }


def test_only_nvfp4_full_fits_a_card_of_32_gb(large: Checkpoint) -> None:
    mlp, full = planned(large, "nvfp4"), planned(large, "nvfp4-full")
    assert serving_bytes(mlp) == 32_633_255_032 + KV_31B + 1_500_000_000
    assert serving_bytes(full) == 20_446_509_992 + KV_31B + 1_500_000_000
    by_gpu = {
        fit.gpu: (fit.memory_bytes, fit.fits, other.fits) for fit, other in zip(fits(mlp), fits(full), strict=True)
    }
    assert by_gpu["RTX 5090"] == (32607 << 20, False, True)
    assert by_gpu["RTX 5060 Ti 16 GB"][1:] == (False, False)
    assert by_gpu["H200"] == (143771 << 20, True, True)
    assert list(by_gpu) == list(GPUS)


def test_a_gpu_fits_to_the_byte(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tiny("llama"), "nvfp4")
    needed = serving_bytes(plan)
    above = -(-needed // (1 << 20))
    sizes = {"enough": above, "too small": above - 1}
    monkeypatch.setattr("nvquant.plan.forecast.GPUS", {name: GpuModel(mib, 1, 1) for name, mib in sizes.items()})
    assert [fit.fits for fit in fits(plan)] == [True, False]


def test_memory_of_converting_the_31b_stays_within_8_gb(large: Checkpoint) -> None:
    for recipe in ("nvfp4", "nvfp4-full", "nvfp4-a16"):
        memory = forecast_memory(planned(large, recipe), 128, 2048, 1, gpu=True)
        assert 2e9 < memory.host_bytes <= 8e9
        assert 2e9 < memory.gpu_bytes <= 8e9
    on_cpu = forecast_memory(planned(large, "nvfp4-a16"), 128, 2048, 1, gpu=False)
    assert on_cpu.gpu_bytes == 0
    assert 2e9 < on_cpu.host_bytes <= 8e9


def test_what_is_in_flight_at_once_is_counted(large: Checkpoint) -> None:
    """Two layers and two outputs, one in use and one on its way; they are the larger part of a weight-only run."""
    layer = 1_068_019_714  # of a sliding layer, the larger kind
    for recipe, output in (("nvfp4", 569_471_002), ("nvfp4-full", 300_412_978), ("nvfp4-a16", 300_412_954)):
        plan = planned(large, recipe)
        on_gpu, on_cpu = fixed_memory(plan, 0, gpu=True), fixed_memory(plan, 0, gpu=False)
        assert on_gpu.gpu_bytes >= 2 * layer + output
        assert on_gpu.host_bytes >= 2 * output
        assert on_cpu.host_bytes >= 2 * layer + 2 * output


def test_a_weight_only_run_needs_nothing_for_calibration(tiny: Tiny) -> None:
    plan = planned(tiny("llama"), "nvfp4-a16")
    for gpu in (True, False):
        assert forecast_memory(plan, 128, 2048, 1, gpu) == forecast_memory(plan, 1, 1, 8, gpu)
        assert forecast_memory(plan, 128, 2048, 1, gpu) == fixed_memory(plan, 0, gpu)
    assert fixed_memory(plan, 0, False).host_bytes < fixed_memory(plan, 1, False).host_bytes
    assert fixed_memory(plan, 0, True).gpu_bytes < fixed_memory(plan, 1, True).gpu_bytes
    assert fixed_memory(plan, 0, False).host_bytes < fixed_memory(plan, 1, False).host_bytes
    assert fixed_memory(plan, 0, True).gpu_bytes < fixed_memory(plan, 1, True).gpu_bytes


@pytest.mark.parametrize("gpu", [True, False])
def test_hidden_states_are_what_the_forecast_adds_to_the_fixed_part(tiny: Tiny, gpu: bool) -> None:
    plan = planned(tiny("gemma4"), "nvfp4")  # hidden size 64; BF16 on a GPU, float32 on a CPU
    fixed, whole = fixed_memory(plan, 2 * 256, gpu), forecast_memory(plan, 10, 256, 2, gpu)
    added = (whole.host_bytes - fixed.host_bytes, whole.gpu_bytes - fixed.gpu_bytes)
    assert added == ((0, 10 * 256 * 64 * 2) if gpu else (10 * 256 * 64 * 4, 0))


def test_memory_grows_with_what_it_depends_on(tiny: Tiny) -> None:
    plan = planned(tiny("llama"), "nvfp4")
    base = forecast_memory(plan, 128, 2048, 1, gpu=True)
    for sizes in ((256, 2048, 1), (128, 4096, 1), (128, 2048, 8)):
        assert forecast_memory(plan, *sizes, gpu=True).gpu_bytes > base.gpu_bytes
    on_cpu = forecast_memory(plan, 128, 2048, 1, gpu=False)
    assert on_cpu.gpu_bytes == 0
    # Hidden states of 128 * 2048 tokens of 64 float32 numbers wait in host memory.
    assert on_cpu.host_bytes > 900_000_000 + 128 * 2048 * 64 * 4


def test_the_json_document_has_exactly_these_keys(tiny: Tiny) -> None:
    plan = planned(tiny("gemma4"), "nvfp4", "modelopt")
    document = as_json(plan, forecast_memory(plan, 4, 64, 1, gpu=False))
    assert list(document) == [
        *("model", "commit", "source_form", "casts", "recipe", "format", "tensors", "tensor_bytes", "quantized"),
        *("groups", "kept_shares", "memory", "fits"),
    ]
    assert [document[key] for key in ("model", "recipe", "format", "tensors", "tensor_bytes", "quantized")] == [
        *("model", "nvfp4", "modelopt", 116 + 3 * 18, 523_164, 18)
    ]
    assert all(list(group) == ["name", "scheme", "tensors", "bytes_in", "bytes_out"] for group in document["groups"])
    assert list(document["memory"]) == ["host_bytes", "gpu_bytes"]
    assert all(list(fit) == ["gpu", "memory_bytes", "fits"] for fit in document["fits"])
    assert all(type(fit["fits"]) is bool for fit in document["fits"])


def test_a_config_that_says_little_is_no_obstacle(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama")
    bare = Checkpoint(source.folder, {"model_type": "llama"}, source.shards, source.files)
    plan = planned(bare, "nvfp4")
    assert serving_bytes(plan) == plan.tensor_bytes + 1_500_000_000
    assert forecast_memory(plan, 1, 64, 1, gpu=True).host_bytes > 0
