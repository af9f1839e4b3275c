"""Conversions with an FP8 KV cache: what the manifest records of keys and values, and the scales that they get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.kv_cache import cache_bounds
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.convert.relayout import relayout
from nvquant.errors import InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.forecast import census
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import KvCache, Recipe
from nvquant.stream.manifest import AttentionRecord, CachedRecord, read_manifest
from nvquant.stream.scalars import cache_scale, clipped
from nvquant.verify.structure import verify_structure
from safetensors.torch import load_file, save_file
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    TinyModels,
    calibration_of,
    contents,
    converted,
    planned,
    random_samples,
    tensors_in,
    write_ids,
)
from support.launching import WarmRanks
from support.tiny_hybrids import tiny_latent
from support.tiny_models import tiny_llama

LAYOUTS_BOTH = (COMPRESSED_TENSORS, MODELOPT)


def with_cache(dtype: str, recipe: str = "nvfp4-full") -> Recipe:
    return load_recipe(recipe).model_copy(update={"kv_cache": KvCache(dtype=dtype), "experts": "bf16"})


def records_of(folder: Path) -> dict[str, AttentionRecord]:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert not isinstance(manifest, str)
    return manifest.attention


def cached_by_transformers(folder: Path) -> list[dict[str, float]]:
    """The amaxes of keys and values in transformers' own cache, over the samples of `converted`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[dict[str, float]] = []
    for ids in random_samples():
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(input_ids=ids.unsqueeze(0), past_key_values=cache, use_cache=True)
        found = found or [{"k": 0.0, "v": 0.0} for _ in cache.layers]
        for amaxes, layer in zip(found, cache.layers, strict=True):
            for half, part in (("k", layer.keys), ("v", layer.values)):
                amaxes[half] = max(amaxes[half], float(part.abs().max()))
    return found


def verdicts(folder: Path, source: Path | None = None) -> dict[str, list[str]]:
    """The faults of the checks that failed, by check."""
    report = verify_structure(folder, source)
    return {check.name: list(check.finding.faults) for check in report.checks if not check.passed}


def kv_words(folder: Path) -> str:
    return next(check.finding.looked_at for check in verify_structure(folder).checks if check.name == "kv_cache")


