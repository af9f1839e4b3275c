"""Safetensors headers, read without reading a weight.

A header is untrusted input: each contradiction in it raises an error with a message of its own.
Source: the safetensors format, README of huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_text import parse_json, quoted
from .regular import open_regular, unreadable

HEADER_LIMIT_BYTES = 100_000_000
MOST_AXES = 16  # the weights of a 3-D convolution have 5
MOST_NAME = 400  # characters of a tensor's name
_AGAIN = "download the shard again"
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in its file.

    Attributes:
        dtype: the format's name, as "BF16".
        begin, end: absolute byte offsets in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The header of one shard, with the tensors in the order of their data.

    Attributes:
        mtime_ns: the file's time of modification when the header was read, 0 where it is unknown.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
    mtime_ns: int = 0


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        InputError: the file is missing or unreadable, or its header contradicts itself or the file's size.
    """
    with open_regular(path, path.parent, _AGAIN) as file:
        try:
            status = os.fstat(file.fileno())  # before the first read, so that later changes are noticed
            file_bytes = status.st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            _check_length(path, length, file_bytes)
            blob = file.read(length)
        except OSError as error:
            raise unreadable(path, error, _AGAIN) from error
    return replace(parse_header(path, blob, file_bytes), mtime_ns=status.st_mtime_ns)


def parse_header(path: Path, blob: bytes, file_bytes: int) -> Header:
    """Check the JSON part of a header against the file's size, as `read_header` does."""
    try:
        entries = parse_json(blob, unique=True)
    except ValueError as error:
        raise _damaged(path, f"has a header that is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has a __metadata__ that is not a map of strings")
    start = 8 + len(blob)
    tensors = sorted(
        (_tensor_info(path, name, entry, start) for name, entry in entries.items()), key=lambda t: (t.begin, t.end)
    )
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            raise _damaged(
                path,
                f"has a header whose tensor {tensor.name} "
                f"{'overlaps another' if tensor.begin < position else 'leaves a gap'}",
            )
        position = tensor.end
    if position != file_bytes:
        raise InputError(
            f"{path.name} ends at byte {file_bytes:,} but its header describes {position:,} bytes",
            where=path.name,
            hint="download the shard again",
        )
    return Header(path, {tensor.name: tensor for tensor in tensors}, metadata, start, file_bytes)


def check_name(name: str) -> str | None:
    """The fault in the name of a tensor, as the end of a sentence, or None."""
    if not name or not name.isprintable():
        return f"{quoted(name)} for the name of a tensor"
    if len(name) > MOST_NAME:
        return f"a name of {len(name):,} characters for a tensor ({quoted(name, 40)})"
    return None


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    fault = check_name(name)
    if fault is not None:
        raise _damaged(path, f"has a header with {fault}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"has a header whose entry {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(
            f"tensor {name} has the dtype {quoted(dtype)}, which nvquant does not read",
            where=path.name,
            hint="convert the model to BF16, F16 or F32 first",
        )
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise _damaged(path, f"has a header whose entry {name!r} has a shape or an offset that is not a natural number")
    if len(shape) > MOST_AXES or math.prod(n or 1 for n in shape) >= 2**63:
        raise _damaged(path, f"has a header whose tensor {name} has an impossible shape ({len(shape):,} axes)")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(
            path,
            f"has a header whose tensor {name} has offsets that do not fit its shape {list(shape)} and dtype {dtype}",
        )
    return TensorInfo(name, dtype, shape, start + begin, start + end)


def _check_length(path: Path, length: int, file_bytes: int) -> None:
    if length < 2 or length > HEADER_LIMIT_BYTES:
        raise _damaged(path, "is not a safetensors file: its header length is out of range")
    if 8 + length > file_bytes:
        raise InputError(
            f"{path.name} ends at byte {file_bytes:,}, inside its own header",
            where=path.name,
            hint="download the shard again",
        )


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path.name} {what}", where=path.name, hint=_AGAIN)
