"""Logits come from the decoded head, a part at a time, with inputs rounded as a server rounds them."""

from __future__ import annotations

from pathlib import Path

import nvquant.verify.numerics.head
import pytest
import torch
from nvquant.format.schemes import Arithmetic
from nvquant.recipe.load import load_recipe
from nvquant.verify.numerics.emulated import emulated_logprobs
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.subject import open_subject
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, converted, random_samples
from support.emulation import load_emulation, token_logprobs
from verify.breaking import edit_tensors
from verify.numerics.measuring import measured, predicted

OWN: dict[str, Arithmetic] = {"fp8": "w8a8", "nvfp4": "weight_only"}


def with_head(tiny: TinyModels, name: str, head: str, layout: str, folder: Path, recipe: str = "nvfp4-a16") -> Path:
    return converted(tiny(name), folder, load_recipe(recipe).model_copy(update={"head": head}), layout)


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("head", OWN)
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_text"])
def test_likelihoods_are_those_of_an_independent_emulation(
    tiny: TinyModels, tmp_path: Path, name: str, head: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvquant.verify.numerics.head, "PART_BYTES", 100 * 4 * 64)  # six parts of the vocabulary
    made = with_head(tiny, name, head, layout, tmp_path / "out")
    ids = random_samples((60,))[0].tolist()
    theirs = torch.tensor(token_logprobs(load_emulation(made), ids))
    ours = torch.tensor(emulated_logprobs(open_subject(made), ids, OWN[head]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    if head == "fp8":  # without rounding, the numbers are others
        unrounded = torch.tensor(emulated_logprobs(open_subject(made), ids, "weight_only"))
        assert float((unrounded - theirs).abs().mean()) > 10 * float((ours - theirs).abs().mean())


def test_a_head_adds_its_arithmetic_to_those_that_are_measured(tiny: TinyModels, tmp_path: Path) -> None:
    plain = with_head(tiny, "llama", "nvfp4", MODELOPT, tmp_path / "plain")
    assert ServedModel(open_subject(plain)).arithmetics == ("weight_only",)
    fp8 = with_head(tiny, "llama", "fp8", MODELOPT, tmp_path / "fp8", "nvfp4")
    assert ServedModel(open_subject(fp8)).arithmetics == ("w4a4", "w8a8", "weight_only")


def test_the_source_has_its_own_head_beside_the_quantized_one(tiny: TinyModels, tmp_path: Path) -> None:
    samples = random_samples((60, 40))
    heads = {head: with_head(tiny, "gemma4", head, COMPRESSED_TENSORS, tmp_path / head) for head in ("bf16", "fp8")}
    found = {head: predicted(folder, tiny("gemma4"), samples, "weight_only") for head, folder in heads.items()}
    nll = {head: logits["source"].nll for head, (logits, _) in found.items()}
    assert torch.equal(nll["bf16"], nll["fp8"])
    assert not torch.equal(found["bf16"][0]["weight_only"].nll, found["fp8"][0]["weight_only"].nll)


def test_a_head_with_rows_of_other_tokens_fails_the_numbers(tiny: TinyModels, tmp_path: Path) -> None:
    made = with_head(tiny, "llama", "fp8", COMPRESSED_TENSORS, tmp_path / "out")
    samples = random_samples((60, 40))
    assert "top1" not in measured(made, tiny("llama"), samples).failed
    with edit_tensors(made) as tensors:
        for leaf in ("weight", "weight_scale"):
            stored = tensors[f"lm_head.{leaf}"]
            row = len(stored.data) // stored.shape[0]
            stored.data[:] = stored.data[row:] + stored.data[:row]
    assert "top1" in measured(made, tiny("llama"), samples).failed


def test_blocks_that_marlin_loses_are_lost_in_the_head(tiny: TinyModels, tmp_path: Path) -> None:
    made = with_head(tiny, "llama", "nvfp4", COMPRESSED_TENSORS, tmp_path / "out")
    with edit_tensors(made) as tensors:
        tensors["lm_head.weight_scale"].data[:2] = bytes([0x7E, 0x01])  # 448, and the smallest
    model = ServedModel(open_subject(made))
    rows = model.head_rows(range(2), "weight_only")
    assert rows[0, :16].any() and not rows[0, 16:32].any()
