"""The progress of a conversion on stderr: a live block on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ..convert.progress import Progress, ProgressSink

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_INTERVAL_SECONDS = 10.0
REFRESHES_PER_SECOND = 4  # rich's thread draws; at most 8, and each costs a millisecond of the interpreter
RATE_WINDOW_SECONDS = 10.0
SAMPLE_SECONDS = 0.25

Clock = Callable[[], float]


def progress_display(
    stream: TextIO | None = None, *, console: Console | None = None, clock: Clock = time.monotonic
) -> AbstractContextManager[ProgressSink]:
    """Show the states that the sink receives, from any thread, until the block ends.

    On a terminal a live block, gone at the end however that comes. Elsewhere plain lines without escape sequences: one
    at once for each new phase, one a layer but at most one every 10 s, and a last one when the block ends without an
    error and every layer is done.

    Args:
        stream: where to write, `sys.stderr` by default.
        console: a rich console that shows the live block, whatever the stream is.
        clock: seconds, from any beginning, for tests.
    """
    stream = stream if stream is not None else sys.stderr
    if console is None and stream.isatty():
        from rich.console import Console

        console = Console(file=stream)
    # A dumb terminal cannot move its cursor. `console.is_terminal` would also believe FORCE_COLOR.
    if console is not None and not console.is_dumb_terminal:
        return _Live(console, clock)
    return _Plain(stream, clock)


class _Rates:
    """Speeds over the last ten seconds of the run's own clock."""

    def __init__(self) -> None:
        self._samples: deque[Progress] = deque([Progress("")])

    def add(self, progress: Progress) -> None:
        samples = self._samples
        while len(samples) > 1 and samples[1].seconds <= progress.seconds - RATE_WINDOW_SECONDS:
            samples.popleft()
        if progress.seconds >= samples[-1].seconds + SAMPLE_SECONDS:
            samples.append(progress)

    def of(self, progress: Progress, whole_run: bool = False) -> tuple[float, float, float] | None:
        """(bytes read, bytes written, tokens) a second, or None before any time has passed."""
        since = Progress("") if whole_run else self._samples[0]
        seconds = progress.seconds - since.seconds
        if seconds <= 0:
            return None
        return (
            (progress.bytes_read - since.bytes_read) / seconds,
            (progress.bytes_written - since.bytes_written) / seconds,
            (progress.tokens_done - since.tokens_done) / seconds,
        )


class _Display(AbstractContextManager[ProgressSink]):
    """The base of both displays: the latest state, speeds, and a remaining time that counts down between layers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._latest: Progress | None = None
        self._rates = _Rates()
        self._eta: float | None = None
        self._eta_since = 0.0

    def _take(self, progress: Progress) -> bool:
        """Store a state. Return False if another thread's report has overtaken it. The caller must have the lock."""
        latest = self._latest
        if latest is not None and progress.seconds < latest.seconds:
            return False
        if latest is None or progress.layers_done != latest.layers_done:
            self._eta, self._eta_since = progress.eta_seconds, self._clock()
        self._rates.add(progress)
        self._latest = progress
        return True

    def _eta_now(self) -> float | None:
        return None if self._eta is None else max(0.0, self._eta - (self._clock() - self._eta_since))


