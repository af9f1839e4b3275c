"""A walk gives the same bits wherever its hidden states wait between the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.calibrate.walk import make_batches
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenBudget
from support.conversions import TinyModels, layer_weights, planned, random_samples, raw, recipe_for, skeleton_of
from support.tiny_models import WRITERS
from support.walking import OneLane

PLENTY = 1 << 30
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(request.param)


Walked = tuple[list[list[bytes]], dict[str, InputStatistics]]


def walked(
    source: Path,
    name: str,
    budget: HiddenBudget,
    device: torch.device,
    before_batch: Callable[[OneLane], None] = lambda walk: None,
) -> Walked:
    """Hidden states behind each layer but the last, and statistics of every text linear."""
    skeleton = replace(skeleton_of(source, torch.bfloat16), device=device)
    groups = planned(source, recipe_for(name, "nvfp4-full")).groups
    batches = make_batches(random_samples((40, 40, 7, 24, 16, 17)), 2)
    begun: list[OneLane] = []

    def tell(_tokens: int) -> None:
        for each in begun:  # none while calls are recorded
            before_batch(each)

    walk = OneLane(skeleton, batches, budget, before_batch=tell)
    begun.append(walk)
    states: list[list[bytes]] = []
    statistics: dict[str, InputStatistics] = {}
    try:
        for layer in range(len(skeleton.layers)):
            mine = [group for group in groups if group.name.startswith(f"{skeleton.layer_prefix}.{layer}.")]
            tensors = {key: tensor.to(device) for key, tensor in layer_weights(skeleton, layer).items()}
            observers = walk.step(layer, tensors, mine, True)
            statistics |= {key: ranges.result(key) for key, ranges in observers.items()}
            states.append([raw(state) for state in walk.hidden.on_host()])
    finally:
        walk.walk.close()
    return states, statistics


def assert_equal(one: Walked, other: Walked) -> None:
    assert one[0] == other[0]
    assert set(one[1]) == set(other[1])
    for name, found in one[1].items():
        wanted = other[1][name]
        assert (found.amax, found.low, found.tokens) == (wanted.amax, wanted.low, wanted.tokens)
        assert found.mean_square is not None and wanted.mean_square is not None
        assert torch.equal(found.mean_square, wanted.mean_square)


@pytest.mark.parametrize("name", WRITERS)
def test_a_walk_gives_the_same_bits_wherever_hidden_states_wait(
    tiny: TinyModels, tmp_path: Path, name: str, device: torch.device
) -> None:
    in_memory = walked(tiny(name), name, HiddenBudget(PLENTY, 0, tmp_path), device)
    on_disk = walked(tiny(name), name, HiddenBudget(0, 0, tmp_path), device)
    assert len(in_memory[0]) >= 3 and in_memory[0][0] != in_memory[0][1]
    assert_equal(on_disk, in_memory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_a_walk_through_all_tiers_gives_the_same_bits(
    tiny: TinyModels, tmp_path: Path, name: str, device: torch.device
) -> None:
    in_memory = walked(tiny(name), name, HiddenBudget(PLENTY, 0, tmp_path), device)
    tokens_of_two = 2 * 40 * 64 * 2  # hidden states of the first batch, the largest
    mixed = walked(tiny(name), name, HiddenBudget(tokens_of_two, 24 * 64 * 2, tmp_path), device)
    assert_equal(mixed, in_memory)


@pytest.mark.parametrize("host_bytes", [PLENTY, 24 * 64 * 2])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_spilling_in_the_middle_of_a_layer_changes_no_bit(
    tiny: TinyModels, tmp_path: Path, device: torch.device, at: int, host_bytes: int
) -> None:
    passed: list[bool] = []

    def spill_once(walk: OneLane) -> None:
        passed.append(walk.hidden.spill() if len(passed) == at else False)

    found = walked(tiny("llama"), "llama", HiddenBudget(PLENTY, host_bytes, tmp_path), device, spill_once)
    assert_equal(found, walked(tiny("llama"), "llama", HiddenBudget(PLENTY, 0, tmp_path), device))
    assert len(passed) == 3 * 5
    assert [number for number, moved in enumerate(passed) if moved] == ([at] if device.type == "cuda" else [])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_a_batch_that_ran_out_of_memory_is_observed_once(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    cuda = torch.device("cuda")
    wanted = walked(tiny(name), name, HiddenBudget(PLENTY, 0, tmp_path), cuda)
    failed: list[int] = []

    def fail_once(walk: OneLane) -> None:
        def run_out(_module: Any, _args: Any, _output: Any) -> None:
            failed.append(len(failed))
            handle.remove()
            raise torch.OutOfMemoryError("as if")

        if not failed:
            handle = walk.skeleton.layers[0].register_forward_hook(run_out)

    found = walked(tiny(name), name, HiddenBudget(PLENTY, PLENTY, tmp_path), cuda, fail_once)
    assert failed == [0]
    assert_equal(found, wanted)


@pytest.mark.gpu
@gpu
def test_a_batch_that_never_fits_ends_the_walk_with_its_size_named(tiny: TinyModels, tmp_path: Path) -> None:
    def run_out(_module: Any, _args: Any) -> None:
        raise torch.OutOfMemoryError("as if")

    def fail(walk: OneLane) -> None:
        walk.skeleton.layers[1].register_forward_pre_hook(run_out)

    with pytest.raises(InputError, match=r"^--batch-size 2: the GPU's memory does not hold .* 2 x 40 tokens"):
        walked(tiny("llama"), "llama", HiddenBudget(PLENTY, 0, tmp_path), torch.device("cuda"), fail)
