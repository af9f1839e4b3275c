"""The engine's own part: which layers and shards a rank takes, how it replays, and what it closes after an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.calibrate.samples import CalibrationSet
from nvquant.checkpoint.source import tensor_bytes
from nvquant.convert import engine as engine_module
from nvquant.convert.engine import Engine
from nvquant.convert.journal import Journal
from nvquant.convert.layer import LayerMaker
from nvquant.convert.options import ConvertOptions
from nvquant.convert.ranks import Ranks
from nvquant.convert.watch import Watch
from nvquant.errors import InputError
from nvquant.plan.plan import Plan
from nvquant.quantizers import get_quantizer
from nvquant.stream.hidden import HiddenBudget, HiddenStates
from nvquant.stream.manifest import LayerRecord, ShardRecord
from nvquant.stream.reading import layer_digest
from support.conversions import TinyModels, planned, random_samples
from torch import Tensor

CALIBRATION = CalibrationSet("ids", tuple(random_samples()), 144, "0" * 64, "ids")


class Apart(Ranks):
    """One of two ranks that never meet."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    @contextmanager
    def step(self) -> Iterator[None]:
        yield


class Walked:
    """In the place of a walk."""

    shares_state = False
    has_quantized = False

    def __init__(self, folder: Path) -> None:
        self.hidden = {"source": HiddenStates(torch.device("cpu"), HiddenBudget(0, 0, folder))}
        self.replayed: list[int] = []
        self.is_closed = False

    def advance(self, layer: int, tensors: Mapping[str, Tensor], path: None) -> None:
        self.replayed.append(layer)

    def close(self) -> None:
        self.is_closed = True


class Run:
    """An engine on a partial folder of its own."""

    def __init__(self, plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: Ranks | None = None) -> None:
        self.plan, self.journal, self._ranks = plan, Journal(folder), ranks or Ranks()
        self.journal.begin({})
        self.walk = Walked(folder)
        self.made: list[int] = []
        self.fails_at: int | None = None

        @contextmanager
        def make(_maker: LayerMaker, loaded: Any, walk: Any) -> Iterator[None]:
            if loaded.layer == self.fails_at:
                raise InputError("no layer.")
            self.made.append(loaded.layer)
            yield None

        monkeypatch.setattr(LayerMaker, "made", make)
        monkeypatch.setattr(engine_module, "open_walk", lambda *_: self.walk)

    def __call__(self, calibration: CalibrationSet | None, done: Mapping[str, ShardRecord] | None = None) -> None:
        options = ConvertOptions(self.journal.partial, "rtn", ranks=self._ranks)
        quantizer = get_quantizer("rtn")
        Engine(self.plan, options, quantizer, torch.float32, self.journal, done or {}, Watch(options)).run(calibration)

    @property
    def copied(self) -> list[str]:
        return [shard.file for shard in self.plan.shards if shard.layer is None and self.journal.has(shard)]


def source_sha256(plan: Plan, layer: int) -> str:
    names = plan.tensors_by_layer()[layer]
    return layer_digest({name: sha256(tensor_bytes(plan.source.read(name))).hexdigest() for name in names})


def done_layers(plan: Plan, *layers: int, digest: str | None = None) -> dict[str, ShardRecord]:
    files = {shard.layer: shard.file for shard in plan.shards}
    records = [
        LayerRecord(layer=at, file=files[at], source_sha256=digest or source_sha256(plan, at), groups={})
        for at in layers
    ]
    return {record.file: ShardRecord(sha256="0" * 64, layer=record) for record in records}


def test_without_calibration_a_rank_makes_its_own_layers_and_copies_its_own_shards(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("gemma4"), "nvfp4-a16")
    runs = []
    for rank in range(2):
        with monkeypatch.context() as patched:
            (tmp_path / str(rank)).mkdir()
            runs.append(Run(plan, tmp_path / str(rank), patched, Apart(rank)))
            runs[-1](None)
    assert [run.made for run in runs] == [[0, 2, 4], [1, 3, 5]]
    rest = [shard.file for shard in plan.shards if shard.layer is None]
    assert sorted(runs[0].copied + runs[1].copied) == sorted(rest)
    assert runs[0].copied == rest[::2]


def test_layers_that_are_done_are_only_replayed_and_none_behind_the_last_one_to_be_made(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("gemma4"))
    run = Run(plan, tmp_path, monkeypatch)
    run(CALIBRATION, done_layers(plan, 0, 1, 3, 5))
    assert run.walk.replayed == [0, 1, 3]
    assert run.made == [2, 4]
    assert run.walk.is_closed


def test_without_a_layer_to_make_nothing_is_walked(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("gemma4"))
    run = Run(plan, tmp_path, monkeypatch)
    run(CALIBRATION, done_layers(plan, *range(6)))
    assert (run.walk.replayed, run.made) == ([], [])
    assert run.copied == [shard.file for shard in plan.shards if shard.layer is None]


def test_a_layer_whose_source_changed_since_it_was_made_ends_the_run(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("gemma4"))
    run = Run(plan, tmp_path, monkeypatch)
    with pytest.raises(InputError, match="the weights of layer 0 changed since the earlier run"):
        run(CALIBRATION, done_layers(plan, 0, digest="1" * 64))
    assert run.walk.is_closed
    assert run.walk.replayed == []


def test_an_error_in_a_layer_closes_the_walk_and_ends_the_reading(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("gemma4"))
    run = Run(plan, tmp_path, monkeypatch)
    run.fails_at, ended = 2, list[int]()
    monkeypatch.setattr(plan.source.content, "end", lambda: ended.append(1), raising=False)
    with pytest.raises(InputError, match=r"no layer\."):
        run(CALIBRATION)
    assert run.made == [0, 1]
    assert run.walk.is_closed
    assert ended == [1]
