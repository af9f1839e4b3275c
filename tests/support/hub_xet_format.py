"""The binary formats of Xet, as far as the test Hub must read and write them: xorbs, shards, and LZ4 in frames.

A xorb is a sequence of chunks, each behind a header of 8 bytes: version, packed size (3 bytes), scheme, size (3 bytes).
A shard lists files: how each is put together from chunks of xorbs, and its SHA-256. Numbers are little-endian.
Source: the specification of the protocol, huggingface.co/docs/xet, version 1.1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PLAIN, LZ4, GROUPED_LZ4 = 0, 1, 2
CHUNK_HEADER_BYTES = 8
RECORD_BYTES = 48  # of a shard: its header, and each entry

_XORB_END = b"XETBLOB"  # where a table begins that the chunks' headers make superfluous
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30
_FRAME = 0x184D2204
_BLOCK_CHECKSUM, _CONTENT_SIZE, _DICTIONARY = 1 << 4, 1 << 3, 1
_STORED = 1 << 31


class Malformed(Exception):
    """Not what the format says."""


@dataclass(frozen=True)
class Term:
    """A stretch of a file: chunks `first` to `end` (not included) of a xorb."""

    xorb: str
    first: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    xet_hash: str
    sha256: str
    terms: tuple[Term, ...]


def hash_string(digest: bytes) -> str:
    """How Xet writes a hash: as four numbers of 8 bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunk_header(size: int, packed: int | None = None, scheme: int = PLAIN) -> bytes:
    """What stands before a chunk in a xorb."""
    lengths = [(size if packed is None else packed).to_bytes(3, "little"), size.to_bytes(3, "little")]
    return b"\0" + lengths[0] + bytes([scheme]) + lengths[1]


def read_xorb(data: bytes) -> list[bytes]:
    """The contents of a xorb's chunks."""
    chunks, at = [], 0
    while at < len(data) and data[at : at + len(_XORB_END)] != _XORB_END:
        packed = int.from_bytes(data[at + 1 : at + 4], "little")
        scheme, size = data[at + 4], int.from_bytes(data[at + 5 : at + 8], "little")
        at += CHUNK_HEADER_BYTES
        chunks.append(_unpack(data[at : at + packed], scheme))
        if len(chunks[-1]) != size:
            raise Malformed(f"chunk {len(chunks) - 1} has {len(chunks[-1])} bytes, its header says {size}")
        at += packed
    return chunks


def read_shard(data: bytes) -> Iterator[ShardFile]:
    """The files of a shard."""
    at = RECORD_BYTES
    while at + RECORD_BYTES <= len(data):
        digest, flags, count = struct.unpack_from("<32sII", data, at)
        if digest == b"\xff" * 32:
            return
        at += RECORD_BYTES
        entries = [struct.unpack_from("<32sIIII", data, at + index * RECORD_BYTES) for index in range(count)]
        terms = tuple(Term(hash_string(xorb), first, end) for xorb, _, _, first, end in entries)
        at += count * RECORD_BYTES * (2 if flags & _HAS_VERIFICATION else 1)
        if not flags & _HAS_METADATA:
            raise Malformed("a file without its SHA-256")
        yield ShardFile(hash_string(digest), hash_string(data[at : at + 32]), terms)
        at += RECORD_BYTES
    raise Malformed("the list of files has no end")


def _unpack(data: bytes, scheme: int) -> bytes:
    if scheme == PLAIN:
        return data
    if scheme == LZ4:
        return unpack_lz4(data)
    if scheme == GROUPED_LZ4:
        return _ungroup(unpack_lz4(data))
    raise Malformed(f"compression scheme {scheme}")


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping of bytes 0, 4, 8, …, then 1, 5, 9, …"""
    whole, at = bytearray(len(grouped)), 0
    for lane in range(4):
        count = len(range(lane, len(grouped), 4))
        whole[lane::4] = grouped[at : at + count]
        at += count
    return bytes(whole)


def unpack_lz4(data: bytes) -> bytes:
    """The content of an LZ4 frame; its checksums are not looked at."""
    if struct.unpack_from("<I", data)[0] != _FRAME:
        raise Malformed("no LZ4 frame")
    flags = data[4]
    at = 7 + (8 if flags & _CONTENT_SIZE else 0) + (4 if flags & _DICTIONARY else 0)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        block = data[at : at + (size & ~_STORED)]
        at += len(block) + (4 if flags & _BLOCK_CHECKSUM else 0)
        if size & _STORED:
            out += block
        else:
            _unpack_block(block, out)
    return bytes(out)


def _unpack_block(block: bytes, out: bytearray) -> None:
    """Literals and copies of what came before, in turns; a block ends with literals."""
    at = 0
    while True:
        token = block[at]
        count, at = _length(block, at + 1, token >> 4)
        out += block[at : at + count]
        at += count
        if at >= len(block):
            return
        distance = int.from_bytes(block[at : at + 2], "little")
        count, at = _length(block, at + 2, token & 15)
        count += 4
        source = bytes(out[len(out) - distance :][:count])
        out += (source * (count // len(source) + 1))[:count]


def _length(block: bytes, at: int, count: int) -> tuple[int, int]:
    """A length that goes on for as long as its bytes are 255, and where it ends."""
    if count == 15:
        while block[at] == 255:
            count, at = count + 255, at + 1
        count, at = count + block[at], at + 1
    return count, at
