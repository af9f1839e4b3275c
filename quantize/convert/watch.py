"""Reports of the progress of a run, and the moments at which the run checks for a request to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..stream.memory import gpu_bytes_now, host_bytes_now
from .options import ConvertOptions
from .progress import Progress
from .stop import Stopped

if TYPE_CHECKING:
    from ..stream.reading import LayerReader
    from ..stream.writing import ShardWriter

TELL_SECONDS = 0.25


@dataclass
class Counters:
    """The work of a run, as its threads count it.

    Attributes:
        skipped: layers that an earlier run finished.
        finished: layers that this process finished.
        setup_seconds: before the first layer.
    """

    phase: str = "start"
    layers: int = 0
    skipped: int = 0
    finished: int = 0
    tokens: int = 0
    tokens_total: int = 0
    setup_seconds: float = 0.0


class Meters:
    """The counts that others keep: bytes of the reader and the writer, downloads, layers of all processes."""

    def __init__(self) -> None:
        self.reader: LayerReader | None = None
        self.writer: ShardWriter | None = None
        self.layers: Callable[[], int] | None = None
        self.fetched: Callable[[], tuple[int, int]] = lambda: (0, 0)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source."""
        return self.reader.bytes_read if self.reader is not None else 0

    @property
    def bytes_written(self) -> int:
        """Bytes written to the output."""
        return self.writer.bytes_written if self.writer is not None else 0


class Reporter:
    """Sends the state of a run to `options.progress` and to the trace, from rank 0.

    Attributes:
        last: when it reported, by the monotonic clock.
    """

    def __init__(self, options: ConvertOptions, started: float) -> None:
        self._options, self._started = options, started
        self.last = 0.0

    def report(self, counters: Counters, meters: Meters, layers_done: int) -> None:
        """Report the state now."""
        ranks = self._options.ranks
        if ranks.rank != 0:
            return
        self.last = time.monotonic()
        fetched, to_fetch = meters.fetched()
        now = Progress(
            phase=counters.phase,
            layers_done=layers_done,
            layers=counters.layers,
            seconds=self.last - self._started,
            tokens_done=counters.tokens,
            tokens_total=counters.tokens_total,
            bytes_read=meters.bytes_read,
            bytes_written=meters.bytes_written,
            bytes_fetched=fetched,
            bytes_to_fetch=to_fetch,
            host_bytes=host_bytes_now(),
            gpu_bytes=gpu_bytes_now(),
            layers_skipped=counters.skipped,
            rank=ranks.rank,
            ranks=ranks.size,
            setup_seconds=counters.setup_seconds,
        )
        values = {"bytes read": now.bytes_read, "bytes written": now.bytes_written, "host memory": now.host_bytes}
        for name, value in values.items():
            self._options.trace.counter(name, value)
        self._options.progress(now)


class Watch:
    """Counts the work of a run, reports it, and checks for a request to end the run."""

    def __init__(self, options: ConvertOptions) -> None:
        self._stop, self._started = options.stop, time.monotonic()
        self._lock = threading.Lock()
        self._counters, self._meters = Counters(), Meters()
        self._reporter = Reporter(options, self._started)

    @property
    def layers_done(self) -> int:
        """Complete layers on the disk, including those of an earlier run."""
        count = self._meters.layers
        return self._counters.skipped + self._counters.finished if count is None else count()

    def begin(self, layers: int, skipped: int) -> None:
        """Set the number of layers, and of those that an earlier run finished."""
        self._counters.layers, self._counters.skipped = layers, skipped

    def follow(self, reader: LayerReader, writer: ShardWriter, count: Callable[[], int] | None = None) -> None:
        """Set the sources of the bytes read and written.

        Args:
            count: counts the layers on the disk, if other processes write some of them.
        """
        self._meters.reader, self._meters.writer, self._meters.layers = reader, writer, count

    def follow_downloads(self, fetched: Callable[[], tuple[int, int]]) -> None:
        """Set the function that counts the bytes from the Hub, fetched and in all."""
        self._meters.fetched = fetched

    def expect_tokens(self, tokens: int) -> None:
        """Set the tokens times layers that this rank will compute."""
        self._counters.tokens_total = tokens

    def phase(self, name: str) -> None:
        """Begin a phase."""
        if name != self._counters.phase:
            if name == "layers" and not self._counters.setup_seconds:
                self._counters.setup_seconds = time.monotonic() - self._started
            self._counters.phase = name
            self._report()

    def before_batch(self, tokens: int) -> None:
        """Count a batch of so many tokens that is about to be computed.

        Raises:
            Stopped: a signal requested the end of the run.
        """
        number = self._stop.number
        if number is not None:
            raise Stopped(number, self.layers_done, self._counters.layers)
        self._counters.tokens += tokens
        if time.monotonic() - self._reporter.last >= TELL_SECONDS:
            self._report()

    def layer_done(self) -> None:
        """Count a layer that is complete and on the disk. Any thread may call this."""
        with self._lock:
            self._counters.finished += 1
        self._report()

    def _report(self) -> None:
        self._reporter.report(self._counters, self._meters, self.layers_done)