class _Plain(_Display):
    """Lines of `key=value` that report the progress, as few as necessary."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        super().__init__(clock)
        self._stream = stream
        self._phases_seen: set[str] = set()
        self._printed = (-1, 0)
        self._printed_at = -PLAIN_INTERVAL_SECONDS

    def __enter__(self) -> ProgressSink:
        return self._report

    def _report(self, progress: Progress) -> None:
        with self._lock:
            if not self._take(progress):
                return
            now = self._clock()
            is_new_phase = progress.phase not in self._phases_seen
            state = (progress.layers_done, progress.bytes_fetched)
            is_due = state != self._printed and now - self._printed_at >= PLAIN_INTERVAL_SECONDS
            if is_new_phase or is_due:
                self._phases_seen.add(progress.phase)
                self._printed, self._printed_at = state, now
                self._print(progress, progress.phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            latest = self._latest
            if kind is None and latest is not None and latest.layers_done >= latest.layers:
                self._print(latest, "done", whole_run=True)

    def _print(self, progress: Progress, phase: str, whole_run: bool = False) -> None:
        fields = {
            "layer": f"{progress.layers_done}/{progress.layers}" if progress.layers else "",
            "phase": f'"{phase}"' if " " in phase else phase,
            "fetched": _fetched(progress),
            "skipped": str(progress.layers_skipped or ""),
            **_plain_rates(self._rates.of(progress, whole_run), bool(progress.tokens_total)),
            "rss": _size(progress.host_bytes) if progress.host_bytes else "",
            "gpu": _size(progress.gpu_bytes) if progress.gpu_bytes else "",
            "eta": "" if whole_run else _duration(self._eta_now()),
        }
        text = " ".join(f"{key}={value}" for key, value in fields.items() if value)
        with suppress(OSError):  # a reader that went away must not end the run
            self._stream.write(f"{time.strftime('%H:%M:%S')} convert {text}\n")
            self._stream.flush()


class _Live(_Display):
    """A block of three lines that rich redraws in a thread of its own, so that time advances during a long layer.

    The cursor stays visible: a process that the system kills could not give it back.
    """

    def __init__(self, console: Console, clock: Clock) -> None:
        from rich.live import Live

        super().__init__(clock)
        self._console = console
        self._began = clock()
        # Stdout carries the result, so it is never taken; what others say on stderr appears above the block.
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=console.file is sys.stderr,
        )

    def __enter__(self) -> ProgressSink:
        try:
            self._live.start()
            self._console.show_cursor(True)
        except BaseException:
            self._stop()
            raise
        return self._report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        with suppress(OSError):  # the terminal is gone
            try:
                self._live.stop()
            finally:
                self._console.show_cursor(True)

    def _report(self, progress: Progress) -> None:
        with self._lock:
            self._take(progress)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            progress = self._latest or Progress("starting")
            speeds, eta = self._rates.of(progress), _duration(self._eta_now())
            elapsed = _duration(self._clock() - self._began)
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=progress.layers or 1, completed=progress.layers_done, width=24)
        layer = f"layer {progress.layers_done}/{progress.layers}" if progress.layers else ""
        earlier = f"({progress.layers_skipped} by an earlier run)" if progress.layers_skipped else ""
        fetched = f"fetched {_fetched(progress, ' ')}" if progress.bytes_to_fetch else ""
        cells = [layer, progress.phase, earlier, fetched, f"{progress.ranks} ranks" if progress.ranks > 1 else ""]
        head.add_row(bar, *(Text(cell, no_wrap=True) for cell in cells if cell))
        lines = [_words(_live_rates(speeds, bool(progress.tokens_total)))]
        memory = {"RSS": progress.host_bytes, "GPU": progress.gpu_bytes}
        sizes = [f"{name} {_size(size, ' ')}" for name, size in memory.items() if size]
        lines.append(_words([f"elapsed {elapsed}", f"ETA {eta}" if eta else "", *sizes]))
        return Group(head, *(Text(line, no_wrap=True, overflow="crop") for line in lines))


def _plain_rates(speeds: tuple[float, float, float] | None, has_tokens: bool) -> dict[str, str]:
    if speeds is None:
        return {}
    read, write, tokens = speeds
    return {
        "read": f"{_size(read)}/s",
        "write": f"{_size(write)}/s",
        "tokens/s": f"{tokens:,.0f}" if has_tokens else "",
    }


def _live_rates(speeds: tuple[float, float, float] | None, has_tokens: bool) -> list[str]:
    if speeds is None:
        return []
    read, write, tokens = speeds
    words = [f"read {_size(read, ' ')}/s", f"write {_size(write, ' ')}/s"]
    return [f"{tokens:,.0f} tokens/s", *words] if has_tokens else words


def _fetched(progress: Progress, space: str = "") -> str:
    """The fetched share of the files from the Hub, or nothing if there are no such files."""
    if not progress.bytes_to_fetch:
        return ""
    return f"{_size(progress.bytes_fetched, space)}{space}/{space}{_size(progress.bytes_to_fetch, space)}"


def _words(parts: list[str]) -> str:
    return "  ".join(part for part in parts if part)


def _size(size: float, space: str = "") -> str:
    """Bytes as GB (10^9), in MB where that would show no digit but 0."""
    return f"{size / 1e9:.1f}{space}GB" if size >= 0.1e9 else f"{size / 1e6:.0f}{space}MB"


def _duration(seconds: float | None) -> str:
    """`41s`, `12m05s`, `1h12m`, or nothing if it is unknown."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
