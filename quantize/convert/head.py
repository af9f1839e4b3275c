"""The quantized output head: its own shard, made of strips of rows, so that memory never contains the complete matrix.

The head is read twice or more: once for its largest magnitude, from which the shared scales follow, then for its codes,
which go to the file strip by strip. Its other parts are small and stay in host memory until their place in the file
comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.output_head import class_name, head_input_bound, why_no_own_head
from ..checkpoint.source import tensor_bytes, torch_dtype
from ..checkpoint.writer import TensorEntry, write_shard
from ..errors import EnvironmentLack, InputError, NonFiniteError
from ..format.blocks import weight_amax
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..format.schemes import Part
from ..plan.forecast import HEAD_STRIP_BYTES
from ..plan.plan import Plan, PlannedShard
from ..quantizers import quantizer_for
from ..quantizers.base import Quantizer
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix, matrix_entries
from ..stream.manifest import GroupRecord, HeadRecord
from .matrices import group_scalars


def check_head(plan: Plan) -> None:
    """Refuse a head that the model's class cannot have, or whose input has no proved bound although its scheme requires
    one.

    The bound of a model on the Hub is proved when its conversion begins, because that reads the norm before the head.

    Raises:
        EnvironmentLack: the head is tied, and the installed transformers does not know the class.
        InputError: see above.
    """
    if plan.head is None or plan.selection.head is None:
        return
    try:
        why = why_no_own_head(plan.source, plan.output_config, plan.head.name)
    except EnvironmentLack:
        if plan.selection.head.is_embedding:
            raise
        why = None  # the source has a head of its own, so servers that know the class read one
    if why is not None:
        raise InputError(
            f"the head of {plan.model} cannot be quantized ({class_name(plan.source)} {why})",
            where=f"recipe {plan.recipe.name}",
            hint="remove the key `head`",
        )
    if plan.source.hub is None:
        input_bound(plan)


def input_bound(plan: Plan) -> float | None:
    """The largest magnitude of the head's input, or None where its scheme stores no input scale.

    Raises:
        EnvironmentLack: the installed transformers does not know the model's class.
        InputError: the model does not prove a bound.
    """
    if plan.head is None or plan.head.scheme.inputs != "calibrated":
        return None
    bound = head_input_bound(plan.source, plan.prefix)
    if bound is None:
        raise InputError(
            f"the {plan.layout.name} layout stores a scale of the head's inputs, but {class_name(plan.source)} "
            "does not read them from an RMSNorm, which would bound them",
            where=f"recipe {plan.recipe.name}",
            hint="use --format compressed-tensors",
        )
    return bound


def head_maker(
    plan: Plan, shards: Sequence[PlannedShard], quantizer: Quantizer, device: torch.device
) -> HeadMaker | None:
    """The maker of the head, if its shard is among those to write. Call it from the main thread: it builds the model.

    Raises:
        EnvironmentLack, InputError: see `input_bound`.
    """
    shard = next((shard for shard in shards if shard.is_head), None)
    if shard is None or plan.head is None:
        return None
    return HeadMaker(plan, plan.head, shard, quantizer, device, input_bound(plan))


@dataclass
class _Kept:
    """The bytes of a part, strip by strip.

    Attributes:
        data: uint8, of the complete part.
    """

    data: Tensor
    filled: int = 0

    def add(self, tensor: Tensor) -> None:
        """Append the bytes of the next strip's part, which is on the CPU."""
        piece = tensor.contiguous().view(torch.uint8).flatten()
        self.data[self.filled : self.filled + len(piece)] = piece
        self.filled += len(piece)


