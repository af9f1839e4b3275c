"""The time of a run: spans by phase and thread, counters, and spans of the GPU.

A trace always keeps a total for each phase and thread. With `keep_events` it also keeps every span and counter, for
`--profile`. `Trace.write` writes a file in Chrome's trace event format, which ui.perfetto.dev opens, and two tables.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ..errors import InputError

# What the phases of a conversion are; the tables show others too, without a word on them.
PHASES = {
    "import": "load Python packages, and prepare the GPU meanwhile",
    "samples": "turn text into token ids, and load the packages for it",
    "build": "build the model's structure, without weights",
    "make buffers": "allocate memory for layers and shards",
    "record": "run the model's own forward once, to learn how it calls its layers",
    "replay": "run samples through layers that an earlier run finished",
    "read": "copy from disk to host memory to device",
    "wait for read": "wait for the next layer: reading bounds the run",
    "forward": "run calibration samples through a layer",
    "statistics": "observe the inputs of matrices",
    "survey": "send a few sequences through the source, and choose an order of its channels",
    "fold": "find the exact folds of a layer, and prove them",
    "moments": "merge second moments of inputs, and turn them into means",
    "quantize": "compute scales and codes of a layer's matrices",
    "write": "copy from device to host memory, hash, write to disk",
    "wait for write": "wait for the last layer's write: writing bounds the run",
    "copy": "copy unquantized tensors byte for byte",
    "hidden states": "move hidden states between memories",
    "snapshot": "save hidden states, so that a later run can resume from them",
    "gather": "exchange statistics and results between ranks",
    "finish": "write the last files, read headers back, rename the folder",
}
MAIN, UNACCOUNTED = "main", "(in no span)"
GPU_TRACK = 1_000_000  # the GPU's streams are numbered from here, behind all threads
# (phase, name, start and duration in nanoseconds of time.perf_counter_ns, arguments)
Event = tuple[str, str, int, int, dict[str, Any]]
Row = dict[str, Any]


class Trace:
    """Time by phase and thread from now on. Every method may be called from any thread at any time."""

    def __init__(self, keep_events: bool = False) -> None:
        """Begin.

        Args:
            keep_events: keep every span and counter (about 300 bytes each), which `write` requires, or only totals.
        """
        self._keep_events = keep_events
        self._start = time.perf_counter_ns()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._tracks: list[_Track] = []
        self._added: dict[str, _Total] = {}
        self._order: dict[str, None] = {}
        self._counters: list[tuple[str, int, float]] = []
        self._gpu: _GpuTimeline | None = None
        self._local.track = self._new_track(MAIN)  # whoever makes the trace is the thread whose time is the run's

    @property
    def seconds(self) -> float:
        """Wall time since the trace was made."""
        return (time.perf_counter_ns() - self._start) / 1e9

    def span(self, phase: str, name: str = "", **args: Any) -> AbstractContextManager[None]:
        """Measure a block of code. It counts when it ends, also by an exception.

        Args:
            phase: the total to which it adds.
            name: its name in the trace, by default the phase.
            args: details shown in the trace, such as `layer=17`.

        Spans of one thread must lie within each other or apart. A span within another counts for both phases. In the
        breakdown of the main thread, the time counts for the inner one only.
        """
        return _Span(self, phase, name, args)

    def add(self, phase: str, seconds: float) -> None:
        """Add time that was measured elsewhere, for instance before the trace began, to the total of a phase.

        Its beginning is unknown, so it is not an event and not part of the main thread's breakdown.
        """
        with self._lock:
            self._order.setdefault(phase)
            self._added.setdefault(phase, _Total()).count_in(round(seconds * 1e9))

    def counter(self, name: str, value: float) -> None:
        """Record a value at this moment, such as bytes read or memory in use, for a curve in the trace."""
        if self._keep_events and math.isfinite(value):
            self._counters.append((name, time.perf_counter_ns(), value))

    def gpu_span(self, phase: str, name: str = "") -> AbstractContextManager[None]:
        """Measure the work of the current CUDA stream for a block of code, without waiting for it.

        It does nothing if events are not kept or this process has not used a GPU, and never starts CUDA by itself. It
        supports one device a process.
        """
        torch = sys.modules.get("torch")
        if not self._keep_events or torch is None or not torch.cuda.is_initialized():
            return nullcontext()
        with self._lock:
            self._gpu = self._gpu or _GpuTimeline(torch)
        return self._gpu.span(phase, name)

    @contextmanager
    def timed(self, phase: str, name: str = "") -> Iterator[None]:
        """A span of the host and, in a profile, of the GPU's current stream."""
        with self.span(phase, name), self.gpu_span(phase, name):
            yield

    def phases(self) -> dict[str, float]:
        """Seconds by phase, all threads together, in order of first appearance, without spans that are still open."""
        return {phase: row["seconds"] for phase, row in self._phase_rows(1.0).items()}

    def write(self, folder: Path) -> None:
        """Write `trace.json` (Chrome trace events), `phases.json` and `phases.txt` (see docs/profiling.md).

        Spans that are still open are left out. If the GPU was traced, this waits for it.

        Raises:
            InputError: the folder is not writable.
        """
        wall = self.seconds
        gpu = self._gpu.resolve() if self._gpu is not None else {}
        document = {
            "seconds": round(wall, 6),
            "main_thread": self._main_rows(wall),
            "phases": self._phase_rows(wall),
            "gpu": _gpu_rows(gpu, wall),
        }
        prepare_folder(folder)
        try:
            with (folder / "trace.json").open("w", encoding="utf-8") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
                for at, event in enumerate(self._chrome_events(gpu)):
                    file.write((",\n" if at else "") + json.dumps(event, ensure_ascii=False))
                file.write("\n]}\n")
            (folder / "phases.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
            (folder / "phases.txt").write_text(_tables(document), "utf-8")
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _new_track(self, name: str) -> _Track:
        with self._lock:
            track = _Track(len(self._tracks), name)
            self._tracks.append(track)
            return track

    def _track(self) -> _Track:
        """The calling thread's track. Not by the system's thread id: that of an ended thread is given out again."""
        try:
            track: _Track = self._local.track
        except AttributeError:
            track = self._local.track = self._new_track(threading.current_thread().name)
        return track

    def _total(self, track: _Track, phase: str) -> _Total:
        with self._lock:  # dicts grow under the lock only, so that phases() may walk them meanwhile
            self._order.setdefault(phase)
            return track.totals.setdefault(phase, _Total())

    def _phase_rows(self, wall: float) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        with self._lock:
            for phase in self._order:
                totals = {track: track.totals[phase] for track in self._tracks if phase in track.totals}
                added = [self._added[phase]] if phase in self._added else []
                both = [*totals.values(), *added]
                rows[phase] = _row(sum(total.ns for total in both), sum(total.count for total in both), wall)
                rows[phase]["threads"] = list(dict.fromkeys(track.name for track in totals))
        return rows

    def _main_rows(self, wall: float) -> dict[str, Row]:
        """The main thread's own time by phase, most first, and the rest: together the wall time."""
        with self._lock:
            totals = sorted(self._tracks[0].totals.items(), key=lambda item: -item[1].own_ns)
            rows = {phase: _row(total.own_ns, total.count, wall) for phase, total in totals}
        spent = sum(total.own_ns for _, total in totals)
        return {**rows, UNACCOUNTED: _row(max(0, round(wall * 1e9) - spent), 0, wall)}

    def _chrome_events(self, gpu: Mapping[str, list[Event]]) -> Iterator[Row]:
        """Events in the form of the "Trace Event Format" document: metadata M, complete events X, counters C."""
        pid = os.getpid()
        tracks = [(track.tid, track.name, list(track.events)) for track in self._tracks]
        tracks += [(GPU_TRACK + at, name, events) for at, (name, events) in enumerate(gpu.items())]
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": "nvquant"}}
        for tid, name, events in tracks:
            about = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
            yield {**about, "name": "thread_name", "args": {"name": name}}
            yield {**about, "name": "thread_sort_index", "args": {"sort_index": tid}}
            for phase, label, start, duration, args in events:
                yield {
                    "ph": "X", "name": label or phase, "cat": phase, "pid": pid, "tid": tid,
                    "ts": self._microseconds(start), "dur": duration / 1000,
                    "args": {key: _plain(value) for key, value in args.items()},
                }  # fmt: skip
        for name, at, value in list(self._counters):
            about = {"ph": "C", "pid": pid, "tid": 0, "ts": self._microseconds(at)}
            yield {**about, "name": name, "args": {"value": value}}

    def _microseconds(self, at: int) -> float:
        return (at - self._start) / 1000


def prepare_folder(folder: Path) -> None:
    """Create the folder of a profile, or check before a run that it is writable.

    Raises:
        InputError: it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".nvquant-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{folder} cannot be written ({error.strerror})", where=folder, hint="name another folder with --profile"
    )


class _Total:
    """Nanoseconds and number of the spans of a phase. `own_ns` excludes the time of spans within them."""

    __slots__ = ("count", "ns", "own_ns")

    def __init__(self) -> None:
        self.ns = self.own_ns = self.count = 0

    def count_in(self, ns: int, inner_ns: int = 0) -> None:
        self.ns += ns
        self.own_ns += ns - inner_ns
        self.count += 1


class _Track:
    """The spans of one thread. Only that thread writes to it, so that spans need no lock."""

    __slots__ = ("events", "name", "open", "tid", "totals")

    def __init__(self, tid: int, name: str) -> None:
        self.tid, self.name = tid, name
        self.totals: dict[str, _Total] = {}
        self.events: list[Event] = []
        self.open: _Span | None = None  # the innermost


class _Span:
    __slots__ = ("_args", "_name", "_parent", "_phase", "_start", "_total", "_trace", "_track", "inner_ns")

    def __init__(self, trace: Trace, phase: str, name: str, args: dict[str, Any]) -> None:
        self._trace, self._phase, self._name, self._args = trace, phase, name, args

    def __enter__(self) -> None:
        track = self._track = self._trace._track()
        self._total = track.totals.get(self._phase) or self._trace._total(track, self._phase)
        self._parent, track.open = track.open, self
        self.inner_ns = 0
        self._start = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ns = time.perf_counter_ns() - self._start
        self._total.count_in(ns, self.inner_ns)
        self._track.open = self._parent
        if self._parent is not None:
            self._parent.inner_ns += ns
        if self._trace._keep_events:
            args = self._args if kind is None else {**self._args, "error": kind.__name__}
            self._track.events.append((self._phase, self._name, self._start, ns, args))


class _GpuTimeline:
    """Pairs of CUDA events, placed on the host's clock by an event of which both times are known."""

    def __init__(self, torch: ModuleType) -> None:
        self._cuda = torch.cuda
        self._anchor = self._cuda.Event(enable_timing=True)
        self._cuda.synchronize()  # nothing is queued before the anchor, so it happens now
        self._anchor.record()
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()
        self._spans: list[tuple[str, str, int, Any, Any]] = []

    @contextmanager
    def span(self, phase: str, name: str) -> Iterator[None]:
        stream = self._cuda.current_stream()
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        start.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._spans.append((phase, name, stream.cuda_stream, start, end))

    def resolve(self) -> dict[str, list[Event]]:
        """Events by track, one for each stream, because the work of one stream never overlaps.

        Both ends are measured from the anchor: CUDA gives float32 milliseconds, whose rounding keeps the order.
        """
        self._cuda.synchronize()
        tracks: dict[str, list[Event]] = {}
        streams: dict[int, str] = {}
        for phase, name, stream, start, end in list(self._spans):
            track = streams.setdefault(stream, f"GPU stream {len(streams)}" if streams else "GPU")
            first, last = (self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6) for event in (start, end))
            tracks.setdefault(track, []).append((phase, name, first, last - first, {}))
        return tracks


