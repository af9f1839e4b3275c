"""How much of each memory hidden states may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.calibrate.walk import make_batches
from nvquant.convert.budget import UNKNOWN_HOST_BYTES, hidden_budget
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.convert.ranks import Ranks
from nvquant.plan.forecast import fixed_memory
from nvquant.plan.plan import Plan
from nvquant.stream.hidden import HiddenBudget
from nvquant.stream.memory import available_host_bytes
from support.conversions import TinyModels, calibration_of, contents, planned, random_samples, write_ids
from torch import Tensor

GIGABYTE = 1_000_000_000
FOLDER = Path("folder of the run")


@pytest.fixture
def plan(tiny: TinyModels) -> Plan:
    return planned(tiny("llama"))


def budget_of(plan: Plan, batches: list[Tensor], lanes: int = 1, **options: Any) -> HiddenBudget:
    return hidden_budget(plan, batches, ConvertOptions(Path("out"), "rtn", **options), FOLDER, lanes)


def test_a_given_budget_is_what_the_whole_run_may_take(plan: Plan) -> None:
    batches = make_batches(random_samples((40, 40, 24)), 2)
    fixed = fixed_memory(plan, 80, gpu=False)  # the largest batch has two sequences of 40
    found = budget_of(plan, batches, memory_budget_bytes=2 * GIGABYTE)
    assert found == HiddenBudget(0, 2 * GIGABYTE - fixed.host_bytes, FOLDER)
    assert 0 < found.host_bytes < 2 * GIGABYTE


@pytest.mark.parametrize("given", [0, 1, 500_000_000])
def test_a_budget_below_what_the_run_itself_needs_leaves_nothing_and_is_not_negative(plan: Plan, given: int) -> None:
    assert budget_of(plan, make_batches(random_samples(), 1), memory_budget_bytes=given) == HiddenBudget(0, 0, FOLDER)


def test_ranks_of_one_host_share_its_memory(plan: Plan) -> None:
    batches = make_batches(random_samples(), 1)
    fixed = fixed_memory(plan, 40, gpu=False)
    alone, shared = (
        budget_of(plan, batches, memory_budget_bytes=4 * GIGABYTE, ranks=Ranks(0, 4, local_size)).host_bytes
        for local_size in (1, 2)
    )
    assert alone + fixed.host_bytes == 4 * GIGABYTE
    assert shared + fixed.host_bytes == 2 * GIGABYTE


def test_each_of_two_lanes_has_half_of_what_is_left(plan: Plan) -> None:
    batches = make_batches(random_samples(), 1)
    one, two = (budget_of(plan, batches, lanes, memory_budget_bytes=4 * GIGABYTE).host_bytes for lanes in (1, 2))
    assert two == one // 2 > 0


def test_larger_batches_leave_less(plan: Plan) -> None:
    samples = random_samples((512,) * 8)
    found = [
        budget_of(plan, make_batches(samples, size), memory_budget_bytes=4 * GIGABYTE).host_bytes for size in (1, 2, 8)
    ]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3


def test_without_a_budget_it_is_at_most_half_of_what_the_system_has_left(plan: Plan) -> None:
    available = available_host_bytes()
    if available is None:
        pytest.skip("the system does not tell how much memory is available")
    found = budget_of(plan, make_batches(random_samples(), 1))
    assert found.device_bytes == 0
    # Others take and give memory meanwhile.
    wanted = max(0, available // 2 - fixed_memory(plan, 40, gpu=False).host_bytes)
    assert abs(found.host_bytes - wanted) < GIGABYTE


def test_a_system_that_does_not_tell_is_taken_to_have_little(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvquant.convert.budget.available_host_bytes", lambda: None)
    found = budget_of(plan, make_batches(random_samples(), 1))
    assert found.host_bytes == UNKNOWN_HOST_BYTES // 2 - fixed_memory(plan, 40, gpu=False).host_bytes


def test_a_rank_without_batches_has_a_budget_too(plan: Plan) -> None:
    assert budget_of(plan, [], memory_budget_bytes=GIGABYTE).host_bytes > 0


@pytest.mark.parametrize(("name", "quantizer"), [("llama", "mse"), ("gemma4_e2b", "mse"), ("gemma4_e2b", "gptq")])
def test_the_least_budget_makes_the_same_files(tiny: TinyModels, tmp_path: Path, name: str, quantizer: str) -> None:
    outputs = []
    ids = write_ids(tmp_path / "ids.jsonl", random_samples())
    for given in (None, 1):
        options = ConvertOptions(tmp_path / f"out-{given}", quantizer, batch_size=2, memory_budget_bytes=given)
        convert(planned(tiny(name)), options, calibration_of(tiny(name), ids))
        outputs.append(contents(options.output))
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl", "out-1", "out-None"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_has_a_budget_of_its_own(plan: Plan) -> None:
    batches = make_batches(random_samples((40, 40)), 2)
    fixed = fixed_memory(plan, 80, gpu=True)
    given = budget_of(plan, batches, device="cuda", memory_budget_bytes=3 * GIGABYTE)
    assert given == HiddenBudget(3 * GIGABYTE - fixed.gpu_bytes, 3 * GIGABYTE - fixed.host_bytes, FOLDER)
    free = torch.cuda.mem_get_info()[0]
    assert 0 < budget_of(plan, batches, device="cuda").device_bytes < free
    unbounded = budget_of(plan, batches, device="cuda", memory_budget_bytes=1 << 50)
    assert unbounded.device_bytes < free
