"""Likelihoods of served models beside those of emulations, and random models whose likelihoods can differ."""

from __future__ import annotations

from pathlib import Path
from statistics import correlation, mean

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file


def assert_close(got: list[float], expected: list[float], *, nll: float = 0.15, least_correlation: float = 0.9) -> None:
    """Compare the mean negative log-likelihoods, and how the tokens' likelihoods vary together."""
    assert -mean(got) == pytest.approx(-mean(expected), abs=nll)
    assert correlation(got, expected) > least_correlation


def sharpen(checkpoint: Path) -> None:
    """Make a random model's predictions four times as decided.

    As it is they are nearly uniform, and then no fault in any layer can change the mean likelihood.
    """
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] *= 4
            save_file(tensors, shard, metadata={"format": "pt"})


def sample_ids(model: transformers.PreTrainedModel, count: int) -> list[int]:
    """Tokens drawn from the model itself: the only text that a random model predicts better than chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = torch.tensor([[model.config.bos_token_id or 1]])  # some models have none
        drawn = model.generate(start, do_sample=True, top_k=0, min_new_tokens=count, max_new_tokens=count)
    return drawn[0].tolist()