def grown(folder: Path, halves: dict[str, float]) -> Path:
    """A tiny Llama whose keys or values are larger by a factor.

    Args:
        halves: the factor of each.
    """
    tiny_llama(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            for half, factor in halves.items():
                if name.endswith(f"{half}_proj.weight"):
                    tensors[name] = (tensor.float() * factor).to(tensor.dtype)
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


# Unit scales, with a certificate


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma4", "gemma4_e2b"])
def test_the_manifest_has_a_bound_or_what_calibration_saw_of_every_layer(
    tiny: TinyModels, tmp_path: Path, name: str
) -> None:
    folder = converted(tiny(name), tmp_path / "out", with_cache("fp8"))
    records = records_of(folder)
    layers = json.loads((tiny(name) / "config.json").read_text())
    assert len(records) == layers.get("text_config", layers)["num_hidden_layers"]
    for module, record in records.items():
        for half in ("k", "v"):
            one: CachedRecord = getattr(record, half)
            is_normed = name.startswith("gemma4") or (name == "qwen3" and half == "k")
            assert (one.bound is not None, one.observed is not None) == (is_normed, not is_normed), (module, half)
    assert verdicts(folder, tiny(name)) == {}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_is_observed_is_what_transformers_caches(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    records = records_of(converted(tiny(name), tmp_path / "out", with_cache("fp8")))
    expected = cached_by_transformers(tiny(name))
    for record, amaxes in zip(records.values(), expected, strict=True):
        for half in ("k", "v"):
            one: CachedRecord = getattr(record, half)
            if one.observed is not None:
                assert one.observed == pytest.approx(amaxes[half], rel=1e-4)
            else:
                assert one.bound is not None
                assert amaxes[half] <= one.bound


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_unit_scales_change_no_tensor(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    plain = converted(tiny(name), tmp_path / "plain")
    cached = converted(tiny(name), tmp_path / "cached", with_cache("fp8"))
    different = {file for file, data in contents(plain).items() if contents(cached)[file] != data}
    assert different == {"config.json", "nvquant_manifest.json"}


def test_without_calibration_bounds_are_proved_and_the_rest_is_unknown(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = with_cache("fp8", "nvfp4-a16")
    normed = converted(tiny("gemma4"), tmp_path / "gemma4", recipe)
    assert all(record.k.bound and record.v.bound for record in records_of(normed).values())
    assert kv_words(normed).startswith("FP8 scheme, 0 scales; keys and values: 12 proved to be at most 8.06")
    plain = converted(tiny("llama"), tmp_path / "llama", recipe)
    assert set(records_of(plain).values()) == {AttentionRecord(k=CachedRecord(), v=CachedRecord())}
    assert kv_words(plain) == "FP8 scheme, 0 scales; keys and values: 6 neither proved nor observed"
    assert verdicts(plain) == {}


def test_verify_proves_the_bounds_of_other_tools_checkpoints(tiny: TinyModels, tmp_path: Path) -> None:
    folder = converted(tiny("gemma4"), tmp_path / "out", with_cache("fp8", "nvfp4-a16"))
    (folder / "nvquant_manifest.json").unlink()
    assert "12 proved to be at most 8.06" in kv_words(folder)


def test_a_cache_that_clips_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = grown(tmp_path / "model", {"v": 2048.0})
    with caplog.at_level("WARNING", "nvquant"):
        folder = converted(source, tmp_path / "out", with_cache("fp8"))
    told = [record.getMessage() for record in caplog.records if record.name == "nvquant.convert"]
    assert len(told) == 3
    assert told[0].startswith("The values of model.layers.0.self_attn reach ")
    faults = verdicts(folder)
    assert set(faults) == {"kv_cache"}
    assert len(faults["kv_cache"]) == 3
    assert faults["kv_cache"][0].startswith("the values of model.layers.0.self_attn reach ")
    assert "convert again with kv_cache: {dtype: fp8-calibrated}" in faults["kv_cache"][0]


# Calibrated scales


@pytest.mark.parametrize("layout", LAYOUTS_BOTH)
@pytest.mark.parametrize("factor", [1.0, 2048.0, 2.0**-12])
def test_calibrated_scales_are_unit_where_that_suffices(tmp_path: Path, layout: str, factor: float) -> None:
    source = grown(tmp_path / "model", {"v": factor})
    folder = converted(source, tmp_path / "out", with_cache("fp8-calibrated"), layout)
    tensors, expected = tensors_in(folder), cached_by_transformers(source)
    for layer, amaxes in enumerate(expected):
        for half in ("k", "v"):
            beside = f"{half}_proj." if layout == MODELOPT else ""
            scale = tensors[f"model.layers.{layer}.self_attn.{beside}{half}_scale"]
            assert scale.dtype == torch.float32
            assert scale.shape == LAYOUTS[layout].scalar_shape
            if half == "k" or factor == 1:
                assert float(scale) == 1
            else:
                assert float(scale) == pytest.approx(2 * amaxes["v"] / 448, rel=1e-4)
    assert verdicts(folder, source) == {}


@pytest.mark.parametrize("layout", LAYOUTS_BOTH)
@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b"])
def test_layers_without_own_values_get_scales_under_the_modules_name(
    tiny: TinyModels, tmp_path: Path, name: str, layout: str
) -> None:
    """Servers drop the names beside matrices that they do not read, and copy a key's scale to values that it makes."""
    folder = converted(tiny(name), tmp_path / "out", with_cache("fp8-calibrated"), layout)
    tensors = tensors_in(folder)
    config = json.loads((tiny(name) / "config.json").read_text())["text_config"]
    shared = config.get("num_kv_shared_layers") or 0
    for layer, kind in enumerate(config["layer_types"]):
        module = f"model.language_model.layers.{layer}.self_attn"
        is_own = layer < len(config["layer_types"]) - shared and not (
            config["attention_k_eq_v"] and kind == "full_attention"
        )
        beside = layout == MODELOPT and is_own
        for half in "kv":
            own, other = f"{module}.{half}_scale", f"{module}.{half}_proj.{half}_scale"
            assert (own in tensors, other in tensors) == (not beside, beside)
    assert verdicts(folder, tiny(name)) == {}


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
@pytest.mark.parametrize("layout", LAYOUTS_BOTH)
def test_relayout_gives_the_bytes_of_a_conversion_into_the_other_layout(
    tiny: TinyModels, tmp_path: Path, name: str, layout: str
) -> None:
    (other,) = {*LAYOUTS_BOTH} - {layout}
    recipe = with_cache("fp8-calibrated")
    (tmp_path / "expected").mkdir()  # the name of the samples' file, which the manifest has, follows from the output's
    expected = converted(tiny(name), tmp_path / "expected" / "out", recipe, other)
    (tmp_path / "source").mkdir()
    source = converted(tiny(name), tmp_path / "source" / "out", recipe, layout)
    relayout(open_checkpoint(source), LAYOUTS[other], tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == tensors_in(expected).keys()
    assert contents(tmp_path / "out") == contents(expected)


def test_a_weight_only_recipe_with_calibrated_scales_calibrates(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = with_cache("fp8-calibrated", "nvfp4-a16")
    assert planned(tiny("llama"), recipe).needs_calibration
    folder = converted(tiny("llama"), tmp_path / "out", recipe)
    assert all(record.k.observed and record.v.observed for record in records_of(folder).values())
    assert verdicts(folder, tiny("llama")) == {}


def test_the_plan_counts_the_scales(tiny: TinyModels) -> None:
    plain, plan = planned(tiny("llama")), planned(tiny("llama"), with_cache("fp8-calibrated"))
    assert (plan.tensors, plan.tensor_bytes) == (plain.tensors + 6, plain.tensor_bytes + 24)
    row = next(group for group in census(plan) if group.name == "KV cache")
    assert (row.scheme, row.tensors, row.bytes_in, row.bytes_out) == ("fp8", 6, 0, 24)
    assert sum(group.bytes_in for group in census(plan)) == sum(group.bytes_in for group in census(plain))


# Several ranks, and a run that ended


RECIPE = """\
name: cached
quantize: [{modules: [mlp, attention], scheme: nvfp4}]
kv_cache: {dtype: fp8-calibrated}
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """Runs a job on several ranks."""
    with WarmRanks(tmp_path_factory.mktemp("ranks")) as warm:
        yield warm


@pytest.mark.parametrize("name", ["qwen3", "gemma4"])
def test_two_ranks_and_a_resumed_run_give_the_bytes_of_one_run(
    launch: WarmRanks, tiny: TinyModels, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "cached.yaml"
    file.write_text(RECIPE)
    expected = converted(tiny(name), tmp_path / "out", load_recipe(str(file)))
    ids = write_ids(tmp_path / "out.jsonl", random_samples())
    ended = launch(2, source=tiny(name), output=tmp_path / "ranks" / "out", ids=ids, recipe=str(file), quantizer="rtn")
    assert [rank.code for rank in ended] == [0, 0], ended
    assert contents(tmp_path / "ranks" / "out") == contents(expected)

    plan = planned(tiny(name), load_recipe(str(file)))
    samples = calibration_of(tiny(name), ids)

    def stop(now: Progress) -> None:
        if now.layers_done == 1:
            raise Ended

    with pytest.raises(Ended):
        convert(plan, ConvertOptions(tmp_path / "again" / "out", "rtn", progress=stop), samples)
    result = convert(plan, ConvertOptions(tmp_path / "again" / "out", "rtn"), samples)
    assert result.layers_resumed
    assert contents(tmp_path / "again" / "out") == contents(expected)


class Ended(Exception):
    """Ends a run after a layer."""


# What cannot be done


def test_a_latent_cache_gets_no_scales(tmp_path: Path) -> None:
    folder = tiny_latent(tmp_path / "model")
    with pytest.raises(InputError, match=r"no attention modules .* under scales: use kv_cache: \{dtype: fp8\}"):
        planned(folder, with_cache("fp8-calibrated", "nvfp4-a16"))
    assert cache_bounds(planned(folder, with_cache("fp8", "nvfp4-a16"))) == {0: {}, 1: {}, 2: {}}


def test_llm_compressor_does_not_write_the_scales(tiny: TinyModels, tmp_path: Path) -> None:
    from nvquant.convert.second_opinion import refuse_unsupported

    plan = planned(tiny("llama"), with_cache("fp8-calibrated"))
    with pytest.raises(InputError, match="does not write the scales of the KV cache"):
        refuse_unsupported(plan, ConvertOptions(tmp_path / "out", "rtn"))


# The rule


@pytest.mark.parametrize(
    ("record", "scale"),
    [
        (CachedRecord(bound=448.0), 1.0),
        (CachedRecord(bound=1.0), 1.0),
        (CachedRecord(bound=896.0), 2.0),
        (CachedRecord(observed=224.0), 1.0),
        (CachedRecord(observed=0.5), 1.0),
        (CachedRecord(observed=448.0), 2.0),
        (CachedRecord(observed=7.0 / 64), 7.0 / 32 / 448),
        (CachedRecord(observed=0.0), 1.0),
    ],
)
def test_a_scale_follows_from_its_record(record: CachedRecord, scale: float) -> None:
    assert cache_scale(record) == float(torch.tensor(scale))
    assert not clipped(record, cache_scale(record))


@pytest.mark.parametrize(
    ("record", "scale", "is_clipped"),
    [
        (CachedRecord(observed=448.0), 1.0, False),
        (CachedRecord(observed=449.0), 1.0, True),
        (CachedRecord(bound=449.0), 1.0, True),
        (CachedRecord(observed=449.0), 1.01, False),
        (CachedRecord(), 1e-9, False),
    ],
)
def test_what_exceeds_448_scales_is_clipped(record: CachedRecord, scale: float, is_clipped: bool) -> None:
    assert clipped(record, scale) == is_clipped
