"""A checkpoint folder opened for reading: its config, its index, the headers of its shards. Weights are read by byte
range, never mapped."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .config_sizes import check_sizes
from .diagnosis import INDEX_NAME as INDEX_NAME
from .diagnosis import SINGLE_NAME as SINGLE_NAME
from .diagnosis import missing_shards, names_in, no_config, no_folder, no_weights
from .headers import Header, TensorInfo, check_name, read_header
from .json_text import quoted
from .json_text import read_json as read_json
from .regular import is_file
from .shard_bytes import LocalBytes, ReadingOrder, ShardBytes
from .sidefiles import side_files

if TYPE_CHECKING:
    import torch

    from .hub.repository import HubModel

COPY_CHUNK_BYTES = 16 << 20
MOST_FILE_NAME_BYTES = 240  # file systems take 255, and a copy is written under a longer name first
MOST_READERS = 4  # threads that read at once: one alone does not fill a fast disk
MOST_GAP_BYTES = 64 << 10  # is read sooner than skipped


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        config: the JSON of config.json, unchanged.
        shards: header of each shard, by file name, in the order of the names.
        files: file name of each tensor.
        content: the source of the shards' bytes.
        hub: the model on the Hub, None for a folder.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Header]
    files: Mapping[str, str] = field(repr=False)
    content: ShardBytes = field(default_factory=LocalBytes, repr=False)
    hub: HubModel | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """`org/name` of a model on the Hub, else the folder's own name."""
        return self.folder.resolve().name if self.hub is None else self.hub.repo

    @property
    def where(self) -> str:
        """The name in messages: `org/name` of a model on the Hub, else the path of the folder."""
        return str(self.folder) if self.hub is None else self.hub.repo

    def info(self, name: str) -> TensorInfo:
        """The tensor's place in its shard. Raises KeyError where there is none."""
        return self.shards[self.files[name]].tensors[name]

    def path(self, name: str) -> Path:
        """The shard that holds the tensor."""
        return self.folder / self.files[name]

    def infos(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of shards and data."""
        return {name: info for header in self.shards.values() for name, info in header.tensors.items()}

    def stored(self, name: str) -> tuple[str, ...]:
        """The tensor alone: it is stored as the model computes with it (see `weights.base.Weights`)."""
        return (self.info(name).name,)

    def assemble(
        self, names: Iterable[str], stored: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of these names, unchanged."""
        return {name: stored[name] for name in names}

    def read_into(self, name: str, buffer: memoryview, begin: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from its byte `begin` on.

        Raises:
            IndexError: the tensor does not reach that far.
            InputError: the shard vanished, changed or cannot be read.
        """
        info = self.info(name)
        if not 0 <= begin <= info.nbytes - len(buffer):
            raise IndexError(f"bytes {begin} to {begin + len(buffer)} of {name}, which has {info.nbytes}")
        self.content.fill(name, self.shards[self.files[name]], info.begin + begin, buffer)

    def begin(self, order: ReadingOrder) -> None:
        """Announce the tensors that a run reads, so that `content` fetches them ahead. `content.end` ends the run."""
        self.content.begin(order, {name: self.shards[file] for name, file in self.files.items()})

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most 16 MiB, read one ahead. Each is valid until the next is requested.

        Raises:
            InputError: the shard vanished, changed or cannot be read.
        """
        size = self.info(name).nbytes
        starts = range(0, size, COPY_CHUNK_BYTES)
        buffers = [memoryview(bytearray(min(COPY_CHUNK_BYTES, size))) for _ in starts[:2]]

        def read(at: int) -> memoryview:
            piece = buffers[at % 2][: min(COPY_CHUNK_BYTES, size - starts[at])]
            self.read_into(name, piece, starts[at])
            return piece

        if len(starts) <= 1:
            yield from map(read, range(len(starts)))
            return
        with ThreadPoolExecutor(1, "read ahead") as ahead:
            coming = ahead.submit(read, 0)
            for at in range(len(starts)):
                piece = coming.result()
                if at + 1 < len(starts):
                    coming = ahead.submit(read, at + 1)
                yield piece

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, on the CPU.

        Raises:
            InputError: the shard vanished, changed or cannot be read.
        """
        import torch

        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        self.read_into(name, tensor_bytes(tensor))
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Only some rows (along the first axis), in the given order.

        Rows that lie near each other are read at once, with the rows between them. Several threads read.

        Raises:
            IndexError: there is no such row.
            InputError: the shard vanished, changed or cannot be read.
        """
        import torch

        info = self.info(name)
        tensor = torch.empty((len(rows), *info.shape[1:]), dtype=torch_dtype(info.dtype))
        row_bytes = info.nbytes // max(1, info.shape[0])
        wanted = torch.as_tensor(rows, dtype=torch.int64)

        def read(begin: int, end: int) -> None:
            first, last = int(wanted[begin]), int(wanted[end - 1])
            near = torch.empty((last - first + 1, *info.shape[1:]), dtype=tensor.dtype)
            self.read_into(name, tensor_bytes(near), first * row_bytes)
            torch.index_select(near, 0, wanted[begin:end] - first, out=tensor[begin:end])

        with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1), "rows") as readers:
            list(readers.map(read, *zip(*_near_rows(wanted, row_bytes), strict=True)) if len(rows) else ())
        return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors shards, reading only headers.

    Raises:
        InputError: something is missing, damaged or contradictory. The message is one sentence.
    """
    if not _is_folder(folder):
        raise InputError(no_folder(folder))
    names = names_in(folder)
    if not os.path.lexists(folder / "config.json"):
        raise InputError(no_config(str(folder), names))
    config = read_json(folder / "config.json", "every Hugging Face model folder has one")
    side_files(folder)  # refuses now, not hours later when it copies them
    index_path = folder / INDEX_NAME
    if is_file(index_path):
        files = read_index(index_path)
    elif is_file(folder / SINGLE_NAME):
        files = dict.fromkeys(read_header(folder / SINGLE_NAME).tensors, SINGLE_NAME)
    else:
        raise InputError(no_weights(str(folder), names))
    missing = missing_shards(str(folder), files.values(), names)
    if missing is not None:
        raise InputError(missing)
    shards = {name: read_header(folder / name) for name in sorted(set(files.values()))}
    check_index(str(folder), files, shards)
    check_sizes(config, (info for header in shards.values() for info in header.tensors.values()))
    return Checkpoint(folder, config, shards, files)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous. Writes to them change the tensor."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    table = {
        "F64": torch.float64,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
    }
    return table[name]


def _near_rows(rows: torch.Tensor, row_bytes: int) -> list[tuple[int, int]]:
    """Ranges of positions in `rows` (int64 [n]) whose rows ascend with small gaps, each at most a chunk of the file."""
    import torch

    gaps = rows.diff()
    breaks = ((gaps < 1) | ((gaps - 1) * row_bytes > MOST_GAP_BYTES)).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(rows)]
    ranges = []
    most = max(1, COPY_CHUNK_BYTES // max(1, row_bytes))  # rows of the file in a range
    for begin, end in itertools.pairwise(edges):
        while begin < end:
            stop = int(torch.searchsorted(rows[begin:end], rows[begin] + most)) + begin
            ranges.append((begin, stop))
            begin = stop
    return ranges


def _is_folder(path: Path) -> bool:
    """Whether the folder exists, False also where the system refuses the name itself, as one that is too long."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index lists it.

    Raises:
        InputError: it is damaged, or names something else than a safetensors file of its folder.
    """
    weight_map = read_json(path, "it lists the shards", unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map", where=path, hint="download it again")
    for tensor, name in weight_map.items():
        fault = check_name(tensor)
        if fault is not None:
            raise InputError(f"{path} has {fault}", where=path, hint="download it again")
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise InputError(
                f"the index places tensor {tensor} in {quoted(name)}, outside of the folder",
                where=path,
                hint="download the model from a source that you trust",
            )
        if not name.isprintable() or len(os.fsencode(name)) > MOST_FILE_NAME_BYTES:
            raise InputError(
                f"the index places tensor {tensor} in {quoted(name)}, which is not the name of a shard",
                where=path,
                hint="download the model from a source that you trust",
            )
        if not name.endswith(".safetensors"):
            raise InputError(
                f"tensor {tensor} lies in {name}, which is not a safetensors file",
                where=path,
                hint="convert the model to safetensors first",
            )
    return weight_map


def check_index(folder: str, files: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    """Compare an index with the headers, in both directions.

    Raises:
        InputError: they contradict each other.
    """
    for tensor, name in files.items():
        if tensor not in shards[name].tensors:
            raise InputError(
                f"the index lists {tensor} in {name}, which lacks it", where=folder, hint="download the shard again"
            )
    for name, header in shards.items():
        for tensor in header.tensors:
            if tensor not in files:
                raise InputError(
                    f"{name} contains {tensor}, which the index does not list",
                    where=folder,
                    hint="download the index again",
                )
            if files[tensor] != name:
                raise InputError(
                    f"{tensor} lies in {name} and in {files[tensor]}",
                    where=folder,
                    hint="download the shards and the index again",
                )
