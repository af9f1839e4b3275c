"""The memory that a server's weights take is held against the checkpoint's bytes, split over the GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.serving.kernels import kernel_named
from nvquant.serving.log import LogFacts
from nvquant.verify.report import Finding
from nvquant.verify.served_memory import check_memory, forecast_weights, rotary_bytes
from nvquant.verify.subject import Subject, open_subject

GIB = 1 << 30
# Gemma-4-31B's text model with every linear in NVFP4, and what vLLM 0.24 said of it on an H200 (18.71 GiB).
FORECAST_31B, REPORTED_31B = 19_300_000_000, round(18.71 * GIB)
CONFIG_31B = {"num_attention_heads": 32, "head_dim": 256, "global_head_dim": 512, "max_position_embeddings": 262144}


@pytest.fixture
def subject(good: Callable[[str], Path]) -> Subject:
    return open_subject(good("llama-ct"))


def judge(subject: Subject, reported: int, forecast: int) -> Finding:
    facts = LogFacts(weights_bytes=reported, kernels=(kernel_named("MarlinNvFp4LinearKernel"),))
    return check_memory(subject, facts, forecast, False, 0)


def test_one_gpu_holds_every_byte(subject: Subject) -> None:
    assert forecast_weights(subject, 1) == sum(info.nbytes for info in subject.infos.values())


def test_two_gpus_share_matrices_but_not_vectors(subject: Subject) -> None:
    vectors = sum(info.nbytes for info in subject.infos.values() if len(info.shape) < 2)
    matrices = forecast_weights(subject, 1) - vectors
    assert forecast_weights(subject, 2) == matrices // 2 + vectors


def test_a_quantized_head_counts_beside_the_embedding(good: Callable[[str], Path]) -> None:
    with_head, without = (open_subject(good(name)) for name in ("llama-head-mo", "llama-a16-mo"))
    rows, cols = with_head.infos["model.embed_tokens.weight"].shape
    scalars = 8
    assert forecast_weights(with_head, 1) == forecast_weights(without, 1) + rows * cols + scalars
    assert forecast_weights(with_head, 2) == forecast_weights(without, 2) + rows * cols // 2 + scalars


def test_what_was_measured_for_a_31b_fits(subject: Subject) -> None:
    large = Subject(subject.folder, CONFIG_31B, subject.headers, ())
    assert judge(large, REPORTED_31B, FORECAST_31B).faults == []
    # The same with MLP alone in NVFP4, and in BF16.
    assert judge(large, round(30.1 * GIB), 31_500_000_000).faults == []
    assert judge(large, round(57.91 * GIB), 61_400_000_000).faults == []


def test_decoded_weights_are_found(subject: Subject) -> None:
    large = Subject(subject.folder, CONFIG_31B, subject.headers, ())
    finding = judge(large, round(30.1 * GIB), FORECAST_31B)
    assert "loaded decoded, or twice" in finding.faults[0]


def test_weights_that_were_not_loaded_are_found(subject: Subject) -> None:
    finding = judge(subject, round(17.0 * GIB), FORECAST_31B)
    assert "were not loaded" in finding.faults[0]


def test_rotary_tables_count() -> None:
    assert rotary_bytes(CONFIG_31B) == 2 * 512 * 262144 * 4


def test_a_cpu_build_does_not_say(subject: Subject) -> None:
    facts = LogFacts(kernels=(kernel_named("CpuNvFp4LinearKernel"),))
    finding = check_memory(subject, facts, 100_000_000, True, 2_800_000_000)
    assert finding.looked_at.startswith("not applicable: a CPU build") and "2.80 GB" in finding.looked_at
    assert "decoded" in finding.looked_at


def test_a_server_that_runs_elsewhere_does_not_say(subject: Subject) -> None:
    assert check_memory(subject, LogFacts(), 100, None, 0).looked_at.startswith("not applicable")
