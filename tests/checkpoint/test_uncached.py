"""What is streamed once does not stay in the page cache, where the kernel can do that."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint import uncached
from nvquant.checkpoint.shard_bytes import read_range
from nvquant.checkpoint.writer import TensorEntry, write_shard

SIZE = 1 << 20


def resident_pages(path: Path) -> int:
    """How many of the file's pages are in the page cache, as mincore(2) tells."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        vector = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), vector) == 0
        del start  # it holds the mapping open
        return sum(page & 1 for page in vector)


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    """A file that is on the disk alone, on a system that can read it without keeping it."""
    if sys.platform != "linux":
        pytest.skip("only Linux reads without keeping")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(16)], 0, uncached.RWF_DONTCACHE)
        except OSError as error:
            pytest.skip(f"this kernel or file system keeps what it reads ({error.strerror})")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident_pages(path) == 0
    return path


def read_all(path: Path) -> bytes:
    buffer = bytearray(path.stat().st_size)
    read_range(path, 0, memoryview(buffer))
    return bytes(buffer)


def test_what_is_streamed_does_not_stay_in_the_page_cache(cold_file: Path) -> None:
    read = read_all(cold_file)
    assert resident_pages(cold_file) == 0
    assert read == cold_file.read_bytes()


def test_what_others_had_in_the_page_cache_stays_there(cold_file: Path) -> None:
    cold_file.read_bytes()
    read_all(cold_file)
    assert resident_pages(cold_file) == SIZE // mmap.PAGESIZE


def test_a_shard_is_on_the_disk_and_not_in_the_page_cache(cold_file: Path) -> None:
    data = [memoryview(os.urandom(SIZE)), memoryview(os.urandom(SIZE))]
    shard = cold_file.with_name("shard")
    write_shard(shard, [TensorEntry("weight", "U8", (2 * SIZE,))], lambda entry: data)
    assert resident_pages(shard) < SIZE // mmap.PAGESIZE // 8  # a few on which one write ended and the next began
    assert shard.read_bytes()[-2 * SIZE :] == b"".join(data)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EIO])
def test_a_kernel_that_knows_no_other_way_is_asked_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked = []

    def without_flags(real: Any) -> Any:
        def call(descriptor: int, pieces: Sequence[memoryview], begin: int, flags: int = 0) -> int:
            asked.append(flags)
            if flags:
                raise OSError(number, os.strerror(number))
            return real(descriptor, pieces, begin)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(os, "preadv", without_flags(os.preadv))
    monkeypatch.setattr(os, "pwritev", without_flags(os.pwritev))
    monkeypatch.setattr(sys, "platform", "linux")
    data, buffer = memoryview(os.urandom(100)), memoryview(bytearray(100))
    with (tmp_path / "file").open("w+b") as file:
        if number == errno.EOPNOTSUPP:
            assert uncached.write(file.fileno(), data, 0) == uncached.read(file.fileno(), buffer, 0) == 100
            assert buffer == data
            assert asked == [uncached.RWF_DONTCACHE, 0] * 2
        else:  # any other error is one
            for call in (uncached.write, uncached.read):
                with pytest.raises(OSError, match=os.strerror(number)):
                    call(file.fileno(), buffer, 0)
            assert asked == [uncached.RWF_DONTCACHE] * 2
