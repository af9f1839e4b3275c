"""The checkpoint as a server computes it: its matrices decoded, the inputs of matrices rounded.

This module treats a fused group's global scales as a server does. Of several divisors it keeps the largest, of several
multipliers likewise, and reads every member by that one (vLLM 0.33, compressed_tensors_w4a4_nvfp4.py and modelopt.py).
FP8 members are quantized again under it.
In a good checkpoint they are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibrate.taps import Handle, LinearTap
from ...checkpoint.headers import TensorInfo
from ...errors import InputError
from ...format.constants import BLOCK, E4M3_MAX
from ...format.fp8 import quantize_rows
from ...format.marlin import flushed_bytes
from ...format.schemes import Arithmetic, Part, Scheme, arithmetics_of, rounds_inputs
from ...recipe.decoder import decoder_prefix, layer_index
from ...recipe.groups import FusedGroup
from ...recipe.roles import module_of
from ...weights.stored import StoredMatrix, input_leaf
from ..served import scheme_of
from ..subject import Subject

BULK: tuple[Part, ...] = ("codes", "scales")
"""The parts of a matrix that are read with its layer. Scalars are read once for all layers."""


@dataclass(frozen=True)
class ServedMatrix:
    """A quantized matrix as a server reads it.

    Attributes:
        scheme: that the config gives it.
        group: name of its fused layer.
        scalars: its scalars as the server keeps them for the fused layer, float32, global scales as divisors.
        flushed: bool [256], the block scales that Marlin turns to zero. None of FP8.
    """

    matrix: StoredMatrix
    scheme: Scheme
    group: str
    scalars: Mapping[Part, Tensor]
    flushed: Tensor

    @property
    def rounds(self) -> bool:
        """Whether a server rounds its inputs, if it has the units."""
        return self.scheme.inputs != "unchanged"


class ServedModel:
    """The model that a server builds from a checkpoint, read a layer at a time.

    Args:
        subject: a checkpoint that passes the check `matrices`.
    Raises:
        InputError: it has no decoder layers, or a quantized matrix outside of them that is not the head. `matrices`
            raises it where an input scale that the config requires is not stored.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        prefix = decoder_prefix(subject.shapes, subject.config)
        if prefix is None:
            raise InputError(
                f"{subject.folder} has no decoder layers", where=subject.folder, hint="its numbers cannot be measured"
            )
        self.prefix = prefix
        outside = next(
            (
                module
                for module in subject.sound
                if layer_index(f"{module}.", prefix) is None and module != subject.head
            ),
            None,
        )
        if outside is not None:
            raise InputError(
                f"{outside} is quantized but in no decoder layer", where=subject.folder, hint="leave it in BF16"
            )

    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """The arithmetics in which servers may compute it, the one of its own schemes first."""
        return arithmetics_of(served.scheme for served in self.matrices.values())

    @cached_property
    def matrices(self) -> dict[str, ServedMatrix]:
        """The quantized matrices by module."""
        return {module: made for group in self.subject.sound_groups for module, made in self._group(group)}

    def _group(self, group: FusedGroup) -> Iterator[tuple[str, ServedMatrix]]:
        subject = self.subject
        first = subject.sound[group.members[0]]
        declared = scheme_of(group.name, subject.quantization, subject.fusions.members(group.members[0]))
        scheme = subject.layout.schemes.get(declared, first.scheme)
        scheme = scheme if scheme.bits == first.scheme.bits else first.scheme
        lacking = [module for module in group.members if not subject.sound[module].has_input_scale]
        if scheme.inputs == "calibrated" and lacking:
            raise InputError(
                f"{subject.folder} makes {lacking[0]} {scheme.words} but stores no "
                f"{input_leaf(subject.layout, scheme)} for it",
                where=subject.folder,
                hint="its numbers cannot be measured",
            )
        # One tensor for all members: by it an input that they share is known to be rounded already.
        scalars = {part: self._kept(group, part) for part in scheme.shared}
        histograms = [subject.histograms[module] for module in group.members if module in subject.histograms]
        flushed = flushed_bytes(torch.stack(histograms).sum(0)) if histograms else torch.zeros(256, dtype=torch.bool)
        for module in group.members:
            yield module, ServedMatrix(subject.sound[module], scheme, group.name, scalars, flushed)

    def _kept(self, group: FusedGroup, part: Part) -> Tensor:
        """The one scalar of a fused layer that a server keeps, global scales as divisors."""
        stored = [self.subject.scalars[module, part] for module in group.members]
        return self.subject.layout.canonical(part, torch.tensor(max(stored), dtype=torch.float32))

    # The model's weights as `weights.base.Weights` has them

    @property
    def folder(self) -> Path:
        """The folder of config.json."""
        return self.subject.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json of the unquantized model."""
        return {key: value for key, value in self.subject.config.items() if key != "quantization_config"}

    @property
    def where(self) -> str:
        """The name in messages."""
        return self.subject.checkpoint.where

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `Weights.infos`."""
        return self._infos

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        parts = {info.name for matrix in self.subject.sound.values() for info in matrix.parts.values()}
        found = {name: info for name, info in self.subject.infos.items() if name not in parts}
        for module, matrix in self.subject.sound.items():
            name = f"{module}.weight"
            found[name] = TensorInfo(name, "BF16", (matrix.rows, matrix.cols), 0, 0)
        return found

    def stored(self, name: str) -> tuple[str, ...]:
        """See `Weights.stored`."""
        matrix = self.subject.sound.get(module_of(name))
        if matrix is None:
            return (self._infos[name].name,)
        return tuple(matrix.parts[part].name for part in BULK if part in matrix.parts)

    def assemble(self, names: Iterable[str], stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Weights.assemble`. The arithmetic of decoding is float32."""
        tensors = {}
        for name in names:
            served = self.matrices.get(module_of(name))
            if served is None:
                tensors[name] = stored[name]
                continue
            read = {part: stored[served.matrix.parts[part].name] for part in BULK if part in served.matrix.parts}
            tensors[name] = self._decoded(served, read, dtype)
        return tensors

    @staticmethod
    def _decoded(served: ServedMatrix, read: dict[Part, Tensor], dtype: torch.dtype) -> Tensor:
        if "scales" in served.scalars:
            read["codes"] = requantized(read["codes"], read["scales"], served.scalars["scales"])
        return served.scheme.decode({**read, **served.scalars}, dtype)

    def read(self, name: str) -> Tensor:
        """See `Weights.read`."""
        stored = {part: self.subject.checkpoint.read(part) for part in self.stored(name)}
        return self.assemble([name], stored, torch.float32)[name]

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """See `Weights.read_rows`."""
        served = self.matrices.get(module_of(name))
        if served is None:
            return self.subject.checkpoint.read_rows(name, rows)
        return self._decoded(served, self._parts_of_rows(served, rows), torch.float32)

    def _parts_of_rows(self, served: ServedMatrix, rows: Sequence[int]) -> dict[Part, Tensor]:
        """The bulk of some rows. A scale of the complete matrix is read with them."""
        found: dict[Part, Tensor] = {}
        for part in BULK:
            info = served.matrix.parts.get(part)
            if info is not None:
                is_whole = prod(info.shape) == 1
                checkpoint = self.subject.checkpoint
                found[part] = checkpoint.read(info.name) if is_whole else checkpoint.read_rows(info.name, rows)
        return found

    def matrices_of(self, layer: int) -> dict[str, ServedMatrix]:
        """The quantized matrices of a layer, by module."""
        begin = f"{self.prefix}.{layer}."
        return {module: served for module, served in self.matrices.items() if module.startswith(begin)}

    @property
    def head(self) -> ServedMatrix | None:
        """The output head, if it is quantized."""
        return None if self.subject.head is None else self.matrices[self.subject.head]

    def head_rows(self, rows: range, arithmetic: Arithmetic) -> Tensor:
        """Some rows of the quantized head as a server with an arithmetic has them, float32 [rows, cols] on the CPU."""
        head = self.head
        assert head is not None
        read = self._parts_of_rows(head, rows)
        decoded = self._decoded(head, dict(read), torch.float32)
        if self.loses_blocks(head, arithmetic):
            lost = head.flushed[read["scales"].view(torch.uint8).int()].unsqueeze(-1)
            decoded.view(len(rows), -1, BLOCK).masked_fill_(lost, 0)
        return decoded

    def head_inputs(self, inputs: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Inputs of the head as a server with an arithmetic rounds them, in their shape and dtype."""
        if self.head is None or not rounds_inputs(arithmetic, self.head.scheme):
            return inputs
        return self.head.scheme.round_inputs(inputs, self.head.scalars)

    def loses_blocks(self, served: ServedMatrix, arithmetic: Arithmetic) -> bool:
        """Whether Marlin zeroes blocks of a matrix in an arithmetic: of every matrix where weights alone are quantized,
        else of those that are served so on any GPU."""
        if rounds_inputs(arithmetic, served.scheme) or not served.scheme.has_block_scales:
            return False
        return bool(self.subject.histograms[served.matrix.module][served.flushed].any())

    def flush(
        self, layer: int, stored: Mapping[str, Tensor], decoded: dict[str, Tensor], arithmetic: Arithmetic
    ) -> None:
        """Zero, in the decoded matrices, the blocks that Marlin loses. See `loses_blocks`."""
        for module, served in self.matrices_of(layer).items():
            if not self.loses_blocks(served, arithmetic):
                continue
            scales = stored[served.matrix.parts["scales"].name].view(torch.uint8)
            lost = served.flushed.to(scales.device)[scales.int()].unsqueeze(-1)
            weight = decoded[f"{module}.weight"]
            weight.view(weight.shape[0], -1, BLOCK).masked_fill_(lost, 0)


def requantized(codes: Tensor, own: Tensor, kept: Tensor) -> Tensor:
    """FP8 codes under the one scale that a server keeps for a fused layer, rounded again where the matrix had another.

    Source: vLLM 0.32.0, `requantize_with_max_scale`, which dequantizes to float16.
    """
    own, kept = own.float().reshape(()), kept.to(own.device)
    if torch.equal(own, kept):
        return codes
    return quantize_rows((codes.half() * own).float(), kept)


@dataclass
class InputNumbers:
    """The numbers of the inputs of a fused layer, over all tokens.

    Attributes:
        blocks: the number of blocks of 16.
        clipped: the number of blocks with an element beyond the calibrated amax.
        lost: the number of blocks that were not zero and became zeros.
        amax: the largest magnitude.
        calibrated: the largest magnitude that is not clipped.
    """

    calibrated: float
    blocks: int = 0
    clipped: int = 0
    lost: int = 0
    amax: float = 0.0


class InputRounding:
    """Rounds the inputs of quantized matrices as the server does, and counts what is clipped or lost."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.numbers: dict[str, InputNumbers] = {}

    def tap(self, layer: int, arithmetic: Arithmetic) -> LinearTap:
        """A tap with a site for each fused layer whose input the server rounds."""
        prefix, sites = f"{self._model.prefix}.{layer}.", dict[str, list[str]]()
        for name, served in self._model.matrices_of(layer).items():
            if rounds_inputs(arithmetic, served.scheme):
                sites.setdefault(served.group, []).append(name.removeprefix(prefix))
        return LinearTap(sites)

    def handle(self, layer: int, is_counted: bool = True) -> Handle:
        """A function that rounds what passes the sites of `tap`, and counts it in `numbers` if requested."""
        by_site = {served.group: served for served in self._model.matrices_of(layer).values()}

        def round_input(site: str, inputs: Tensor) -> Tensor:
            served = by_site[site]
            rounded = served.scheme.round_inputs(inputs, served.scalars)
            if is_counted and served.scheme.inputs == "calibrated":
                self._count(served, inputs, rounded)
            return rounded

        return round_input

    def _count(self, served: ServedMatrix, inputs: Tensor, rounded: Tensor) -> None:
        numbers = self.numbers.setdefault(served.group, InputNumbers(served.scheme.largest_input(served.scalars)))
        amaxes = inputs.float().reshape(-1, BLOCK).abs().amax(-1)
        # A block is clipped where its scale would round to more than 448: beyond half a step above it.
        limit = numbers.calibrated * (E4M3_MAX + 16) / E4M3_MAX
        gone = (rounded.reshape(-1, BLOCK).abs().amax(-1) == 0) & (amaxes > 0)
        counted = torch.stack([(amaxes > limit).sum(), gone.sum()]).tolist()
        numbers.blocks += amaxes.numel()
        numbers.clipped += counted[0]
        numbers.lost += counted[1]
        numbers.amax = float(torch.maximum(torch.tensor(numbers.amax), amaxes.max().cpu()))  # NaN stays NaN
