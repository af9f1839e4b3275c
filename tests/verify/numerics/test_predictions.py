"""Predictions over all lanes: in blocks of tokens and parts of the vocabulary, of any size, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvquant.verify.numerics import head as heads
from nvquant.verify.numerics import predictions
from nvquant.verify.numerics.measure import SideBySide
from nvquant.verify.numerics.predictions import predict
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.subject import open_subject
from support.conversions import random_samples
from verify.breaking import edit_tensors
from verify.checkpoints import Copy
from verify.numerics.measuring import likelihoods, no_progress, original, predicted


def test_blocks_and_parts_of_any_size_change_nothing(
    good: Callable[[str], Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples()
    _, at_once = predicted(good("gemma4-ct"), models["gemma4"], samples, "w4a4", "weight_only")
    monkeypatch.setattr(heads, "PART_BYTES", 4 * 64 * 70)  # 70 rows of 512
    monkeypatch.setattr(predictions, "BLOCK_ELEMENTS", 70 * 9)  # 9 tokens
    _, in_pieces = predicted(good("gemma4-ct"), models["gemma4"], samples, "w4a4", "weight_only")
    assert set(at_once) == set(in_pieces) == {"floor", "w4a4", "w4a4_again", "weight_only"}
    for name, scores in at_once.items():
        torch.testing.assert_close(in_pieces[name].nll, scores.nll, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(in_pieces[name].kl, scores.kl, rtol=1e-3, atol=1e-6)
        assert torch.equal(in_pieces[name].agrees, scores.agrees)
        assert list(scores.lengths) == [len(ids) - 1 for ids in samples]


def test_each_token_is_scored_by_what_is_before_it(models: dict[str, Path], good: Callable[[str], Path]) -> None:
    samples = random_samples()
    logits, scores = predicted(good("llama-ct"), models["llama"], samples, "weight_only")
    assert len(scores["floor"].nll) == sum(len(ids) - 1 for ids in samples)
    torch.testing.assert_close(
        -logits["source"].nll, likelihoods(original(models["llama"]), samples), rtol=0, atol=1e-5
    )


def test_a_head_that_differs_from_the_sources_is_used_for_the_checkpoint_alone(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-a16-ct")
    samples = random_samples()
    with edit_tensors(made.folder) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        row = 2 * 64
        embedding.data[:] = embedding.data[-row:] + embedding.data[:-row]  # every id means its neighbour
    logits, scores = predicted(made.folder, made.source, samples, "weight_only")
    whole = likelihoods(original(made.source), samples)
    torch.testing.assert_close(-logits["source"].nll, whole, rtol=0, atol=1e-5)
    assert float(scores["weight_only"].kl.mean()) > 100 * float(scores["floor"].kl.mean())


def test_hidden_states_are_given_back_before_the_vocabulary_comes(good: Callable[[str], Path]) -> None:
    run = SideBySide(ServedModel(open_subject(good("llama-ct"))), None, random_samples(), ["w4a4"], "cpu", no_progress)
    run.run()
    seen = []
    predict(run, lambda *_: seen.append([len(lane.hidden) for lane in run.lanes.values()]))
    assert seen and all(lengths == [0] for lengths in seen)
