"""A GPU that verify shares with a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nvquant.verify.numerics.emulated import emulated_logprobs
from nvquant.verify.report import Check
from nvquant.verify.run import Verification, VerifyOptions
from nvquant.verify.serve import ServeStage
from nvquant.verify.subject import open_subject
from support.conversions import random_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_a_server_finds_the_gpu_without_what_earlier_stages_took(
    good: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Looking(ServeStage):
        def run(self) -> Iterator[Check]:
            seen.append(torch.cuda.memory_reserved())
            return iter(())

    monkeypatch.setattr("nvquant.verify.run.ServeStage", Looking)
    torch.empty(4 << 30, dtype=torch.uint8, device="cuda")  # gone at once, but the allocator keeps its memory
    assert torch.cuda.memory_reserved() >= 4 << 30
    verification = Verification(good("llama-ct"), None, VerifyOptions(("serve",)), lambda *_: None)
    assert list(verification.run()) == []
    assert seen[0] < 1 << 30


def test_on_a_gpu_that_a_server_has_filled_the_cpu_computes(
    good: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(good("llama-ct"))
    ids = random_samples((60,))[0].tolist()
    on_cpu = emulated_logprobs(subject, ids, "weight_only")
    assert emulated_logprobs(subject, ids, "weight_only", "cuda") != on_cpu
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    assert emulated_logprobs(subject, ids, "weight_only", "cuda") == on_cpu
