"""Conversions with folds: exact for verification, the same in every layout, and refused where nothing is calibrated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant import convert as convert_model
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.relayout import relayout
from nvquant.errors import InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import KvCache
from nvquant.stream.manifest import MANIFEST_NAME
from nvquant.verify.structure import verify_structure
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, edit_tensors, tensors_in

LAYER = "model.layers.0"
NORM = f"{LAYER}.input_layernorm.weight"


def faults(output: Path, source: Path) -> dict[str, list[str]]:
    """The faults of every check that failed."""
    report = verify_structure(output, source)
    return {check.name: list(check.finding.faults) for check in report.checks if not check.passed}


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gemma4", "gemma4_e2b"])
@pytest.mark.parametrize(("recipe", "quantizer"), [("nvfp4-full", "rtn"), ("nvfp4-full", "mse"), ("nvfp4-fp8", "mse")])
def test_verification_repeats_the_folds_on_the_source_and_finds_every_number_exact(
    tiny: TinyModels, tmp_path: Path, name: str, layout: str, recipe: str, quantizer: str
) -> None:
    source = tiny(name)
    output = converted(source, tmp_path / "out", recipe, layout, quantizer, fold=True)
    report = verify_structure(output, source)
    assert report.passed, faults(output, source)
    checks = {check.name: check for check in report.checks}
    assert "folds with a largest error" in checks["folds"].finding.looked_at
    assert f"exact for {quantizer}" in checks["weights"].finding.looked_at
    old, new = tensors_in(source), tensors_in(output)
    layers = json.loads((output / MANIFEST_NAME).read_text())["layers"]
    norms = [fold["norm"] for layer in layers for fold in layer["folding"]["folds"] if "norm" in fold]
    assert len(norms) == 2 * len(layers)
    assert all(not torch.equal(old[key], new[key]) for key in norms)


@pytest.fixture
def folded(tiny: TinyModels, tmp_path: Path) -> Path:
    """A folded checkpoint of the tiny Llama, to be changed."""
    return converted(tiny("llama"), tmp_path / "folded", quantizer="mse", fold=True)


def test_another_layout_keeps_the_folds(tiny: TinyModels, folded: Path, tmp_path: Path) -> None:
    relayout(open_checkpoint(folded), LAYOUTS[MODELOPT], tmp_path / "other")
    assert not faults(tmp_path / "other", tiny("llama"))


def test_a_norm_of_another_value_is_named(tiny: TinyModels, folded: Path) -> None:
    def double(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if name == NORM else tensor

    edit_tensors(folded, double)
    found = faults(folded, tiny("llama"))
    assert found["folds"] == [f"{NORM} is not the source's norm after its fold"]
    assert "weights" not in found


def test_the_source_s_own_norm_is_named_too(tiny: TinyModels, folded: Path) -> None:
    norm = tensors_in(tiny("llama"))[NORM]
    edit_tensors(folded, lambda name, tensor: norm if name == NORM else tensor)
    assert faults(folded, tiny("llama"))["folds"] == [f"{NORM} is not the source's norm after its fold"]


def edit_fold(folded: Path, kind: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the first recorded fold that has a norm, or a maker."""
    path = folded / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    edit(next(fold for fold in manifest["layers"][0]["folding"]["folds"] if fold.get(kind)))
    path.write_text(json.dumps(manifest))


