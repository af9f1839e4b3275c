"""Mixtures with experts in NVFP4, served by a real vLLM, give the likelihoods of an independent float32 emulation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.emulation import token_logprobs
from support.experts_by_hand import load_experts_emulation, quantize_experts
from support.likelihoods import assert_close, sample_ids, sharpen
from support.tiny_models import tiny_qwen3_moe
from support.vllm_server import serve, vllm_python

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("compressed-tensors", "nvfp4"),
        ("compressed-tensors", "nvfp4-a16"),
        pytest.param("modelopt", "nvfp4", marks=pytest.mark.thorough),
    ],
)
def test_served_experts_give_the_likelihood_of_the_emulation(tmp_path: Path, layout: str, scheme: str) -> None:
    """A right server reaches a correlation of 0.986 with the emulation. Silent experts give 0.38."""
    vllm_python()
    build = {"max_position_embeddings": 512, "head_dim": 32, "initializer_range": 0.04}
    source = tiny_qwen3_moe(tmp_path / "source", shards=1, **build)
    sharpen(source)
    ids = sample_ids(load_experts_emulation(source), 500)
    checkpoint = quantize_experts(source, tmp_path / "quantized", layout, scheme, ids[:200])
    with serve(checkpoint, tmp_path) as server:
        served = server.client.prompt_logprobs(ids)
    emulated = token_logprobs(load_experts_emulation(checkpoint), ids)
    assert_close(served, emulated, nll=0.1, least_correlation=0.93)
    assert_close(served, token_logprobs(load_experts_emulation(source), ids), nll=0.5, least_correlation=0.85)
