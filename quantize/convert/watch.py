"""Reports of the progress of a run, and the moments at which the run checks for a request to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..stream.memory import gpu_bytes_now, host_bytes_now
from .options import ConvertOptions
from .progress import Progress
from .stop import Stopped

if TYPE_CHECKING:
    from ..stream.reading import LayerReader
    from ..stream.writing import ShardWriter

TELL_SECONDS = 0.25


class Watch:
    """Counts the work of a run and reports it to `options.progress`, from rank 0."""

    def __init__(self, options: ConvertOptions) -> None:
        self._options, self._started = options, time.monotonic()
        self._lock = threading.Lock()
        self._phase = "start"
        self._layers = self._skipped = self._finished = 0
        self._fetched: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._tokens = self._tokens_total = 0
        self._setup_seconds = 0.0
        self._last = 0.0
        self._reader: LayerReader | None = None
        self._writer: ShardWriter | None = None
        self._count: Callable[[], int] | None = None

    @property
    def layers_done(self) -> int:
        """Complete layers on the disk, including those of an earlier run."""
        return self._skipped + self._finished if self._count is None else self._count()

    def begin(self, layers: int, skipped: int) -> None:
        """Set the number of layers, and of those that an earlier run finished."""
        self._layers, self._skipped = layers, skipped

    def follow(self, reader: LayerReader, writer: ShardWriter, count: Callable[[], int] | None = None) -> None:
        """Set the sources of the bytes read and written.

        Args:
            count: counts the layers on the disk, if other processes write some of them.
        """
        self._reader, self._writer, self._count = reader, writer, count

    def follow_downloads(self, fetched: Callable[[], tuple[int, int]]) -> None:
        """Set the function that counts the bytes from the Hub, fetched and in all."""
        self._fetched = fetched

    def expect_tokens(self, tokens: int) -> None:
        """Set the tokens times layers that this rank will compute."""
        self._tokens_total = tokens

    def phase(self, name: str) -> None:
        """Begin a phase."""
        if name != self._phase:
            if name == "layers" and not self._setup_seconds:
                self._setup_seconds = time.monotonic() - self._started
            self._phase = name
            self._tell()

    def before_batch(self, tokens: int) -> None:
        """Count a batch of so many tokens that is about to be computed.

        Raises:
            Stopped: a signal requested the end of the run.
        """
        number = self._options.stop.number
        if number is not None:
            raise Stopped(number, self.layers_done, self._layers)
        self._tokens += tokens
        if time.monotonic() - self._last >= TELL_SECONDS:
            self._tell()

    def layer_done(self) -> None:
        """Count a layer that is complete and on the disk. Any thread may call this."""
        with self._lock:
            self._finished += 1
        self._tell()

    def _tell(self) -> None:
        if self._options.ranks.rank != 0:
            return
        self._last = time.monotonic()
        read = self._reader.bytes_read if self._reader is not None else 0
        written = self._writer.bytes_written if self._writer is not None else 0
        fetched, to_fetch = self._fetched()
        now = Progress(
            phase=self._phase,
            layers_done=self.layers_done,
            layers=self._layers,
            seconds=self._last - self._started,
            tokens_done=self._tokens,
            tokens_total=self._tokens_total,
            bytes_read=read,
            bytes_written=written,
            bytes_fetched=fetched,
            bytes_to_fetch=to_fetch,
            host_bytes=host_bytes_now(),
            gpu_bytes=gpu_bytes_now(),
            layers_skipped=self._skipped,
            rank=self._options.ranks.rank,
            ranks=self._options.ranks.size,
            setup_seconds=self._setup_seconds,
        )
        for name, value in (("bytes read", read), ("bytes written", written), ("host memory", now.host_bytes)):
            self._options.trace.counter(name, value)
        self._options.progress(now)
