"""The trace: totals by phase and thread, and the three files of a profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvquant.errors import InputError
from nvquant.stream.trace import MAIN, PHASES, UNACCOUNTED, Trace, prepare_folder

Json = dict[str, Any]
# A tree of spans: (phase, whether it raises, the spans within it).
SPANS = st.recursive(
    st.builds(lambda phase, fails: (phase, fails, []), st.sampled_from("abc"), st.booleans()),
    lambda inner: st.tuples(st.sampled_from("abc"), st.booleans(), st.lists(inner, max_size=4)),
    max_leaves=12,
)


class Boom(Exception):
    """What the spans of these tests raise."""


def written(trace: Trace, folder: Path) -> tuple[list[Json], Json, str]:
    """The events, the phases and the table that a trace writes."""
    trace.write(folder)
    document = json.loads((folder / "trace.json").read_text("utf-8"))
    phases = json.loads((folder / "phases.json").read_text("utf-8"))
    return document["traceEvents"], phases, (folder / "phases.txt").read_text("utf-8")


def spans_of(events: list[Json]) -> list[Json]:
    return [event for event in events if event["ph"] == "X"]


def thread_names(events: list[Json]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def run_span(trace: Trace, tree: tuple[str, bool, list[Any]]) -> None:
    phase, fails, inner = tree
    try:
        with trace.span(phase):
            for child in inner:
                run_span(trace, child)
            if fails:
                raise Boom
    except Boom:
        pass


def size(tree: tuple[str, bool, list[Any]]) -> int:
    return 1 + sum(map(size, tree[2]))


def assert_nested(events: list[Json]) -> None:
    """Spans of a track lie within each other or apart; in nanoseconds, since sums of float microseconds round."""
    by_track = defaultdict(list)
    for event in spans_of(events):
        start = round(event["ts"] * 1000)
        by_track[event["tid"]].append((start, start + round(event["dur"] * 1000)))
    for track in by_track.values():
        open_until: list[int] = []
        for start, end in sorted(track, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def three_threads(trace: Trace) -> None:
    """Reads, computes and writes at once, each in a thread of its own."""
    together = threading.Barrier(3)

    def work(phase: str) -> None:
        together.wait()
        for layer in range(20):
            with trace.span(phase, f"{phase} {layer}", layer=layer), trace.span("inner"):
                pass

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        futures = [reader.submit(work, "read"), writer.submit(work, "write")]
        work("forward")
        for future in futures:
            future.result()


def test_events_have_all_that_the_chrome_format_requires(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    three_threads(trace)
    trace.counter("bytes read", 5_000_000_000)
    trace.counter("RSS", 1.5e9)
    with trace.span("quantize", layer=3, path=tmp_path, dtype=torch.bfloat16, nothing=None, factor=float("inf")):
        pass
    events, _, _ = written(trace, tmp_path)
    for event in events:
        assert event["ph"] in ("X", "M", "C")
        assert isinstance(event["name"], str) and event["name"]
        assert event["pid"] == os.getpid() and type(event["tid"]) is int
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert isinstance(event["dur"], (int, float)) and event["dur"] >= 0
            assert event["ts"] + event["dur"] <= trace.seconds * 1e6
    assert {event["tid"] for event in spans_of(events)} <= set(thread_names(events))
    counters = [(event["name"], event["args"]) for event in events if event["ph"] == "C"]
    assert counters == [("bytes read", {"value": 5_000_000_000}), ("RSS", {"value": 1.5e9})]
    (last,) = (event for event in events if event["name"] == "quantize")
    assert last["args"] == {
        "layer": 3, "path": str(tmp_path), "dtype": "torch.bfloat16", "nothing": None, "factor": "inf",
    }  # fmt: skip


def test_threads_at_work_at_once_get_tracks_of_their_own(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    three_threads(trace)
    events, phases, _ = written(trace, tmp_path)
    names = thread_names(events)
    tracks = {event["cat"]: event["tid"] for event in spans_of(events) if event["cat"] != "inner"}
    assert {phase: names[tid] for phase, tid in tracks.items()} == {
        "read": "read_0", "write": "write_0", "forward": MAIN,
    }  # fmt: skip
    assert len(set(tracks.values())) == 3
    assert_nested(events)
    assert phases["phases"]["inner"]["count"] == 60
    assert sorted(phases["phases"]["inner"]["threads"]) == [MAIN, "read_0", "write_0"]
    assert set(phases["main_thread"]) == {"forward", "inner", UNACCOUNTED}


def test_a_thread_that_follows_an_ended_one_gets_another_track(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    for at in range(3):  # the system gives an ended thread's number out again
        thread = threading.Thread(target=run_span, args=(trace, ("read", False, [])), name=f"reader {at}")
        thread.start()
        thread.join()
    events, _, _ = written(trace, tmp_path)
    assert [thread_names(events)[event["tid"]] for event in spans_of(events)] == ["reader 0", "reader 1", "reader 2"]


@given(trees=st.lists(SPANS, max_size=5))
def test_every_span_counts_once_even_if_it_raises_and_totals_are_sums(
    trees: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = Trace(keep_events=True)
    for tree in trees:
        run_span(trace, tree)
    events, phases, _ = written(trace, tmp_path_factory.mktemp("profile"))
    spans = spans_of(events)
    assert len(spans) == sum(map(size, trees)) == sum(row["count"] for row in phases["phases"].values())
    assert_nested(events)
    sums: dict[str, int] = defaultdict(int)
    for event in spans:
        sums[event["cat"]] += round(event["dur"] * 1000)
    assert {phase: round(seconds * 1e9) for phase, seconds in trace.phases().items()} == sums
    assert {phase: round(row["seconds"] * 1e9) for phase, row in phases["phases"].items()} == sums
    # The main thread's own times and the rest are the run.
    own = sum(row["seconds"] for row in phases["main_thread"].values())
    assert own == pytest.approx(phases["seconds"], abs=1e-6)
    assert all(row["seconds"] >= 0 for row in phases["main_thread"].values())


def test_a_span_that_raises_says_with_what_and_lets_it_pass(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    with pytest.raises(Boom), trace.span("write", "layer 3"):
        raise Boom
    events, _, _ = written(trace, tmp_path)
    (event,) = spans_of(events)
    assert (event["name"], event["cat"], event["args"]) == ("layer 3", "write", {"error": "Boom"})


def test_events_lie_where_they_happened(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    before = trace.seconds * 1e6
    with trace.span("first"):
        with trace.span("inner"):
            time.sleep(0.01)
        between = trace.seconds * 1e6
        trace.counter("RSS", 1)
    with trace.span("second"):
        pass
    events, _, _ = written(trace, tmp_path)
    at = {event["name"]: (event["ts"], event["ts"] + event.get("dur", 0)) for event in events if event["ph"] in "XC"}
    order = [before, at["first"][0], at["inner"][0], at["inner"][1], between, at["RSS"][0], at["first"][1]]
    assert order == sorted(order)
    assert at["first"][1] <= at["second"][0] <= at["second"][1] <= trace.seconds * 1e6
    assert at["inner"][1] - at["inner"][0] >= 10_000  # microseconds


def test_time_within_an_inner_span_is_not_the_outer_ones_own(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("forward"):
        for _ in range(2):
            with trace.span("wait for read"):
                time.sleep(0.02)
    _, phases, _ = written(trace, tmp_path)
    whole, own = phases["phases"], phases["main_thread"]
    assert whole["forward"]["seconds"] >= whole["wait for read"]["seconds"] >= 0.04
    assert own["wait for read"]["seconds"] == whole["wait for read"]["seconds"]
    outer = whole["forward"]["seconds"] - whole["wait for read"]["seconds"]
    assert own["forward"]["seconds"] == pytest.approx(outer, abs=2e-9)


def test_without_events_totals_are_kept_and_the_trace_is_empty(tmp_path: Path) -> None:
    trace = Trace()
    three_threads(trace)
    trace.counter("RSS", 1)
    events, phases, _ = written(trace, tmp_path)
    assert {event["ph"] for event in events} == {"M"}
    assert phases["phases"]["read"]["count"] == 20
    assert phases["phases"]["inner"]["count"] == 60


def test_phases_come_in_the_order_in_which_they_began() -> None:
    trace = Trace()
    trace.add("import", 1.5)
    with trace.span("record"), trace.span("read"):
        pass
    trace.add("read", 0.25)
    trace.add("import", 1.5)
    assert list(trace.phases()) == ["import", "record", "read"]
    assert trace.phases()["import"] == 3.0
    assert 0.25 <= trace.phases()["read"] < 0.25 + trace.seconds


def test_added_time_is_not_the_main_threads(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    trace.add("import", 100.0)
    events, phases, text = written(trace, tmp_path)
    assert spans_of(events) == []
    assert list(phases["main_thread"]) == [UNACCOUNTED]
    assert phases["phases"]["import"]["count"] == 1
    assert "load Python packages" in text


def test_the_phases_may_be_asked_for_while_threads_add_new_ones() -> None:
    trace = Trace()
    done = threading.Event()

    def work(mark: str) -> None:
        for at in range(3000):
            with trace.span(f"{mark}{at}"):
                pass

    def ask() -> None:
        while not done.is_set():
            trace.phases()

    with ThreadPoolExecutor(3) as pool:
        asking = pool.submit(ask)
        for future in [pool.submit(work, "a"), pool.submit(work, "b")]:
            future.result()
        done.set()
        asking.result()
    assert len(trace.phases()) == 6000


def test_the_table_names_the_phase_that_bounds_the_run_and_explains_each(tmp_path: Path) -> None:
    trace = Trace()
    with ThreadPoolExecutor(1, "reader") as pool:
        pool.submit(run_span, trace, ("read", False, [])).result()
    for phase in PHASES:
        if phase != "read":
            run_span(trace, (phase, False, []))
    run_span(trace, ("of my own", False, []))
    with trace.span("wait for read"):
        time.sleep(0.1 + 2 * trace.seconds)  # more than all before together
    _, _, text = written(trace, tmp_path)
    assert "most went to: wait for read (" in text.splitlines()[0]
    _, main, everything = text.split("\n\n")
    assert main.splitlines()[2].split()[:3] == ["wait", "for", "read"]
    assert UNACCOUNTED in main and "  read " not in main
    (read,) = (line for line in everything.splitlines() if line.startswith("  read "))
    assert "reader_0" in read and read.endswith(PHASES["read"])
    assert all(words in everything for words in PHASES.values())
    assert "of my own" in everything


def test_a_second_profile_replaces_the_first(tmp_path: Path) -> None:
    trace = Trace(keep_events=True)
    three_threads(trace)
    trace.write(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["phases.json", "phases.txt", "trace.json"]
    events, _, _ = written(Trace(keep_events=True), tmp_path / "a" / "b")
    assert spans_of(events) == []


@pytest.mark.parametrize("act", [prepare_folder, Trace().write])
def test_a_folder_that_cannot_be_written_is_an_input_error(act: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"file/profile cannot be written \(Not a directory\): name another .*--profile"
    ):
        act(tmp_path / "file" / "profile")
    with pytest.raises(InputError, match=r"file cannot be written \(File exists\)"):
        act(tmp_path / "file")


def test_a_full_disk_is_an_input_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "trace.json").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        Trace(keep_events=True).write(tmp_path)


def test_gpu_spans_neither_load_torch_nor_start_cuda(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from nvquant.stream.trace import Trace
trace = Trace(keep_events=True)
with trace.gpu_span("forward"):
    pass
assert "torch" not in sys.modules
import torch
with trace.gpu_span("forward"):
    pass
trace.write(Path({str(tmp_path)!r}))
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert json.loads((tmp_path / "phases.json").read_text())["gpu"] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_gpu_spans_lie_on_tracks_of_their_own_at_the_time_of_the_work(tmp_path: Path) -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    trace = Trace(keep_events=True)
    with trace.gpu_span("forward", "products"):
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
    other = torch.cuda.Stream()
    with pytest.raises(Boom), torch.cuda.stream(other), trace.gpu_span("copy"):
        matrix.clone()
        raise Boom
    torch.cuda.synchronize()
    with trace.span("after"):
        pass
    events, phases, text = written(trace, tmp_path)
    names, spans = thread_names(events), {event["cat"]: event for event in spans_of(events)}
    assert {phase: names[event["tid"]] for phase, event in spans.items()} == {
        "forward": "GPU", "copy": "GPU stream 1", "after": MAIN,
    }  # fmt: skip
    forward, after = spans["forward"], spans["after"]
    assert forward["name"] == "products" and forward["dur"] > 0
    # The clocks of host and device may differ by microseconds, not by a millisecond.
    assert 0 <= forward["ts"] and forward["ts"] + forward["dur"] < after["ts"] + 1000
    assert list(phases["gpu"]) == ["forward", "copy"] and "forward" not in phases["phases"]
    assert "GPU: time of the device" in text
    assert_nested(events)
