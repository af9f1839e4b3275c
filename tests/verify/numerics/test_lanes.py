"""The stage's lanes: one recording for each model, within a share of the free memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.calibrate import walk as walking
from nvquant.calibrate.skeleton import Skeleton
from nvquant.calibrate.walk import make_batches
from nvquant.checkpoint.source import open_checkpoint
from nvquant.format.schemes import Arithmetic
from nvquant.verify.numerics import lanes as lanes_module
from nvquant.verify.numerics.lanes import Lanes, hidden_budget
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.subject import open_subject
from support.conversions import random_samples
from torch import Tensor

CPU = torch.device("cpu")
BATCHES = make_batches(random_samples(), 1)


def lanes_of(checkpoint: Path, source: Path | None, *arithmetics: Arithmetic) -> Lanes:
    opened = None if source is None else open_checkpoint(source)
    return Lanes(ServedModel(open_subject(checkpoint)), opened, BATCHES, arithmetics, CPU, torch.float32)


@pytest.mark.parametrize(
    ("has_source", "arithmetics", "names"),
    [
        (True, ["w4a4", "weight_only"], ["source", "floor", "w4a4", "weight_only", "w4a4_again"]),
        (True, ["weight_only"], ["source", "floor", "weight_only"]),
        (False, ["w4a4"], ["w4a4"]),
    ],
)
def test_lanes_by_name_and_each_model_recorded_once(
    good: Callable[[str], Path],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    has_source: bool,
    arithmetics: list[Arithmetic],
    names: list[str],
) -> None:
    checkpoint = good("llama-ct")
    recorded: list[Skeleton] = []
    record_batches = walking.record_batches

    def count(skeleton: Skeleton, batches: Sequence[Tensor]) -> Any:
        recorded.append(skeleton)
        return record_batches(skeleton, batches)

    monkeypatch.setattr(walking, "record_batches", count)
    lanes = lanes_of(checkpoint, models["llama"] if has_source else None, *arithmetics)
    assert list(lanes) == names
    skeletons = [walk.skeleton for walk in (lanes.original, lanes.quantized) if walk is not None]
    assert len(recorded) == len(skeletons) and all(one in skeletons for one in recorded)
    assert all(len(lane.hidden) == len(BATCHES) for lane in lanes.values())
    lanes.close()
    assert all(len(lane.hidden) == 0 for lane in lanes.values())


def test_the_budget_is_a_share_of_the_free_memory(good: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "available_host_bytes", lambda: 8_000_000)
    assert hidden_budget(4, ServedModel(open_subject(good("llama-ct"))), None, CPU).host_bytes == 1_000_000