def _gpu_rows(tracks: Mapping[str, list[Event]], wall: float) -> dict[str, Row]:
    totals: dict[str, _Total] = {}
    for phase, _, _, duration, _ in (event for events in tracks.values() for event in events):
        totals.setdefault(phase, _Total()).count_in(duration)
    return {phase: _row(total.ns, total.count, wall) for phase, total in totals.items()}


def _row(ns: int, count: int, wall: float) -> Row:
    return {"seconds": ns / 1e9, "share": round(ns / 1e9 / wall, 6), "count": count}


def _plain(value: Any) -> Any:
    """A value that JSON has, or the text of any other one, such as a path, a dtype or an infinity."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _tables(document: Mapping[str, Any]) -> str:
    main, phases, gpu = document["main_thread"], document["phases"], document["gpu"]
    most = max(main, key=lambda phase: main[phase]["seconds"])
    lines = [
        f"The run took {document['seconds']:.2f} s. Of the main thread's time, most went to: "
        f"{most} ({main[most]['share']:.0%}).",
        "",
        "Main thread, own time: a nested span counts for itself only, and the rows add up to the run.",
        *_table(main, {phase: PHASES.get(phase, "") for phase in main}),
        "",
        "All threads, total time: threads work in parallel, and a nested span counts for both.",
        *_table(phases, {phase: f"{', '.join(row['threads']) or '-':<10}" for phase, row in phases.items()}, PHASES),
    ]
    if gpu:
        lines += ["", "GPU: time of the device, which works in parallel with the host.", *_table(gpu, {})]
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, Row], *notes: Mapping[str, str]) -> Iterator[str]:
    width = max(len("phase"), *(len(phase) for phase in rows)) if rows else 0
    yield f"  {'phase':<{width}}  {'seconds':>9}  {'share':>6}  {'count':>8}"
    for phase, row in rows.items():
        numbers = f"  {phase:<{width}}  {row['seconds']:>9.3f}  {row['share']:>6.1%}  {row['count']:>8,}"
        yield "  ".join([numbers, *(note.get(phase, "") for note in notes)]).rstrip()
