"""A quantized checkpoint that every reader sees decoded: the tensors of its model in BF16, and no companions.

Decoded tensors have places of their own behind the end of the shard that contains their codes. A read of such a place
reads the codes and scales of its rows, decodes them and fills the buffer. All other places are the stored ones, so
ranges, limits of memory and copies work as for any checkpoint.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from ..checkpoint.headers import Header, TensorInfo
from ..checkpoint.shard_bytes import LocalBytes, ReadingOrder, ShardBytes
from ..checkpoint.source import Checkpoint, tensor_bytes, torch_dtype
from ..errors import InputError
from .claims import METHODS, find_claim, without_claim
from .coded import Coded, StoredRows, refuse_bad_scales, scale_values
from .found import Found, find_coded

if TYPE_CHECKING:
    from torch import Tensor

DECODED_DTYPE = "BF16"
_DECODED_BYTES = 2
_SCALE_ELEMENTS = 1 << 22  # of scales read at a time


@dataclass(frozen=True)
class Decoding:
    """The shards of a quantized checkpoint with its tensors decoded. See `ShardBytes`.

    Attributes:
        raw: the checkpoint as it is stored.
        found: its coded tensors.
        places: of the decoded tensors, by shard, in order.
    """

    raw: Checkpoint
    found: Found
    places: Mapping[str, tuple[TensorInfo, ...]]

    @property
    def integrity(self) -> str:
        """See `ShardBytes`."""
        return self.raw.content.integrity

    def fill(self, name: str, header: Header, begin: int, buffer: memoryview) -> None:
        """See `ShardBytes`.

        Raises:
            InputError: it cannot be read, or a scale is no finite number.
        """
        file = header.path.name
        if begin < self.raw.shards[file].file_bytes:
            self.raw.content.fill(name, header, begin, buffer)
            return
        places = self.places[file]
        info = places[bisect_right(places, begin, key=lambda place: place.begin) - 1]
        coded = self.found.coded[info.name]
        at = begin - info.begin
        for piece in (_transposed if coded.is_transposed else _straight)(self.raw, coded, at, len(buffer)):
            buffer[: len(piece)] = piece
            buffer = buffer[len(piece) :]

    def begin(self, order: ReadingOrder, places: Mapping[str, Header]) -> None:
        """See `ShardBytes`. Announce the stored tensors."""
        names = self._stored
        stored = ReadingOrder(
            [[one for name in layer for one in names(name)] for layer in order.layers],
            [one for name in order.copies for one in names(name)],
            frozenset(one for name in order.outer for one in names(name)),
            {name: place for name, place in order.written.items() if name not in self.found.coded},
            order.spool,
        )
        self.raw.begin(stored)

    def recorded(self) -> None:
        """See `ShardBytes`."""
        self.raw.content.recorded()

    def copied(self, name: str) -> None:
        """See `ShardBytes`."""
        for stored in self._stored(name):
            self.raw.content.copied(stored)

    def fetched(self) -> tuple[int, int]:
        """See `ShardBytes`."""
        return self.raw.content.fetched()

    def end(self) -> None:
        """See `ShardBytes`."""
        self.raw.content.end()

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, with its companions."""
        return sum(self.raw.info(stored).nbytes for stored in self._stored(name))

    def _stored(self, name: str) -> tuple[str, ...]:
        coded = self.found.coded.get(name)
        return (name,) if coded is None else coded.stored


def decoded(source: Checkpoint) -> Checkpoint:
    """A checkpoint as its model computes with it. It reads headers alone, and returns others than quantized ones, and
    those whose method nvquant does not know, as they are.

    Raises:
        InputError: its codes and scales do not fit each other.
    """
    if isinstance(source.content, Decoding):
        return source
    claim = find_claim(source.folder, source.config)
    if claim is None or claim.method not in METHODS:
        return source
    claim.refuse_other_forms(source.where)
    infos = source.infos()
    found = find_coded(infos, claim)
    if not found.coded:
        return source
    by_file: dict[str, list[Coded]] = {}
    for coded in found.coded.values():
        by_file.setdefault(source.files[coded.codes.name], []).append(coded)
    shards, places = {}, {}
    for file, header in source.shards.items():
        kept = {name: info for name, info in header.tensors.items() if name not in found.dropped}
        places[file] = tuple(_places(by_file.get(file, ()), header.file_bytes))
        # In the order of the codes, which is that of the model.
        order = {coded.codes.name: place for coded, place in zip(by_file.get(file, ()), places[file], strict=True)}
        tensors = {}
        for name in header.tensors:
            info = order.get(name, kept.get(name))
            if info is not None:
                tensors[info.name] = info
        shards[file] = replace(header, tensors=tensors)
    files = {name: file for file, header in shards.items() for name in header.tensors}
    content = Decoding(source, found, places)
    return Checkpoint(source.folder, without_claim(source.config), shards, files, content, source.hub)


def decoded_form(source: Checkpoint) -> str | None:
    """The forms that a source is decoded from, as "FP8" or "MXFP4 and FP8", or None for a source that is not
    quantized."""
    return source.content.found.words if isinstance(source.content, Decoding) else None


