"""What a server is expected to answer is what an independent emulation of it computes from the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.source import read_json
from nvquant.verify.numerics.emulated import emulated_logprobs, likeliest_next
from nvquant.verify.numerics.text import reference_ids
from nvquant.verify.subject import open_subject
from support.conversions import MODELOPT, Conversions, TinyModels, converted, random_samples
from support.emulation import load_emulation, token_logprobs
from verify.numerics.measuring import held_out

MODELS = ("llama", "gemma4", "gemma4_text", "gemma4_e2b", "qwen2", "phi3")
LAYOUTS = ("compressed-tensors", MODELOPT)


@pytest.fixture(scope="session")
def conversions(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    return Conversions(tiny, tmp_path_factory.mktemp("converted"))


def compared(folder: Path, ids: list[int], arithmetic: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the other emulation's likelihoods."""
    ours = emulated_logprobs(open_subject(folder), ids, arithmetic)  # type: ignore[arg-type]
    return torch.tensor(ours), torch.tensor(token_logprobs(load_emulation(folder), ids))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_weight_only_likelihoods_are_equal_token_by_token(name: str, layout: str, conversions: Conversions) -> None:
    (ids,) = random_samples((60,))
    ours, theirs = compared(conversions(name, "nvfp4-a16", layout, "mse"), ids.tolist(), "weight_only")
    assert len(ours) == 59
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_w4a4_likelihoods_are_equal_in_the_mean(name: str, layout: str, conversions: Conversions) -> None:
    folder = conversions(name, "nvfp4-full", layout)
    (ids,) = random_samples((200,))
    ours, theirs = compared(folder, ids.tolist(), "w4a4")
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=0.02)
    # Rounding inputs is part of it: without it these numbers are others.
    unrounded = torch.tensor(emulated_logprobs(open_subject(folder), ids.tolist(), "weight_only"))
    assert float((ours - unrounded).abs().mean()) > 3 * float((ours - theirs).abs().mean())


@pytest.mark.slow
def test_real_weights_in_both_arithmetics(smollm2_full: Path, smollm2: Path, tmp_path: Path) -> None:
    ids = held_out(smollm2, 1, 200)[0].tolist()
    ours, theirs = compared(smollm2_full, ids, "w4a4")
    # Last bits that differ are amplified from layer to layer, without a direction.
    difference = ours - theirs
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(difference) ** 0.5
    unrounded = torch.tensor(emulated_logprobs(open_subject(smollm2_full), ids, "weight_only"))
    assert float((ours - unrounded).abs().mean()) > 2 * float(difference.abs().mean())
    weight_only = converted(smollm2, tmp_path / "a16", "nvfp4-a16", MODELOPT)
    torch.testing.assert_close(*compared(weight_only, ids, "weight_only"), rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_likeliest_next_id_is_that_of_the_emulation(conversions: Conversions) -> None:
    folder = conversions("llama", "nvfp4-a16")
    model = load_emulation(folder)
    for seed in range(5):
        (ids,) = random_samples((20,), seed)
        wanted = int(model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax())
        assert likeliest_next(open_subject(folder), ids.tolist(), "weight_only") == wanted


def test_reference_ids_are_held_out_text_as_the_model_wants_it(good: Callable[[str], Path], smollm2: Path) -> None:
    config = read_json(smollm2 / "config.json", "")
    ids = reference_ids(smollm2, config, 300)
    assert 256 <= len(ids) <= 300
    assert ids == reference_ids(smollm2, config, 300)
    subject = open_subject(good("llama-ct"))
    likelihoods = emulated_logprobs(subject, reference_ids(subject.folder, subject.config, 100), "w4a4")
    assert all(value < 0 for value in likelihoods)
