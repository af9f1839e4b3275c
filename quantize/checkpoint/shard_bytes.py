"""Sources of a checkpoint's shards: files of a folder here, other places in `hub`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import InputError
from . import uncached
from .headers import Header, TensorInfo

READ_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class ReadingOrder:
    """The tensors that a run will read, listed before it begins.

    Attributes:
        layers: the names of each layer's tensors, in the order of the walk.
        copies: the names that are copied, beside the walk.
        outer: the names of `copies` that the calibration reads too, before its first layer.
        written: file and place, by name, of other outer tensors that an earlier run copied byte for byte.
        spool: a folder for tensors that the run keeps for a while.
    """

    layers: Sequence[Sequence[str]]
    copies: Sequence[str] = ()
    outer: frozenset[str] = frozenset()
    written: Mapping[str, tuple[Path, TensorInfo]] = field(default_factory=dict)
    spool: Path | None = None


class ShardBytes(Protocol):
    """A source of shards, safe to use from several threads.

    Attributes:
        integrity: the proof for every byte that it returns, in words, empty where there is none.
    """

    @property
    def integrity(self) -> str:
        """See the class."""

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` from the byte `begin` of the shard on, which belongs to the tensor `name`.

        Raises:
            InputError: it cannot be read.
        """

    def begin(self, order: ReadingOrder, places: Mapping[str, Header]) -> None:
        """Prepare to be read in this order. `places` has the header of each tensor's shard by the tensor's name."""

    def recorded(self) -> None:
        """The calibration has read what it needs before its first layer."""

    def copied(self, name: str) -> None:
        """A tensor's copy is complete and on the disk."""

    def fetched(self) -> tuple[int, int]:
        """Bytes of this run's files downloaded so far, and in all. Both are 0 where the run waits for none."""

    def end(self) -> None:
        """End the run: it reads nothing more, and nothing waits."""


class LocalBytes:
    """Shards that are local files, read where their headers were read."""

    integrity = ""

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """See `ShardBytes`. Refuse a file that changed since its header was read."""
        read_range(header.path, begin, buffer, header)

    def begin(self, order: ReadingOrder, places: Mapping[str, Header]) -> None:
        """Nothing to prepare: the files are there."""

    def recorded(self) -> None:
        """Nothing to drop."""

    def copied(self, name: str) -> None:
        """Nothing to drop."""

    def fetched(self) -> tuple[int, int]:
        """Nothing to download."""
        return 0, 0

    def end(self) -> None:
        """Nothing to end."""


def read_range(path: Path, begin: int, buffer: memoryview, known: Header | None = None) -> None:
    """Fill `buffer` from the file's byte `begin` on, with pread, which does not count the bytes twice as the process's
    memory.

    Args:
        known: the file's header from before. The file must still have its size and time of modification.
    Raises:
        InputError: the file vanished, changed or cannot be read.
    """
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # in place of a file there may be a pipe by now
        try:
            if known is not None:
                _refuse_changed(path, os.fstat(descriptor), known)
            while done < len(buffer):
                got = uncached.read(descriptor, buffer[done : done + READ_CHUNK_BYTES], begin + done)
                if not got:
                    if known is not None:  # it may have changed since the check above
                        _refuse_changed(path, os.fstat(descriptor), known)
                    raise InputError(
                        f"{path} changed during the run and ended at byte {begin + done:,}",
                        where=path,
                        hint="restore it",
                    )
                done += got
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})", where=path, hint="restore the file and run the command again"
        ) from error


def _refuse_changed(path: Path, now: os.stat_result, known: Header) -> None:
    if known.mtime_ns and (now.st_size, now.st_mtime_ns) != (known.file_bytes, known.mtime_ns):
        raise InputError(
            f"{path} changed while it was being read",
            where=path,
            hint="wait until nothing writes it, and run the command again",
        )