def check_scales(source: Checkpoint) -> None:
    """Read all scales of a local source before its codes. Those of a remote source are checked as they are read.

    Raises:
        InputError: one is no finite number, or a stored shape contradicts the codes.
    """
    content = source.content
    if not isinstance(content, Decoding) or not isinstance(content.raw.content, LocalBytes):
        return
    for coded in content.found.coded.values():
        for scales in _all_scales(content.raw, coded):
            refuse_bad_scales(coded, scale_values(scales))
        shape = f"{coded.name}_shape"
        if shape in content.raw.files and tuple(content.raw.read(shape).tolist()) != coded.shape:
            raise InputError(
                f"{shape} contradicts the shapes of the codes and scales beside it",
                where=shape,
                hint="download its shard again",
            )


def form_notes(source: Checkpoint) -> Iterator[str]:
    """Sentences on a quantized source: its form, and what follows from it for the output."""
    form = decoded_form(source)
    if form is None:
        return
    yield f"The source is stored in {form}. nvquant decodes it, and writes unquantized tensors in BF16."
    if "INT4" in form:
        yield "INT4 and NVFP4 have other levels, so this conversion adds an error of its own. Measure it with verify."
    if "NVFP4" in form:
        yield "Matrices in NVFP4 are quantized again. To change the layout alone, use `nvquant relayout`."


def stored_bytes(source: Checkpoint, name: str) -> int:
    """Bytes of a tensor of a source in its files, with its companions."""
    content = source.content
    return content.stored_bytes(name) if isinstance(content, Decoding) else source.info(name).nbytes


def shards_below(source: Checkpoint) -> ShardBytes:
    """The shards as they are stored, whether the source is decoded or not."""
    return source.content.raw.content if isinstance(source.content, Decoding) else source.content


def with_shards_below(source: Checkpoint, content: ShardBytes) -> Checkpoint:
    """The source with other shards of the same content."""
    if not isinstance(source.content, Decoding):
        return replace(source, content=content)
    return replace(source, content=replace(source.content, raw=replace(source.content.raw, content=content)))


def _places(coded: Iterable[Coded], begin: int) -> Iterator[TensorInfo]:
    for one in coded:
        end = begin + _DECODED_BYTES * prod(one.shape)
        yield TensorInfo(one.name, DECODED_DTYPE, one.shape, begin, end)
        begin = end


def _straight(raw: Checkpoint, coded: Coded, at: int, length: int) -> Iterator[memoryview]:
    """Bytes of a decoded tensor whose rows are stored as rows."""
    import torch

    row_bytes = _DECODED_BYTES * coded.cols
    first, last = at // row_bytes, -(-(at + length) // row_bytes)
    skip = at - first * row_bytes
    for strip in read_rows(raw, coded, first, last).strips():
        piece = tensor_bytes(strip.to(torch.bfloat16))[skip : skip + length]
        skip, length = max(0, skip - strip.numel() * _DECODED_BYTES), length - len(piece)
        yield piece


def _transposed(raw: Checkpoint, coded: Coded, at: int, length: int) -> Iterator[memoryview]:
    """Bytes of a decoded tensor whose rows are stored as columns, from each matrix that they belong to."""
    import torch

    row_bytes, height = _DECODED_BYTES * coded.rows, coded.cols
    first, last = at // row_bytes, -(-(at + length) // row_bytes)
    skip = at - first * row_bytes
    for matrix in range(first // height, -(-last // height)):
        begin, end = max(first, matrix * height) - matrix * height, min(last - matrix * height, height)
        stored = read_rows(raw, coded, matrix * coded.rows, (matrix + 1) * coded.rows)
        columns = [strip[:, begin:end].to(torch.bfloat16) for strip in stored.strips()]
        piece = tensor_bytes(torch.cat(columns).t().contiguous())[skip : skip + length]
        skip, length = 0, length - len(piece)
        yield piece


def read_rows(raw: Checkpoint, coded: Coded, first: int, last: int) -> StoredRows:
    """Rows of codes, counted through the stack, with their scales.

    Raises:
        InputError: they cannot be read.
    """
    import torch

    row_bytes = coded.codes.nbytes // (coded.matrices * coded.rows)
    codes = torch.empty((last - first, row_bytes), dtype=torch.uint8)
    raw.read_into(coded.codes.name, tensor_bytes(codes), first * row_bytes)
    begin, end = coded.scale_range(first, last)
    scalar = None if coded.scalar is None else raw.read(coded.scalar.name)
    return StoredRows(coded, first, codes, scale_rows(raw, coded, begin, end), scalar)


def scale_rows(raw: Checkpoint, coded: Coded, begin: int, end: int) -> Tensor:
    """Rows of scales of a coded tensor, counted through the stack, in their dtype.

    Raises:
        InputError: they cannot be read.
    """
    import torch

    scales = torch.empty((end - begin, coded.scale_cols), dtype=torch_dtype(coded.scales.dtype))
    row_bytes = coded.scale_cols * scales.dtype.itemsize
    raw.read_into(coded.scales.name, tensor_bytes(scales), begin * row_bytes)
    return scales


def _all_scales(raw: Checkpoint, coded: Coded) -> Iterator[Tensor]:
    rows, height = coded.matrices * coded.scale_rows, max(1, _SCALE_ELEMENTS // coded.scale_cols)
    for begin in range(0, rows, height):
        yield scale_rows(raw, coded, begin, min(rows, begin + height))