@dataclass(frozen=True)
class HeadMaker:
    """Makes the head's shard.

    Attributes:
        quantizer: of the run. A scheme that it does not know has its own.
        device: that quantizes the strips.
        input_bound: the largest magnitude of the head's input, or None without an input scale.
    """

    plan: Plan
    matrix: Matrix
    shard: PlannedShard
    quantizer: Quantizer
    device: torch.device
    input_bound: float | None

    def write(self, folder: Path, between: Callable[[], None]) -> tuple[str, HeadRecord]:
        """Write the shard, and return its sha256 and the manifest's entry for the head.

        Args:
            between: called after each strip.
        Raises:
            NonFiniteError: a NaN or an infinity in a weight.
            InputError: weights that the scheme cannot represent, a source shard that changed, or a full disk.
        """
        matrix, plan = self.matrix, self.plan
        amax = self._amax(between)
        facts: dict[str, Any] = {
            "scheme": matrix.scheme.name,
            "members": (matrix.name,),
            "weight_amax": float(amax),
        }
        if self.input_bound is not None:
            facts["input_bound"] = self.input_bound
        group = FusedGroup(matrix.name, (matrix.name,))
        scalars = group_scalars(plan, group, GroupRecord(**facts), self.quantizer)
        parts = {entry.name: part for part, entry in matrix_entries(matrix, plan.layout).items()}
        kept = {
            parts[entry.name]: _Kept(torch.empty(entry.nbytes, dtype=torch.uint8))
            for entry in self.shard.entries
            if entry.name not in scalars and parts[entry.name] != "codes"
        }
        self._fill_before_codes(parts, kept, amax, between)
        histogram = torch.zeros(256, dtype=torch.int64)

        def codes() -> Iterator[memoryview]:
            for strip in self._quantized(amax, between):
                if matrix.scheme.has_block_scales:
                    histogram.add_(scale_histogram(strip["scales"]))
                for part in kept:
                    kept[part].add(strip[part])
                yield tensor_bytes(strip["codes"].view(torch.uint8))

        def contents(entry: TensorEntry) -> Iterator[memoryview]:
            if entry.name in scalars:
                yield tensor_bytes(scalars[entry.name])
            elif parts[entry.name] == "codes":
                yield from codes()
            else:
                yield tensor_bytes(kept.pop(parts[entry.name]).data)

        digest = write_shard(folder / self.shard.file, self.shard.entries, contents)
        if matrix.scheme.has_block_scales:
            facts["marlin_flushed_blocks"] = count_flushed_blocks(histogram)
        return digest, HeadRecord(name=matrix.name, file=self.shard.file, group=GroupRecord(**facts))

    def _fill_before_codes(
        self, parts: Mapping[str, Part], kept: Mapping[Part, _Kept], amax: Tensor, between: Callable[[], None]
    ) -> None:
        """Fill the kept parts that precede the codes in the file, which requires a pass of their own."""
        order = [parts[entry.name] for entry in self.shard.entries]
        early = [part for part in order[: order.index("codes")] if part in kept]
        for strip in self._quantized(amax, between) if early else ():
            for part in early:
                kept[part].add(strip[part])

    def _amax(self, between: Callable[[], None]) -> Tensor:
        """The largest magnitude of the head, float32 scalar on the device."""
        found = torch.zeros((), dtype=torch.float32, device=self.device)
        for first, strip in self._strips():
            try:
                found = torch.maximum(found, weight_amax(strip, self.matrix.tensor))
            except NonFiniteError as error:
                raise NonFiniteError(error.name, first + error.row, error.column) from error
            between()
        return found

    def _quantized(self, amax: Tensor, between: Callable[[], None]) -> Iterator[dict[Part, Tensor]]:
        """The parts of each strip on the CPU, valid until the next."""
        quantizer = quantizer_for(self.matrix.scheme.name, self.quantizer)
        for _, strip in self._strips():
            made = quantizer.quantize_rows(self.matrix, strip, amax)
            yield {part: tensor.cpu() for part, tensor in made.items()}
            between()

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row, and some rows in their stored dtype on the device, valid until the next."""
        source, matrix = self.plan.source, self.matrix
        dtype = torch_dtype(source.info(matrix.tensor).dtype)
        height = min(matrix.rows, max(1, HEAD_STRIP_BYTES // (matrix.cols * dtype.itemsize)))
        buffer = torch.empty((height, matrix.cols), dtype=dtype)
        for first in range(0, matrix.rows, height):
            rows = buffer[: min(height, matrix.rows - first)]
            source.read_into(matrix.tensor, tensor_bytes(rows), first * matrix.cols * dtype.itemsize)
            yield first, rows.to(self.device)
