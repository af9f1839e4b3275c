"""Shards of a Hub model as a run reads them: complete files downloaded ahead of the walk, or ranges, never kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ...errors import InputError
from ..headers import Header, TensorInfo
from ..shard_bytes import ReadingOrder, read_range
from .download import Counter, cached_path, download
from .ranges import RangeReader
from .repository import HubModel

WORKERS = 2  # files downloaded at once, each over several connections where the Hub has Xet
SPOOL_READERS = 4
SPOOL_PIECE_BYTES = 16 << 20
_TELL_SECONDS = 0.5


class DownloadedShards:
    """Downloads each shard into the Hub's cache, compares its hash and reads it there, while the next ones come."""

    integrity = "the published sha256 of every complete file"

    def __init__(self, model: HubModel) -> None:
        self._model = model
        self._files: dict[str, Future[Path]] = {}
        self._queue: list[str] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._workers = 0
        self._counters: list[Counter] = []

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """See `ShardBytes`. Waits until the shard is there."""
        read_range(self.path(header.path.name), begin, buffer)

    def path(self, file: str) -> Path:
        """The path of the shard, once it is there.

        Raises:
            InputError: as of `download`, or the run has ended.
        """
        return self._coming(file, is_urgent=True).result()

    def fetch_all(self, files: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Wait until all these shards are there, for readers of the cache's folder.

        Args:
            progress: called now and then with (bytes there, bytes in all).
        Raises:
            InputError: see `download`.
        """
        coming = [self._coming(file, is_urgent=False) for file in files]
        try:
            while True:
                done, waiting = wait(coming, _TELL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if progress is not None:
                    progress(*self.fetched())
                if not waiting:
                    return
        finally:
            self.end()

    def missing_bytes(self, files: Iterable[str]) -> int:
        """Bytes of these shards that the cache does not have yet."""
        absent = [file for file in files if cached_path(self._model, file) is None]
        return sum(self._model.file(file).size or 0 for file in absent)

    def begin(self, order: ReadingOrder, places: Mapping[str, Header]) -> None:
        """Begin to download, in the order in which the run needs the shards."""
        names = [*sorted(order.outer), *(name for layer in order.layers for name in layer), *order.copies]
        for file in dict.fromkeys(places[name].path.name for name in names):
            self._coming(file, is_urgent=False)

    def recorded(self) -> None:
        """Nothing to drop."""

    def copied(self, name: str) -> None:
        """Nothing to drop."""

    def fetched(self) -> tuple[int, int]:
        """See `ShardBytes`. The bytes of an incomplete earlier download count once it resumes."""
        with self._lock:
            done = sum(counter.bytes for counter in self._counters)
            return done, sum(self._model.file(file).size or 0 for file in self._files)

    def end(self) -> None:
        """Stop all downloads. The bytes that came stay in the cache, and a later download resumes there."""
        with self._lock:
            self._closed.set()
            self._closed = threading.Event()
            self._queue.clear()
            self._workers = 0
            for file, future in list(self._files.items()):
                if not future.done():
                    future.set_exception(InputError("the run has ended."))
                    del self._files[file]

    def _coming(self, file: str, is_urgent: bool) -> Future[Path]:
        with self._lock:
            if file not in self._files:
                self._files[file] = Future()
                self._queue.append(file)
                self._hire()
            if is_urgent and file in self._queue:
                self._queue.remove(file)
                self._queue.insert(0, file)
            return self._files[file]

    def _hire(self) -> None:
        """Start a daemon thread, since a program that ends does not wait for gigabytes."""
        if self._workers < WORKERS:
            self._workers += 1
            threading.Thread(target=self._work, args=(self._closed,), name="download", daemon=True).start()

    def _work(self, closed: threading.Event) -> None:
        while True:
            with self._lock:
                if closed.is_set():
                    return
                if not self._queue:
                    self._workers -= 1
                    return
                file = self._queue.pop(0)
                future, counter = self._files[file], Counter()
                self._counters.append(counter)
            size = self._model.file(file).size or 0
            try:
                path = download(self._model, file, closed, counter)
            except BaseException as error:
                self._settle(future, error)
            else:
                counter.bytes = size
                self._settle(future, path)

    def _settle(self, future: Future[Path], outcome: Path | BaseException) -> None:
        with self._lock:
            if future.done():  # the run ended meanwhile
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


class RemoteShards:
    """Fetches ranges as they are read, each once, and keeps only the tensors that the run reads twice.

    The calibration reads some tensors around the layers, and the run copies them later: they stay in the run's spool
    until both is done.

    Attributes:
        names_read: the tensors that were read at least in part.
    """

    integrity = "commit and ETag of every range, and its length"

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self._kept: dict[str, _Kept] = {}
        self._written: Mapping[str, tuple[Path, TensorInfo]] = {}
        self._lock = threading.Lock()
        self._recorded = False
        self._copied: set[str] = set()
        self.names_read: set[str] = set()

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """See `ShardBytes`."""
        info = header.tensors[name]
        self.names_read.add(name)
        kept = self._kept.get(name)
        if name in self._written:
            path, copy = self._written[name]
            read_range(path, copy.begin + begin - info.begin, buffer)
        elif kept is not None:
            read_range(kept.whole(self._reader, header.path.name, info), begin - info.begin, buffer)
        else:
            self._reader.read_into(header.path.name, begin, buffer)

    def begin(self, order: ReadingOrder, places: Mapping[str, Header]) -> None:
        """Note the tensors to be read twice, and remove files of an earlier run from the spool."""
        self._written = order.written
        twice = sorted(order.outer & set(order.copies))
        assert order.spool is not None or not twice
        if order.spool is not None:
            order.spool.mkdir(parents=True, exist_ok=True)
            for path in order.spool.iterdir():
                path.unlink()
            self._kept = {name: _Kept(order.spool / f"{at:04d}") for at, name in enumerate(twice)}

    def recorded(self) -> None:
        """Drop the tensors that were copied before the calibration read them."""
        with self._lock:
            self._recorded = True
            for name in self._copied:
                self._drop(name)

    def copied(self, name: str) -> None:
        """Drop it, if the calibration has read it."""
        with self._lock:
            self._copied.add(name)
            if self._recorded:
                self._drop(name)

    def fetched(self) -> tuple[int, int]:
        """Nothing to wait for except reads, which the reader counts."""
        return 0, 0

    def end(self) -> None:
        """Stop waiting for the network, and drop all kept tensors."""
        self._reader.end()
        for kept in self._kept.values():
            kept.drop()

    def _drop(self, name: str) -> None:
        if name in self._kept:
            self._kept[name].drop()


class _Kept:
    """A tensor in the spool, fetched as a whole at the first read."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._is_there = path, threading.Lock(), False

    def whole(self, reader: RangeReader, file: str, info: TensorInfo) -> Path:
        with self._lock:
            if not self._is_there:
                try:
                    self._fetch(reader, file, info)
                except OSError as error:
                    raise InputError(
                        f"{info.name} cannot be stored in {self._path.parent} ({error.strerror})",
                        where=info.name,
                        hint=f"free {info.nbytes:,} bytes there, and run the same command again",
                    ) from error
                self._is_there = True
            return self._path

    def _fetch(self, reader: RangeReader, file: str, info: TensorInfo) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with ThreadPoolExecutor(SPOOL_READERS, "spool") as pool:
                for _ in pool.map(lambda at: self._piece(reader, file, info, descriptor, at), self._starts(info)):
                    pass
        finally:
            os.close(descriptor)

    @staticmethod
    def _starts(info: TensorInfo) -> Iterator[int]:
        return iter(range(0, info.nbytes, SPOOL_PIECE_BYTES))

    @staticmethod
    def _piece(reader: RangeReader, file: str, info: TensorInfo, descriptor: int, at: int) -> None:
        piece = memoryview(bytearray(min(SPOOL_PIECE_BYTES, info.nbytes - at)))
        reader.read_into(file, info.begin + at, piece)
        while piece:
            written = os.pwrite(descriptor, piece, at)
            piece, at = piece[written:], at + written

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)
