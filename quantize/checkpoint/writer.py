"""Shards whose layout is known beforehand, written under a temporary name and renamed once they are durable."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckFailed, InputError
from . import uncached
from .headers import DTYPE_BYTES
from .places import new_file

ALIGNMENT = 8


@dataclass(frozen=True)
class TensorEntry:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        size = DTYPE_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


def order_entries(entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    """The order of data in a shard: wide dtypes first, so that every tensor is aligned, then by name."""
    return tuple(sorted(entries, key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name)))


def build_header(entries: Sequence[TensorEntry]) -> bytes:
    """The header of a shard that holds `entries` in this order, its 8 bytes of length included."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    blob = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-len(blob) % ALIGNMENT)
    return struct.pack("<Q", len(blob)) + blob


def write_shard(
    path: Path, entries: Sequence[TensorEntry], contents: Callable[[TensorEntry], Iterable[memoryview]]
) -> str:
    """Write a shard, which appears under its name only when it is complete and on the disk.

    Args:
        path: its final name.
        entries: its tensors, in the order of the data.
        contents: returns the bytes of an entry, in pieces.
    Returns:
        sha256 of the file, hexadecimal.
    Raises:
        CheckFailed: an entry's pieces do not add up to its size.
        InputError: the disk is full or cannot be written to.
    """
    digest, position = hashlib.sha256(), 0
    # Hashing takes as long as writing, and both let go of the interpreter: a piece is hashed while it is written.
    with _replacing(path) as descriptor, ThreadPoolExecutor(1, "hash") as hasher:

        def put(piece: memoryview) -> None:
            nonlocal position
            hashed = hasher.submit(digest.update, piece)
            try:
                _write(descriptor, piece, position)
            finally:
                hashed.result()
            position += len(piece)

        put(memoryview(build_header(entries)))
        for entry in entries:
            size = 0
            for piece in contents(entry):
                size += len(piece)
                put(piece)
            if size != entry.nbytes:
                raise CheckFailed(f"{path.name}: {entry.name} has {size:,} bytes, but the plan has {entry.nbytes:,}.")
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, indented by two, keys in the order given, with a final newline, by `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, durable before it gets its name.

    Raises:
        InputError: the disk is full or cannot be written to.
    """
    with _replacing(path) as descriptor:
        _write(descriptor, memoryview(data), 0)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """The descriptor of a file that gets its name when it is complete and on the disk. An error leaves no file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with new_file(temporary) as file:
            yield file.fileno()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"{path} cannot be written ({error.strerror})",
                where=path,
                hint="free space or choose another folder with -o",
            ) from error
        raise


def _write(descriptor: int, piece: memoryview, begin: int) -> None:
    done = 0
    while done < len(piece):
        done += uncached.write(descriptor, piece[done:], begin + done)
