"""Speeds of file systems, and the page cache: dropped, and proved to be dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 4
CHUNK_BYTES = 16 << 20


def drop_from_cache(paths: Sequence[Path]) -> float:
    """Drop files from the page cache; the share of them that stayed (0.0: all is cold).

    Files of a RAM disk stay where they are: 1.0.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if os.geteuid() == 0:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
        except OSError:
            pass  # a container without that right; what stayed is measured below
    return resident_share(paths)


def resident_share(paths: Sequence[Path]) -> float:
    """Share of the files' pages that lie in the page cache, as mincore(2) tells."""
    resident = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-size // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), vector):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            del start  # it holds the mapping open
            resident += bytes(vector).translate(_LOWEST_BIT).count(1)
            total += pages
    return resident / max(total, 1)


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def read_speed(paths: Sequence[Path], limit_bytes: int) -> float:
    """Bytes a second of `THREADS` threads that read the files' beginnings, at most `limit_bytes` together."""
    share = limit_bytes // max(len(paths), 1)
    pieces = [
        (path, begin, min(CHUNK_BYTES, size - begin))
        for path in paths
        for size in [min(path.stat().st_size, share)]
        for begin in range(0, size, CHUNK_BYTES)
    ]
    queues = [pieces[len(pieces) * k // THREADS : len(pieces) * (k + 1) // THREADS] for k in range(THREADS)]
    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(_read, queues))
    return total / (time.perf_counter() - started)


def _read(pieces: Sequence[tuple[Path, int, int]]) -> int:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = 0
    for path, begin, size in pieces:
        descriptor = os.open(path, os.O_RDONLY)
        done += os.preadv(descriptor, [buffer[:size]], begin)
        os.close(descriptor)
    return done


def write_speed(folder: Path, total_bytes: int = 2 << 30) -> float:
    """Bytes a second of `THREADS` threads that write and fsync a file each; the files are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f".write-speed-{k}" for k in range(THREADS)]
    chunk = os.urandom(CHUNK_BYTES)

    def write(path: Path) -> int:
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, total_bytes // THREADS // CHUNK_BYTES)):
                file.write(chunk)
            os.fsync(file.fileno())
            return file.tell()

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(pool.map(write, paths))
        return total / (time.perf_counter() - started)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
