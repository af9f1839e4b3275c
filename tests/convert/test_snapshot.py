"""Snapshots of hidden states: a continued run begins behind one instead of computing the finished layers again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import nvquant.convert.snapshot
import nvquant.convert.watch
import pytest
import torch
from nvquant.convert.journal import STATE_FOLDER, Journal
from nvquant.convert.options import ConvertOptions, ConvertResult
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.convert.snapshot import RECORD_NAME, Snapshots
from nvquant.convert.stop import Stopped, StopRequest
from nvquant.stream.hidden import HiddenBudget, HiddenStates
from nvquant.stream.trace import Trace
from safetensors.torch import load_file
from support.conversions import TinyModels, calibration_of, contents, planned, random_samples, write_ids
from torch import Tensor

LAYERS_BEFORE = 3
TOKENS = sum(map(len, random_samples()))
# Times that the tokens pass a layer: with two lanes the source once, then the quantized path up to four sites and on.
PASSES = {"mse": 1, "gptq": 1 + 4 + 1}


@pytest.fixture(autouse=True)
def at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot behind every layer, however short the run, and word of every batch."""
    monkeypatch.setattr(nvquant.convert.snapshot, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(nvquant.convert.watch, "TELL_SECONDS", 0.0)
    monkeypatch.setattr(nvquant.convert.snapshot, "SHARE_OF_TIME", float("inf"))


class Run:
    """A calibrated conversion of a tiny model, which may be ended behind a few layers."""

    def __init__(self, source: Path, folder: Path, quantizer: str = "mse") -> None:
        self.source, self.quantizer = source, quantizer
        self.output = folder / "out"
        self.state = partial_folder(self.output) / STATE_FOLDER
        self._calibration = calibration_of(source, write_ids(folder / "ids.jsonl", random_samples()))
        self.trace = Trace()

    def __call__(self, output: Path | None = None, stop_after: int | None = None) -> ConvertResult:
        """Run; with `stop_after`, ask for the end once the walk has begun with the layer behind so many."""
        self.trace, stop = Trace(keep_events=True), StopRequest()

        def sink(now: Progress) -> None:
            walked = now.layers_skipped + now.tokens_done / (PASSES[self.quantizer] * TOKENS)
            if stop_after is not None and walked > stop_after:
                stop.number = signal.SIGTERM

        options = ConvertOptions(output or self.output, self.quantizer, progress=sink, trace=self.trace, stop=stop)
        return convert(planned(self.source), options, self._calibration)

    def end_early(self) -> None:
        with pytest.raises(Stopped):
            self(stop_after=LAYERS_BEFORE)

    def undisturbed(self) -> dict[str, str]:
        output = self.output.with_name("undisturbed")
        self(output)
        found = contents(output)
        shutil.rmtree(output)
        return found

    def spans(self, phase: str) -> list[str]:
        """Names of the last run's spans of a phase."""
        folder = self.output.with_name("profile")
        self.trace.write(folder)
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        shutil.rmtree(folder)
        return [event["name"] for event in events if event.get("cat") == phase]


@pytest.fixture
def gemma4(tiny: TinyModels, tmp_path: Path) -> Run:
    return Run(tiny("gemma4"), tmp_path)


def snapshot_in(run: Run) -> tuple[int, Path]:
    """The layer behind which the snapshot was taken, and its file; there is no other one."""
    record = json.loads((run.state / RECORD_NAME).read_text())
    assert [path.name for path in run.state.glob("hidden-*")] == [record["file"]]
    return int(record["layer"]), run.state / record["file"]


def layers(numbers: range) -> list[str]:
    return [f"layer {number}" for number in numbers]


@pytest.mark.parametrize("quantizer", ["mse", "gptq"])
def test_a_continued_run_begins_behind_the_snapshot(tiny: TinyModels, tmp_path: Path, quantizer: str) -> None:
    run = Run(tiny("gemma4"), tmp_path, quantizer)
    expected = run.undisturbed()
    run.end_early()
    behind, snapshot = snapshot_in(run)
    lanes = {name.partition(".")[0] for name in load_file(snapshot)}
    assert lanes == ({"source", "quantized"} if quantizer == "gptq" else {"source"})
    result = run()
    assert result.layers_resumed == behind + 1 == LAYERS_BEFORE
    assert "replay" not in result.phases
    assert run.spans("read") == layers(range(behind + 1, 6))
    assert contents(run.output) == expected


def test_without_its_snapshot_a_run_in_two_lanes_is_replayed(tiny: TinyModels, tmp_path: Path) -> None:
    """The quantized lane goes through the layers that were written, decoded again."""
    run = Run(tiny("gemma4"), tmp_path, "gptq")
    expected = run.undisturbed()
    run.end_early()
    snapshot_in(run)[1].unlink()
    result = run()
    assert run.spans("replay") == layers(range(result.layers_resumed))
    assert contents(run.output) == expected


def test_a_run_may_be_continued_from_snapshots_again_and_again(gemma4: Run) -> None:
    expected = gemma4.undisturbed()
    for count in (1, 3, 5):
        with pytest.raises(Stopped, match=f"Stopped after layer {count} of 6"):
            gemma4(stop_after=count)
        assert snapshot_in(gemma4)[0] == count - 1
    assert gemma4().layers_resumed == 5
    assert contents(gemma4.output) == expected


def flip_a_byte(snapshot: Path, record: Path) -> None:
    data = snapshot.read_bytes()
    snapshot.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cut_short(snapshot: Path, record: Path) -> None:
    snapshot.write_bytes(snapshot.read_bytes()[:100])


def remove(snapshot: Path, record: Path) -> None:
    snapshot.unlink()


def spoil_record(snapshot: Path, record: Path) -> None:
    record.write_text('{"layer": ')


def empty_record(snapshot: Path, record: Path) -> None:
    record.write_text("{}")


def name_no_number(snapshot: Path, record: Path) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"layer": "three"}))


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, remove, spoil_record, empty_record, name_no_number])
def test_a_damaged_snapshot_costs_only_time(gemma4: Run, damage: Callable[[Path, Path], None]) -> None:
    expected = gemma4.undisturbed()
    gemma4.end_early()
    _, snapshot = snapshot_in(gemma4)
    damage(snapshot, gemma4.state / RECORD_NAME)
    result = gemma4()
    assert result.layers_resumed == LAYERS_BEFORE
    assert gemma4.spans("read") == layers(range(6))
    assert gemma4.spans("replay") == layers(range(result.layers_resumed))
    assert contents(gemma4.output) == expected


