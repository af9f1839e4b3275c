"""Conversions with an order of channels: the same bytes however they end, exact for verification, or a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.convert.survey import RECORD_NAME, encoded
from nvquant.errors import NonFiniteError
from nvquant.recipe.load import load_recipe
from nvquant.stream.manifest import MANIFEST_NAME, ResidualRecord
from nvquant.verify.structure import verify_structure
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, edit_tensors, tensors_in
from support.tiny_models import tiny_llama


def manifest_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / MANIFEST_NAME).read_text())
    return found


def faults(output: Path, source: Path) -> dict[str, list[str]]:
    report = verify_structure(output, source)
    return {check.name: list(check.finding.faults) for check in report.checks if not check.passed}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text", "gemma4_text"])
def test_a_text_model_gets_an_order_that_verification_repeats(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    output = converted(tiny(name), tmp_path / "out", fold=True)
    record = ResidualRecord.model_validate(manifest_of(output)["residual"])
    assert record.order is not None
    size = json.loads((tiny(name) / "config.json").read_text())["hidden_size"]
    assert sorted(record.places) == list(range(size))
    assert record.places != list(range(size))
    assert not faults(output, tiny(name))
    old, new = tensors_in(tiny(name)), tensors_in(output)
    embedding = next(key for key in new if "embed_tokens" in key)
    assert torch.equal(new[embedding], old[embedding][:, record.places])


@pytest.mark.parametrize(
    ("name", "words"),
    [("gemma4", "may read hidden states"), ("gemma4_unified", "may read hidden states")],
)
def test_a_model_with_towers_keeps_its_order_and_says_why(
    tiny: TinyModels, tmp_path: Path, name: str, words: str
) -> None:
    output = converted(tiny(name), tmp_path / "out", fold=True)
    residual = manifest_of(output)["residual"]
    assert "order" not in residual
    assert words in residual["reason"]
    assert not faults(output, tiny(name))
    report = verify_structure(output, tiny(name))
    assert words in next(check for check in report.checks if check.name == "folds").finding.looked_at


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_follows_the_order(tmp_path: Path, layout: str, tied: bool) -> None:
    source = tiny_llama(tmp_path / "source", tied=tied)
    recipe = load_recipe("nvfp4-full").model_copy(update={"head": "nvfp4"})
    output = converted(source, tmp_path / "out", recipe, layout, "mse", fold=True)
    assert "order" in manifest_of(output)["residual"]
    assert not faults(output, source)


def test_attention_in_bf16_follows_the_order_too(tiny: TinyModels, tmp_path: Path) -> None:
    output = converted(tiny("llama"), tmp_path / "out", "nvfp4", fold=True)
    places = ResidualRecord.model_validate(manifest_of(output)["residual"]).places
    old, new = tensors_in(tiny("llama")), tensors_in(output)
    attention = "model.layers.0.self_attn"
    assert torch.equal(new[f"{attention}.q_proj.weight"], old[f"{attention}.q_proj.weight"][:, places])
    assert torch.equal(new[f"{attention}.o_proj.weight"], old[f"{attention}.o_proj.weight"][places])
    assert not faults(output, tiny("llama"))


def swapped(record: dict[str, Any]) -> None:
    places = ResidualRecord.model_validate(record).places
    record["order"] = encoded([places[1], places[0], *places[2:]])


def not_a_permutation(record: dict[str, Any]) -> None:
    record["order"] = encoded([0] * 64)


def of_another_size(record: dict[str, Any]) -> None:
    record["order"] = encoded(list(range(32)))


def of_an_unknown_tensor(record: dict[str, Any]) -> None:
    record["axes"]["no.weight"] = 0


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (swapped, {"folds", "untouched", "weights"}),
        (not_a_permutation, {"folds", "untouched", "weights"}),
        (of_another_size, {"folds", "untouched", "weights"}),
        (of_an_unknown_tensor, {"folds", "untouched", "weights"}),
    ],
)
def test_another_order_than_that_of_the_run_is_found(
    tiny: TinyModels, tmp_path: Path, change: Callable[[dict[str, Any]], None], names: set[str]
) -> None:
    output = converted(tiny("llama"), tmp_path / "out", quantizer="mse", fold=True)
    manifest = manifest_of(output)
    change(manifest["residual"])
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert set(faults(output, tiny("llama"))) == names


def test_the_run_s_own_record_of_the_order_does_not_stay(tiny: TinyModels, tmp_path: Path) -> None:
    output = converted(tiny("llama"), tmp_path / "out", fold=True)
    assert not list(output.rglob(RECORD_NAME))


@pytest.mark.parametrize("quantizer", ["mse", "gptq"])
def test_a_damaged_weight_is_named_before_the_input_that_it_spoils(tmp_path: Path, quantizer: str) -> None:
    source = tiny_llama(tmp_path / "source")
    damaged = "model.layers.1.mlp.down_proj.weight"

    def damage(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == damaged:
            tensor[3, 5] = float("nan")
        return tensor

    edit_tensors(source, damage)
    with pytest.raises(NonFiniteError, match=rf"{damaged}.*row 3.*column 5"):
        converted(source, tmp_path / "out", quantizer=quantizer, fold=True)