def test_other_factors_than_those_of_the_run_make_the_weights_differ(tiny: TinyModels, folded: Path) -> None:
    edit_fold(folded, "maker", lambda fold: fold.update(exponents=fold["exponents"][::-1]))
    assert any("mlp.down_proj" in fault for fault in faults(folded, tiny("llama"))["weights"])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("norm", {"groups": ["model.layers.0.mlp.nothing"]}, "is not quantized"),
        ("norm", {"groups": [f"{LAYER}.mlp.down_proj"]}, "has a second fold"),
        ("norm", {"norm": "model.layers.0.no.weight"}, "is missing"),
        ("norm", {"norm": "model.embed_tokens.weight"}, "is not a norm of 64 channels"),
        ("norm", {"norm": None}, "has not exactly one maker"),
        ("norm", {"maker": f"{LAYER}.mlp.gate_proj"}, "has not exactly one maker"),
        ("norm", {"exponents": "AAAA"}, "it has 3 channels"),
        ("maker", {"maker": f"{LAYER}.mlp.nothing"}, "is not quantized, or has fewer rows"),
        ("maker", {"first_row": 1}, "is not quantized, or has fewer rows"),
        ("maker", {"heads": {"groups": 1, "queries": 1, "size": 7}}, "its heads have other sizes"),
    ],
)
def test_a_recorded_fold_that_does_not_fit_is_one_fault(
    tiny: TinyModels, folded: Path, kind: str, change: dict[str, Any], words: str
) -> None:
    edit_fold(folded, kind, lambda fold: fold.update(change))
    found = faults(folded, tiny("llama"))["folds"]
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize("exponents", ["", "A", "A===", "äöü", "AA=A", 3])
def test_factors_that_are_no_base64_make_the_manifest_unreadable(
    tiny: TinyModels, folded: Path, exponents: object
) -> None:
    edit_fold(folded, "norm", lambda fold: fold.update(exponents=exponents))
    assert "exponents" in faults(folded, tiny("llama"))["manifest"][0]


def test_values_keep_their_scale_where_an_fp8_cache_stores_them(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-full").model_copy(update={"kv_cache": KvCache(dtype="fp8-calibrated")})
    output = converted(tiny("llama"), tmp_path / "out", recipe, fold=True)
    assert not faults(output, tiny("llama"))
    layers = json.loads((output / MANIFEST_NAME).read_text())["layers"]
    makers = [fold.get("maker") for layer in layers for fold in layer["folding"]["folds"]]
    assert {maker.rpartition(".")[2] for maker in makers if maker} == {"up_proj"}
    reasons = {group for layer in layers for group in layer["folding"]["unfolded"]}
    assert reasons == {f"model.layers.{number}.self_attn.o_proj" for number in range(3)}


def test_without_folds_the_bytes_are_those_of_before(tiny: TinyModels, tmp_path: Path) -> None:
    output = converted(tiny("llama"), tmp_path / "out")
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert "fold" not in manifest
    assert "fold" not in manifest["recipe"]
    assert all("folding" not in layer for layer in manifest["layers"])
    old, new = tensors_in(tiny("llama")), tensors_in(output)
    assert all(torch.equal(old[name], new[name]) for name in new if name in old)


@pytest.mark.parametrize("in_recipe", [True, False])
def test_folds_without_calibration_are_refused(tiny: TinyModels, tmp_path: Path, in_recipe: bool) -> None:
    recipe = load_recipe("nvfp4-a16")
    chosen: dict[str, Any] = {"fold": "auto"}
    if in_recipe:
        recipe, chosen = recipe.model_copy(update={"fold": "auto"}), {}
    with pytest.raises(InputError, match=r"calibrates nothing, and folds require inputs\. Use --fold off"):
        convert_model(tiny("llama"), tmp_path / "out", recipe, device="cpu", **chosen)
    assert not list(tmp_path.iterdir())


def test_an_unknown_choice_names_those_that_exist(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto"):
        convert_model(tiny("llama"), tmp_path / "out", "nvfp4-full", device="cpu", fold="always")


def test_the_option_decides_over_the_recipe_and_the_recipe_over_the_quantizer(tiny: TinyModels, tmp_path: Path) -> None:
    def is_folded(name: str, recipe_fold: str | None, **chosen: Any) -> bool:
        recipe = load_recipe("nvfp4").model_copy(update={"fold": recipe_fold})
        output = tmp_path / name
        convert_model(tiny("llama"), output, recipe, samples=2, sequence_length=32, device="cpu", **chosen)
        made = json.loads((output / MANIFEST_NAME).read_text())
        shutil.rmtree(output)
        assert ("folding" in made["layers"][0]) == ("fold" in made)
        return "fold" in made

    assert not is_folded("a", None)
    assert is_folded("b", "auto")
    assert not is_folded("c", "auto", fold="off")
    assert is_folded("d", None, quantizer="gptq")
    assert not is_folded("e", "off", quantizer="gptq")
    assert is_folded("f", "off", quantizer="rtn", fold="auto")
