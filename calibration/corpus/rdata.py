"""Reading character vectors from the lazy-load database of an R package (R Internals, section 1.8)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

_SYMBOL, _PAIRLIST, _CHARACTER, _LOGICAL, _INTEGER, _STRING, _LIST = 1, 2, 9, 10, 13, 16, 19
_NULL, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10


@dataclass
class _Reader:
    """Reads the XDR form of an R value; knows only the types that a table of strings needs."""

    data: bytes
    offset: int = 0
    symbols: list[str] = field(default_factory=list)

    def integer(self) -> int:
        self.offset += 4
        return int(struct.unpack_from(">i", self.data, self.offset - 4)[0])

    def header(self) -> None:
        assert self.data[:2] == b"X\n", "an R serialization in XDR form starts with X"
        self.offset = 2
        version = self.integer()
        self.offset += 8
        if version == 3:
            encoding_bytes = self.integer()
            self.offset += encoding_bytes

    def value(self) -> object:
        flags = self.integer()
        kind = flags & 255
        if kind == _NULL:
            return None
        if kind == _SYMBOL:
            self.symbols.append(str(self.value()))
            return self.symbols[-1]
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _PAIRLIST:
            return self._pairlist(flags)
        result = self._vector(kind)
        if flags & _HAS_ATTRIBUTES and kind != _CHARACTER:
            attributes = self.value()
            if kind == _LIST and isinstance(attributes, dict) and "names" in attributes:
                assert isinstance(result, list)
                return dict(zip(attributes["names"], result, strict=True))
        return result

    def _vector(self, kind: int) -> object:
        length = self.integer()
        if kind == _CHARACTER:
            self.offset += max(length, 0)
            return self.data[self.offset - max(length, 0) : self.offset].decode()
        if kind in (_LOGICAL, _INTEGER):
            return [self.integer() for _ in range(length)]
        if kind in (_STRING, _LIST):
            return [self.value() for _ in range(length)]
        raise ValueError(f"R type {kind} is not expected here.")

    def _pairlist(self, flags: int) -> dict[str, object]:
        result: dict[str, object] = {}
        while flags & 255 == _PAIRLIST:
            tag = str(self.value()) if flags & _HAS_TAG else str(len(result))
            result[tag] = self.value()
            flags = self.integer()
        return result


def string_vectors(index: bytes, database: bytes) -> dict[str, list[str]]:
    """Return the character vectors of ``Rdata.rdx`` (``index``) and ``Rdata.rdb`` (``database``) by name."""
    reader = _Reader(zlib.decompress(index, 31))
    reader.header()
    catalogue = reader.value()
    assert isinstance(catalogue, dict)
    vectors = {}
    for name, (offset, length) in catalogue["variables"].items():
        # Each entry is the big-endian length of the plain data, then a zlib stream.
        reader = _Reader(zlib.decompress(database[offset + 4 : offset + length]))
        reader.header()
        value = reader.value()
        assert isinstance(value, list)
        vectors[name] = [str(line) for line in value]
    return vectors
