"""Ways in which a checkpoint folder can be wrong, one function each.

A breakage takes a good folder with at least two shards and their index (as `tiny_models` writes), breaks it in place in
one way only, and returns the text that an error about it should contain: a file name, a tensor name or a config key.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.raw_safetensors import INDEX_NAME, Entry, pack_header, read_raw, write_raw
from support.tiny_models import tiny_llama

Breakage = Callable[[Path], str]

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2))


def _point(folder: Path, target: str) -> str:
    """Make the index place the first shard's tensors in `target`, where a copy of that shard does lie."""
    shard = _shards(folder)[0]
    shutil.copyfile(shard, folder / target)

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] = {k: target if v == shard.name else v for k, v in index["weight_map"].items()}

    _edit_json(folder / INDEX_NAME, edit)
    return target


def index_names_parent_folder(folder: Path) -> str:
    """The index names `../outside.safetensors`, a file that exists."""
    return _point(folder, "../outside.safetensors")


def index_names_absolute_path(folder: Path) -> str:
    """The index names a file that exists by its absolute path."""
    return _point(folder, str((folder.parent / "outside.safetensors").resolve()))


def index_is_not_json(folder: Path) -> str:
    """The index ends in the middle."""
    path = folder / INDEX_NAME
    path.write_text(path.read_text()[:-40])
    return INDEX_NAME


def index_without_weight_map(folder: Path) -> str:
    """The index is JSON, but says nothing about tensors."""
    (folder / INDEX_NAME).write_text('{"metadata": {"total_size": 0}}')
    return INDEX_NAME


def index_names_missing_tensor(folder: Path) -> str:
    """The index promises a tensor that its shard does not hold."""
    name = "model.layers.0.mlp.phantom_proj.weight"
    _edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({name: _shards(folder)[0].name}))
    return name


def tensor_not_in_index(folder: Path) -> str:
    """A shard holds a tensor that the index does not name."""
    name = next(iter(read_raw(_shards(folder)[0])[0]))
    _edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].pop(name))
    return name


def truncated_shard(folder: Path) -> str:
    """The last shard ends 100 bytes too early, as after a broken download."""
    shard = _shards(folder)[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def empty_shard(folder: Path) -> str:
    """A shard of no bytes."""
    shard = _shards(folder)[-1]
    shard.write_bytes(b"")
    return shard.name


def missing_shard(folder: Path) -> str:
    """The index names a shard that is not there."""
    shard = _shards(folder)[-1]
    shard.unlink()
    return shard.name


def git_lfs_pointer(folder: Path) -> str:
    """Git's stand-in for a large file, left by a clone without git-lfs."""
    shard = _shards(folder)[0]
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {shard.stat().st_size}\n"
    shard.write_text(pointer)
    return shard.name


def header_is_not_json(folder: Path) -> str:
    """The header's first byte is not a brace."""
    shard = _shards(folder)[0]
    blob = bytearray(shard.read_bytes())
    blob[8:9] = b"?"
    shard.write_bytes(blob)
    return shard.name


def header_longer_than_file(folder: Path) -> str:
    """The length field promises one byte more than the file has."""
    shard = _shards(folder)[0]
    blob = shard.read_bytes()
    shard.write_bytes(struct.pack("<Q", len(blob) - 7) + blob[8:])
    return shard.name


def header_length_huge(folder: Path) -> str:
    """The length field holds 2^63 + 8: too large for memory, and negative where read as signed."""
    shard = _shards(folder)[0]
    shard.write_bytes(struct.pack("<Q", 2**63 + 8) + shard.read_bytes()[8:])
    return shard.name


def header_over_100_mb(folder: Path) -> str:
    """A header that is right but for its size: the JSON is padded with spaces beyond the format's limit."""
    shard = _shards(folder)[0]
    entries, data = read_raw(shard)
    text = pack_header(entries)[8:]
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT_BYTES + 8))
        file.write(text.ljust(HEADER_LIMIT_BYTES + 8))
        file.write(data)
    return shard.name


def _rewrite(folder: Path, edit: Callable[[list[Entry], bytes], bytes]) -> str:
    """Rewrite the first shard: `edit` changes its entries (in the order of their data) and returns the data."""
    shard = _shards(folder)[0]
    entries, data = read_raw(shard)
    data = edit(list(entries.values()), data)
    write_raw(shard, entries, data)
    return shard.name


def _shift(entries: list[Entry], by: int) -> None:
    for entry in entries:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def negative_offset(folder: Path) -> str:
    """The first tensor lies 8 bytes before the data."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        _shift(entries[:1], -8)
        return data

    return _rewrite(folder, edit)


def reversed_offsets(folder: Path) -> str:
    """The first tensor ends where it should begin."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        entries[0]["data_offsets"].reverse()
        return data

    return _rewrite(folder, edit)