def test_a_snapshot_behind_a_layer_that_is_to_be_made_again_is_not_used(gemma4: Run) -> None:
    expected = gemma4.undisturbed()
    gemma4.end_early()
    first = planned(gemma4.source).shards[0]
    assert first.layer == 0
    (partial_folder(gemma4.output) / first.file).unlink()
    result = gemma4()
    assert gemma4.spans("read") == layers(range(6))
    assert gemma4.spans("replay") == layers(range(1, result.layers_resumed + 1))
    assert contents(gemma4.output) == expected


def test_no_snapshot_is_taken_of_a_model_whose_layers_share_more_than_the_hidden_state(
    tiny: TinyModels, tmp_path: Path
) -> None:
    run = Run(tiny("gemma4_e2b"), tmp_path)
    expected = run.undisturbed()
    run.end_early()
    assert [path.name for path in run.state.iterdir() if path.name.startswith("hidden")] == []
    result = run()
    assert run.spans("replay") == layers(range(result.layers_resumed))
    assert contents(run.output) == expected


def test_a_short_run_takes_no_snapshot(gemma4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvquant.convert.snapshot, "LEAST_SECONDS", 3600.0)
    gemma4.end_early()
    assert [path.name for path in gemma4.state.iterdir() if path.name.startswith("hidden")] == []


def hidden_states(values: list[Tensor], budget: int, folder: Path) -> HiddenStates:
    states = HiddenStates(torch.device("cpu"), HiddenBudget(budget, 0, folder))
    for value in values:
        states.append(value)
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budgets", [(1 << 20, 0), (0, 1 << 20), (0, 0)])
def test_hidden_states_come_back_bit_for_bit_wherever_they_wait(
    tmp_path: Path, dtype: torch.dtype, budgets: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 7, 16), (1, 30, 16), (3, 7, 16))]
    journal = Journal(tmp_path)
    journal.begin({})
    taken = hidden_states(values, budgets[0], tmp_path)
    other = hidden_states([-value for value in values], budgets[0], tmp_path)
    Snapshots(journal, Trace(), is_used=True).consider(4, {"source": taken, "quantized": other})
    restoring = Snapshots(journal, Trace(), is_used=True)
    assert restoring.find(before=4) is None
    assert restoring.find(before=5) == 4
    zeros = [torch.zeros_like(value) for value in values]
    restored = {lane: hidden_states(zeros, budgets[1], tmp_path) for lane in ("source", "quantized")}
    restoring.restore(restored)
    for at, value in enumerate(values):
        assert torch.equal(restored["source"].fetch(at), value)
        assert torch.equal(restored["quantized"].fetch(at), -value)
        assert torch.equal(taken.fetch(at), value)
    for states in (taken, other, *restored.values()):
        states.close()


def test_snapshots_that_are_not_to_be_used_are_neither_taken_nor_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin({})
    states = hidden_states([torch.ones(1, 4, 16)], 1 << 20, tmp_path)
    Snapshots(journal, Trace(), is_used=False).consider(0, {"source": states})
    assert not (journal.folder / RECORD_NAME).exists()
    Snapshots(journal, Trace(), is_used=True).consider(0, {"source": states})
    assert (journal.folder / RECORD_NAME).exists()
    assert Snapshots(journal, Trace(), is_used=False).find(before=1) is None
