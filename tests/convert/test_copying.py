"""Copies beside the walk: bytes as in the source, errors that end a run early, and no copy after an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvquant.convert import copying
from nvquant.convert.copying import Copies
from nvquant.convert.journal import Journal
from nvquant.errors import InputError
from nvquant.plan.plan import Plan, PlannedShard
from nvquant.stream.trace import Trace
from safetensors.torch import load_file
from support.conversions import TinyModels, planned, raw


class Idle:
    """In the place of a reader, which has nothing to read."""

    def wait_until_idle(self, seconds: float) -> None:
        pass


def journal_in(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.begin({})
    return journal


def rest_of(plan: Plan) -> list[PlannedShard]:
    return [shard for shard in plan.shards if shard.layer is None]


def begin(copies: Copies, shards: list[PlannedShard]) -> None:
    copies.begin(shards, Idle(), None)  # type: ignore[arg-type]


def fake(monkeypatch: pytest.MonkeyPatch, copy: Callable[..., str]) -> None:
    monkeypatch.setattr(copying, "copy_shard", copy)


def test_shards_are_copied_and_noted(tiny: TinyModels, tmp_path: Path) -> None:
    plan, journal, ticks = planned(tiny("gemma4")), journal_in(tmp_path), list[int]()
    with Copies(plan, journal, Trace()) as copies:
        begin(copies, rest_of(plan))
        copies.wait(lambda: ticks.append(1))
        copies.check()
    assert len(ticks) >= len(rest_of(plan)) >= 1
    for shard in rest_of(plan):
        assert journal.has(shard)
        copied = load_file(tmp_path / shard.file)
        assert [raw(copied[entry.name]) for entry in shard.entries] == [
            raw(plan.source.read(plan.origins[entry.name].source)) for entry in shard.entries
        ]


def test_a_failed_copy_is_reported_by_the_next_check_and_by_wait(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise InputError("the disk is full.")

    fake(monkeypatch, fail)
    plan = planned(tiny("llama"))
    with Copies(plan, journal_in(tmp_path), Trace()) as copies:
        copies.check()
        begin(copies, rest_of(plan)[:1])
        with pytest.raises(InputError, match="the disk is full"):
            copies.wait(lambda: None)
        with pytest.raises(InputError, match="the disk is full"):
            copies.check()


def test_waiting_ends_with_the_error_of_a_tick(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def wait(*_: Any) -> str:
        release.wait(30)
        return "0" * 64

    def stop() -> None:
        release.set()
        raise InterruptedError

    fake(monkeypatch, wait)
    plan = planned(tiny("llama"))
    with Copies(plan, journal_in(tmp_path), Trace()) as copies:
        begin(copies, rest_of(plan)[:1])
        with pytest.raises(InterruptedError):
            copies.wait(stop)


def test_after_giving_up_the_copy_under_way_ends_and_no_other_begins(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, journal = planned(tiny("llama")), journal_in(tmp_path)
    (shard, *_) = rest_of(plan)
    begun, given_up = threading.Event(), threading.Event()
    ended: list[str] = []

    def copy(_source: Any, _plan: Any, _folder: Path, _shard: PlannedShard, yield_to: Callable[[float], None]) -> str:
        begun.set()
        given_up.wait(30)
        try:
            yield_to(0.0)
        except InputError as error:
            ended.append(str(error))
            raise
        return "0" * 64

    fake(monkeypatch, copy)
    with Copies(plan, journal, Trace()) as copies:
        begin(copies, [shard, shard])
        assert begun.wait(30)
        copies.give_up()
        given_up.set()
    assert ended == ["the run has ended."]
    assert not journal.has(shard)
