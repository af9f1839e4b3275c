"""Conversions of attention to FP8 beside MLPs in NVFP4."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.convert.config import disagreements, quantization_config
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.options import ConvertOptions
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.format.fp8 import dequantize_rows, fp8_scale
from nvquant.recipe.schema import QuantizeEntry, Recipe
from nvquant.stream.manifest import read_manifest
from nvquant.verify.structure import verify_structure
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Conversions,
    TinyModels,
    calibration_of,
    contents,
    converted,
    planned,
    random_samples,
    raw,
    tensors_in,
    write_ids,
)
from support.launching import WarmRanks
from support.synthetic_gemma4 import write_synthetic_gemma4
from torch import Tensor

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
MODELS = ("llama", "gemma4")
RECIPE = "nvfp4-fp8"


def fp8_modules(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name, one in tensors.items() if one.dtype == torch.float8_e4m3fn
            and name.endswith(".weight")]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_attention_is_fp8_and_mlps_are_those_of_nvfp4(
    tiny: TinyModels, done: Conversions, name: str, layout: str
) -> None:
    made, source = tensors_in(done(name, RECIPE, layout)), tensors_in(tiny(name))
    mlp_only = tensors_in(done(name, "nvfp4", layout))
    modules = fp8_modules(made)
    assert modules
    assert all(".self_attn." in module for module in modules)
    beside = {name for name in made if name.rpartition(".")[0] not in modules}
    assert beside == {name for name in mlp_only if name.rpartition(".")[0] not in modules}
    assert all(raw(made[name]) == raw(mlp_only[name]) for name in beside)
    for module in modules:
        decoded = dequantize_rows(made[f"{module}.weight"], made[f"{module}.weight_scale"])
        weight = source[f"{module}.weight"].float()
        assert float((decoded - weight).norm() / weight.norm()) < 0.03


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_scales_have_the_form_of_their_layout(done: Conversions, name: str, layout: str) -> None:
    folder = done(name, RECIPE, layout)
    made = tensors_in(folder)
    for module in fp8_modules(made):
        scales, rows = made[f"{module}.weight_scale"], len(made[f"{module}.weight"])
        assert scales.dtype == torch.float32
        assert tuple(scales.shape) == ((rows, 1) if layout == COMPRESSED_TENSORS else ())
        assert (f"{module}.input_scale" in made) == (layout == MODELOPT)
    manifest = read_manifest(folder)
    assert manifest is not None and not isinstance(manifest, str)
    for group in manifest.groups.values():
        if group.record.scheme == "fp8":
            assert (group.record.input is not None) == (layout == MODELOPT)
            if group.record.input is not None:
                assert group.record.input.calibrated_amax == 2 * group.record.input.observed_amax
                expected = fp8_scale(torch.tensor(group.record.input.calibrated_amax))
                assert {float(made[f"{module}.input_scale"]) for module in group.record.members} == {float(expected)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*MODELS, "gemma4_text", "phi3", "qwen2"])
def test_vllms_rules_read_the_config_as_the_plan(tiny: TinyModels, name: str, layout: str) -> None:
    plan = planned(tiny(name), RECIPE, layout)
    assert disagreements(plan, quantization_config(plan)) == []


def test_a_modelopt_list_has_exactly_the_quantized_modules(tiny: TinyModels) -> None:
    plan = planned(tiny("gemma4"), RECIPE, MODELOPT)
    config = quantization_config(plan)
    assert set(config["quantized_layers"]) == set(plan.matrices)
    algorithms = {module: entry["quant_algo"] for module, entry in config["quantized_layers"].items()}
    assert {a for m, a in algorithms.items() if ".mlp." in m} == {"NVFP4"}
    assert {a for m, a in algorithms.items() if ".self_attn." in m} == {"FP8"}
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(plan.matrices)


# compressed-tensors' own library


@pytest.mark.parametrize("name", MODELS)
def test_compressed_tensors_makes_the_same_codes_and_decodes_them_alike(
    tiny: TinyModels, done: Conversions, name: str
) -> None:
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    folder = done(name, RECIPE)
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    assert config.format == "mixed-precision"
    groups = {group.format: group for group in config.config_groups.values()}
    assert set(groups) == {"nvfp4-pack-quantized", "float-quantized"}
    scheme: QuantizationScheme = groups["float-quantized"]
    assert scheme.input_activations.dynamic is True
    made, source = tensors_in(folder), tensors_in(tiny(name))
    for module in fp8_modules(made):
        codes, scales = made[f"{module}.weight"], made[f"{module}.weight_scale"]
        state = {"weight": source[f"{module}.weight"].float(), "weight_scale": scales}
        assert raw(FloatQuantizationCompressor.compress(state, scheme)["weight"]) == raw(codes)
        found = FloatQuantizationCompressor.decompress({"weight": codes, "weight_scale": scales}, scheme)["weight"]
        assert torch.equal(found.float(), dequantize_rows(codes, scales))


@pytest.mark.parametrize(("name", "matrices"), [("llama", 21), ("gemma4_text", 41)])
def test_transformers_loads_every_matrix_with_the_values_of_its_bytes(
    done: Conversions, name: str, matrices: int
) -> None:
    folder = done(name, RECIPE)
    made = tensors_in(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits = model(input_ids=random_samples((24,))[0].unsqueeze(0), use_cache=False).logits
    assert bool(logits.isfinite().all())
    linears = {name: part for name, part in model.named_modules() if hasattr(part, "quantization_scheme")}
    assert len(linears) == matrices
    for module in fp8_modules(made):
        expected = dequantize_rows(made[f"{module}.weight"], made[f"{module}.weight_scale"])
        torch.testing.assert_close(linears[module].weight.float(), expected, rtol=2**-7, atol=0)


# the same bytes


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """Runs a job on several ranks."""
    with WarmRanks(tmp_path_factory.mktemp("ranks")) as warm:
        yield warm


@pytest.mark.parametrize(("size", "name", "layout"), [(2, "llama", COMPRESSED_TENSORS), (3, "gemma4", MODELOPT)])
def test_ranks_give_the_bytes_of_one_process(
    launch: WarmRanks, tiny: TinyModels, done: Conversions, tmp_path: Path, size: int, name: str, layout: str
) -> None:
    expected = done(name, RECIPE, layout, "mse")
    ids = write_ids(tmp_path / f"{expected.name}.jsonl", random_samples())
    ended = launch(
        size, source=tiny(name), output=tmp_path / "out", ids=ids, recipe=RECIPE, layout=layout, quantizer="mse"
    )
    assert [rank.code for rank in ended] == [0] * size, ended
    assert contents(tmp_path / "out") == contents(expected)


class Stop(Exception):
    """Ends a run after a layer."""


@pytest.mark.parametrize(("name", "layout"), [("llama", MODELOPT), ("gemma4", COMPRESSED_TENSORS)])
def test_a_resumed_run_gives_the_bytes_of_one_that_was_not_ended(
    tiny: TinyModels, done: Conversions, tmp_path: Path, name: str, layout: str
) -> None:
    expected, output = done(name, RECIPE, layout), tmp_path / "out"
    plan = planned(tiny(name), RECIPE, layout)
    samples = calibration_of(tiny(name), write_ids(tmp_path / f"{expected.name}.jsonl", random_samples()))

    def stop(now: Progress) -> None:
        if now.layers_done == 1:
            raise Stop

    def run(**more: Callable[[Progress], None]) -> Any:
        options: Any = replace(ConvertOptions(output, "rtn"), **more)
        return convert(plan, options, samples)

    with pytest.raises(Stop):
        run(progress=stop)
    kept = [json.loads(path.read_text()) for path in (partial_folder(output) / STATE_FOLDER).glob("model-*.json")]
    assert any(record["layer"] is not None for record in kept)
    run()
    assert contents(output) == contents(expected)


# FP8 alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recipe_of_fp8_alone_is_no_mixture(tiny: TinyModels, tmp_path: Path, layout: str) -> None:
    recipe = Recipe(name="own", quantize=(QuantizeEntry(modules=("mlp", "attention"), scheme="fp8"),))
    made = converted(tiny("llama"), tmp_path / "out", recipe, layout)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert len(fp8_modules(tensors_in(made))) == 21
    assert config.get("format") == ("float-quantized" if layout == COMPRESSED_TENSORS else None)
    assert config.get("quant_algo") == ("FP8" if layout == MODELOPT else None)
    assert "quantized_layers" not in config
    report = verify_structure(made, tiny("llama"))
    assert [check.detail for check in report.checks if not check.passed] == []


# Gemma 4 31B


@pytest.mark.parametrize(
    ("layout", "tensors", "size"), [(COMPRESSED_TENSORS, 1958, 24_160_822_392), (MODELOPT, 2188, 24_155_519_912)]
)
def test_the_31b_has_the_documented_size_and_lists_modules_in_modelopt_alone(
    tmp_path: Path, layout: str, tensors: int, size: int
) -> None:
    plan = planned(write_synthetic_gemma4(tmp_path / "31b"), RECIPE, layout)
    assert (plan.tensors, plan.tensor_bytes, len(plan.matrices)) == (tensors, size, 410)
    config = quantization_config(plan)
    assert len(config.get("quantized_layers", {})) == (0 if layout == COMPRESSED_TENSORS else 410)
    if layout == COMPRESSED_TENSORS:
        assert len(json.dumps(config)) < 2500
        assert not re.search(r"layers\.[0-9]", json.dumps(config))
