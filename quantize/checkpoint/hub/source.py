"""A model on the Hub opened as a checkpoint: small files in the cache, headers by ranges, weights on demand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from ...errors import InputError
from ..config_sizes import check_sizes
from ..custom_code import MOST_CODE_BYTES, code_names
from ..diagnosis import missing_shards, no_config, no_weights
from ..headers import HEADER_LIMIT_BYTES, Header, parse_header, read_header
from ..regular import MOST_SMALL_BYTES
from ..shard_bytes import ShardBytes
from ..sidefiles import SIDE_FILE_PATTERNS, TEMPLATE_FOLDER
from ..source import INDEX_NAME, SINGLE_NAME, Checkpoint, check_index, read_index, read_json
from .download import cached_path, download, note_revision
from .ranges import RangeReader
from .repository import HubModel
from .shards import DownloadedShards, RemoteShards

# Beside the side files: descriptions of the checkpoint, and the card, whose data a new card keeps.
DESCRIPTIONS = ("config.json", INDEX_NAME, "hf_quant_config.json", "nvquant_*.json", "README.md")
_READERS = 8
_OTHER = "choose another repository or revision"
_FIRST_READ_BYTES = 256 << 10  # holds most headers whole
_FIRST_READ_SHARE = 512  # but of a small file no more than this part of it


def open_hub_checkpoint(model: HubModel, low_disk: bool = False) -> Checkpoint:
    """Open a model on the Hub: fetch its small files and the headers of its shards, no weight.

    Args:
        low_disk: read weights by ranges and keep none. Without it each shard is downloaded as a whole on demand.
    Raises:
        InputError: no safetensors model, damaged or contradictory files, or a failing network.
    """
    folder = fetch_small_files(model)
    config = read_json(folder / "config.json", "every Hugging Face model has one")
    reader = RangeReader(model)
    if INDEX_NAME in model.files:
        files = read_index(folder / INDEX_NAME)
        headers = read_headers(reader, folder, sorted(set(files.values())))
    elif SINGLE_NAME in model.files:
        headers = read_headers(reader, folder, [SINGLE_NAME])
        files = dict.fromkeys(headers[SINGLE_NAME].tensors, SINGLE_NAME)
    else:
        raise InputError(no_weights(f"Hub model {model.repo}", model.files, _OTHER))
    check_index(model.repo, files, headers)
    check_sizes(config, (info for header in headers.values() for info in header.tensors.values()))
    content: ShardBytes = RemoteShards(reader) if low_disk else DownloadedShards(model)
    return Checkpoint(folder, config, headers, files, content, model)


def fetch_small_files(model: HubModel) -> Path:
    """Download the config, the index, the side files and the card. Returns the snapshot's folder in the cache.

    Raises:
        InputError: there is no config.json, or as of `download`.
    """
    if "config.json" not in model.files:
        raise InputError(no_config(f"Hub model {model.repo}", model.files, _OTHER))
    names = [name for name in model.files if _is_small(model, name)]
    folder = _fetch(model, names)["config.json"].parent
    while code := [name for name in code_names(folder) if name not in names and _is_code(model, name)]:
        _fetch(model, code)  # it may import more
        names += code
    note_revision(model)
    return folder


def _fetch(model: HubModel, names: list[str]) -> dict[str, Path]:
    with ThreadPoolExecutor(_READERS, "small files") as pool:
        return dict(zip(names, pool.map(lambda name: download(model, name), names), strict=True))


def read_headers(reader: RangeReader, folder: Path, names: list[str]) -> Mapping[str, Header]:
    """The headers of shards, by range requests where the cache does not have the shards.

    Raises:
        InputError: a shard is missing, or its header is damaged.
    """
    missing = missing_shards(f"Hub model {reader.model.repo}", names, reader.model.files, _OTHER)
    if missing is not None:
        raise InputError(missing)
    with ThreadPoolExecutor(_READERS, "headers") as pool:
        try:
            return dict(zip(names, pool.map(lambda name: read_remote_header(reader, folder, name), names), strict=True))
        except BaseException:
            reader.end()
            raise


def read_remote_header(reader: RangeReader, folder: Path, name: str) -> Header:
    """The header of one shard, by one or two range requests where the cache does not have the shard.

    Args:
        folder: of the model's snapshot in the cache.
    Raises:
        InputError: the header is damaged, or the network fails.
    """
    path = cached_path(reader.model, name)
    if path is not None:
        return read_header(path)
    size = reader.model.file(name).size
    if size is None or size < 8:
        raise InputError(
            f"{name} is too short for a safetensors file",
            where=f"Hub model {reader.model.repo}",
            hint="choose another revision",
        )
    head = bytearray(min(size, max(8, min(_FIRST_READ_BYTES, size // _FIRST_READ_SHARE))))
    reader.read_into(name, 0, memoryview(head))
    length = struct.unpack("<Q", head[:8])[0]
    if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
        raise InputError(f"{name} of {reader.model.repo} is not a safetensors file: its header length is out of range.")
    if len(head) < 8 + length:
        rest = bytearray(8 + length - len(head))
        reader.read_into(name, len(head), memoryview(rest))
        head += rest
    return parse_header(folder / name, bytes(head[8 : 8 + length]), size)


def _is_code(model: HubModel, name: str) -> bool:
    return name in model.files and (model.files[name].size or 0) <= MOST_CODE_BYTES


def _is_small(model: HubModel, name: str) -> bool:
    path = PurePosixPath(name)
    if len(path.parts) == 2:
        return path.parts[0] == TEMPLATE_FOLDER and path.suffix == ".jinja"
    is_wanted = any(fnmatch(name, pattern) for pattern in (*SIDE_FILE_PATTERNS, *DESCRIPTIONS))
    return is_wanted and len(path.parts) == 1 and (model.files[name].size or 0) <= MOST_SMALL_BYTES
