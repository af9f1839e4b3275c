"""Safetensors files as raw bytes: the least code that can write a good file, a sparse one, or a lie.

A file is 8 bytes of little-endian header length, a JSON header and the data. Written from the published format
description, without the safetensors library, so that tests can make what the library refuses to make.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
Entry = dict[str, Any]


def tensor_bytes(shape: Iterable[int]) -> int:
    """Bytes of a BF16 tensor."""
    return 2 * prod(shape)


def pack_header(entries: dict[str, Entry]) -> bytes:
    """Length field and JSON header, padded with spaces to 8 bytes, with the metadata that transformers expects."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_raw(path: Path) -> tuple[dict[str, Entry], bytes]:
    """Entries by name in the order of their data (metadata dropped), and the data as bytes."""
    blob = path.read_bytes()
    data_start = 8 + struct.unpack_from("<Q", blob)[0]
    header = json.loads(blob[8:data_start])
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), blob[data_start:]


def write_raw(path: Path, entries: dict[str, Entry], data: bytes) -> None:
    """Write the header and the data exactly as given; nothing is checked."""
    path.write_bytes(pack_header(entries) + data)


def lay_out(shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Entries of BF16 tensors that follow one another without holes."""
    entries: dict[str, Entry] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + tensor_bytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return entries


def shard_name(number: int, count: int) -> str:
    """The Hub's file name of a shard; `number` starts at 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write the index file of a sharded checkpoint."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))


def split_file(path: Path, shards: int) -> None:
    """Replace one safetensors file by an index and `shards` files of equal tensor counts, cut regardless of layers."""
    entries, data = read_raw(path)
    names = sorted(entries)
    weight_map: dict[str, str] = {}
    for k in range(shards):
        part: dict[str, Entry] = {}
        pieces: list[bytes] = []
        at = 0
        for name in names[k * len(names) // shards : (k + 1) * len(names) // shards]:
            begin, end = entries[name]["data_offsets"]
            part[name] = {**entries[name], "data_offsets": [at, at + end - begin]}
            pieces.append(data[begin:end])
            weight_map[name] = shard_name(k, shards)
            at += end - begin
        write_raw(path.parent / shard_name(k, shards), part, b"".join(pieces))
    write_index(path.parent, weight_map, len(data))
    path.unlink()