def overlapping_offsets(folder: Path) -> str:
    """The second tensor begins 2 bytes before the first one ends; sizes and the file's length agree."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        _shift(entries[1:], -2)
        return data[:-2]

    return _rewrite(folder, edit)


def hole_in_data(folder: Path) -> str:
    """64 bytes between the first two tensors belong to neither."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        end = entries[0]["data_offsets"][1]
        _shift(entries[1:], 64)
        return data[:end] + bytes(64) + data[end:]

    return _rewrite(folder, edit)


def trailing_bytes(folder: Path) -> str:
    """The file goes on for 64 bytes after its last tensor."""
    return _rewrite(folder, lambda entries, data: data + bytes(64))


def offsets_contradict_shape(folder: Path) -> str:
    """The border between two tensors is off by one element: no hole, no overlap, wrong sizes."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        entries[0]["data_offsets"][1] += 2
        entries[1]["data_offsets"][0] += 2
        return data

    return _rewrite(folder, edit)


def unknown_dtype(folder: Path) -> str:
    """A dtype that the format does not know."""

    def edit(entries: list[Entry], data: bytes) -> bytes:
        entries[0]["dtype"] = "BF17"
        return data

    return _rewrite(folder, edit)


def duplicate_tensor(folder: Path) -> str:
    """The second shard holds a tensor of the first one too."""
    first, second = _shards(folder)[:2]
    entries, data = read_raw(first)
    name, entry = next(iter(entries.items()))
    more, more_data = read_raw(second)
    begin, end = entry["data_offsets"]
    more[name] = {**entry, "data_offsets": [len(more_data), len(more_data) + end - begin]}
    write_raw(second, more, more_data + data[begin:end])
    return name


def _overwrite_element(folder: Path, bits: int) -> str:
    """Put a BF16 bit pattern into the middle of the first layer's down projection."""
    name = next(
        name
        for name in json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        if name.endswith("layers.0.mlp.down_proj.weight") and "tower" not in name
    )
    shard = next(path for path in _shards(folder) if name in read_raw(path)[0])
    entries, data = read_raw(shard)
    begin, end = entries[name]["data_offsets"]
    middle = begin + (end - begin) // 4 * 2
    write_raw(shard, entries, data[:middle] + struct.pack("<H", bits) + data[middle + 2 :])
    return name


def nan_in_weight(folder: Path) -> str:
    """One weight is not a number."""
    return _overwrite_element(folder, 0x7FC0)


def infinity_in_weight(folder: Path) -> str:
    """One weight is minus infinity."""
    return _overwrite_element(folder, 0xFF80)


def pickle_weights_only(folder: Path) -> str:
    """The weights lie in a pickle, as in old checkpoints."""
    for path in [*_shards(folder), folder / INDEX_NAME]:
        path.unlink()
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def already_quantized(folder: Path) -> str:
    """The config says that the weights are FP8."""
    _edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    return "quantization_config"


def missing_config(folder: Path) -> str:
    """No config.json."""
    (folder / "config.json").unlink()
    return "config.json"


def config_is_not_json(folder: Path) -> str:
    """config.json ends in the middle."""
    path = folder / "config.json"
    path.write_text(path.read_text()[:-5])
    return "config.json"


def config_is_a_list(folder: Path) -> str:
    """config.json is JSON, but no object."""
    (folder / "config.json").write_text("[]")
    return "config.json"


def indivisible_input_features(folder: Path) -> str:
    """Another model, whose matrices take 72 inputs: no whole number of blocks of 16."""
    shutil.rmtree(folder)
    tiny_llama(folder, hidden_size=72)
    return "model.layers.0."


def no_weights(folder: Path) -> str:
    """Only the side files; the error should name the folder."""
    for path in [*_shards(folder), folder / INDEX_NAME]:
        path.unlink()
    return folder.name


# What the safetensors library refuses too, on opening the shard.
FILE_LIES: dict[str, Breakage] = {
    breakage.__name__: breakage
    for breakage in (
        truncated_shard,
        empty_shard,
        git_lfs_pointer,
        header_is_not_json,
        header_longer_than_file,
        header_length_huge,
        header_over_100_mb,
        negative_offset,
        reversed_offsets,
        overlapping_offsets,
        hole_in_data,
        trailing_bytes,
        offsets_contradict_shape,
        unknown_dtype,
    )
}

# What an open folder shows without reading a weight.
FOLDER_LIES: dict[str, Breakage] = {
    breakage.__name__: breakage
    for breakage in (
        index_names_parent_folder,
        index_names_absolute_path,
        index_is_not_json,
        index_without_weight_map,
        index_names_missing_tensor,
        tensor_not_in_index,
        missing_shard,
        duplicate_tensor,
        pickle_weights_only,
        no_weights,
        missing_config,
        config_is_not_json,
        config_is_a_list,
    )
}

# What only shows against the request or in the weights themselves.
UNFIT: dict[str, Breakage] = {
    breakage.__name__: breakage
    for breakage in (already_quantized, indivisible_input_features, nan_in_weight, infinity_in_weight)
}

BREAKAGES: dict[str, Breakage] = FILE_LIES | FOLDER_LIES | UNFIT
