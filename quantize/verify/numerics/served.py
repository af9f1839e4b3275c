"""The checkpoint as a server computes it: its matrices decoded, the inputs of W4A4 matrices rounded.

This module treats a fused group's global scales as a server does. Of several divisors it keeps the largest, of several
multipliers likewise, and reads every member by that one (vLLM 0.33, compressed_tensors_w4a4_nvfp4.py and modelopt.py).
In a good checkpoint they are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ...calibrate.taps import Handle, LinearTap
from ...checkpoint.headers import Header, TensorInfo
from ...checkpoint.source import Checkpoint
from ...errors import InputError
from ...format.activations import quantize_dequantize
from ...format.blocks import dequantize_blocks
from ...format.constants import BLOCK, E4M3_MAX, SCALE_RANGE
from ...format.marlin import flushed_bytes
from ...plan.plan import Part
from ...recipe.decoder import decoder_prefix, layer_count, layer_index
from ...recipe.groups import FusedGroup
from ..matrices import Matrix
from ..served import W4A4, scheme_of
from ..subject import Subject

Arithmetic = Literal["w4a4", "weight_only"]


@dataclass(frozen=True)
class ServedMatrix:
    """A quantized matrix as a server reads it.

    Attributes:
        group: name of its fused layer.
        divisor: float32 scalar, the weight global scale that the server keeps for the fused layer.
        input_divisor: the input global scale, float32 scalar. None where the server does not round the input.
        flushed: bool [256], the block scales that Marlin turns to zero.
    """

    matrix: Matrix
    group: str
    divisor: Tensor
    input_divisor: Tensor | None
    flushed: Tensor


class ServedModel:
    """The model that a server builds from a checkpoint, read a layer at a time.

    Args:
        subject: a checkpoint that passes the check `matrices`.
    Raises:
        InputError: it has no decoder layers, or a quantized matrix outside of them. `matrices` raises it where an
            input scale that the config requires is not stored.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        prefix = decoder_prefix(subject.shapes, subject.config)
        if prefix is None:
            raise InputError(f"{subject.folder} has no decoder layers: its numbers cannot be measured.")
        self.prefix = prefix
        outside = next((module for module in subject.sound if layer_index(f"{module}.", prefix) is None), None)
        if outside is not None:
            raise InputError(f"{subject.folder}: {outside} is quantized but in no decoder layer: leave it in BF16.")

    @property
    def has_w4a4(self) -> bool:
        """Whether a server with FP4 units rounds any input."""
        return any(served.input_divisor is not None for served in self.matrices.values())

    @cached_property
    def matrices(self) -> dict[str, ServedMatrix]:
        """The quantized matrices by module."""
        return {module: made for group in self.subject.groups for module, made in self._group(group)}

    def _group(self, group: FusedGroup) -> Iterator[tuple[str, ServedMatrix]]:
        subject = self.subject
        members = subject.fusions.members(group.members[0])
        rounds = scheme_of(group.name, subject.quantization, members) == W4A4
        histogram = torch.stack([subject.histograms[module] for module in group.members]).sum(0)
        divisor = self._kept(group, "weight_global")
        lacking = [module for module in group.members if not subject.sound[module].has_input_scale]
        if rounds and lacking:
            raise InputError(
                f"{subject.folder} makes {lacking[0]} W4A4 but stores no {subject.layout.input_global} for it: its "
                f"numbers cannot be measured."
            )
        input_divisor = self._kept(group, "input_global") if rounds else None
        for module in group.members:
            yield (
                module,
                ServedMatrix(subject.sound[module], group.name, divisor, input_divisor, flushed_bytes(histogram)),
            )

    def _kept(self, group: FusedGroup, part: Part) -> Tensor:
        """The one global scale of a fused layer's that a server keeps, as a divisor."""
        stored = [self.subject.scalars[module, part] for module in group.members]
        kept = torch.tensor(max(stored), dtype=torch.float32)
        return kept if self.subject.layout.divisor else 1.0 / kept

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint as if its matrices were not quantized: for building the model, whose names and shapes it has.
        The matrices themselves cannot be read through it."""
        parts = {info.name for matrix in self.subject.sound.values() for info in matrix.parts.values()}
        files = {name: file for name, file in self.subject.checkpoint.files.items() if name not in parts}
        shards = {
            file: replace(header, tensors={name: info for name, info in header.tensors.items() if name not in parts})
            for file, header in self.subject.headers.items()
        }
        for module, matrix in self.subject.sound.items():
            name = f"{module}.weight"
            files[name] = self.subject.checkpoint.files[matrix.parts["packed"].name]
            header: Header = shards[files[name]]
            info = TensorInfo(name, "BF16", (matrix.rows, matrix.cols), 0, 0)
            shards[files[name]] = replace(header, tensors={**header.tensors, name: info})
        config = {key: value for key, value in self.subject.config.items() if key != "quantization_config"}
        return Checkpoint(self.subject.folder, config, shards, files)

    def stored_names(self) -> dict[int, list[str]]:
        """Names of the tensors as stored, by layer."""
        layers: dict[int, list[str]] = {}
        count = layer_count(self.subject.config)
        for name in self.subject.checkpoint.files:
            layer = layer_index(name, self.prefix)
            if layer is not None and (count is None or layer < count):
                layers.setdefault(layer, []).append(name)
        return dict(sorted(layers.items()))

    def matrices_of(self, layer: int) -> dict[str, ServedMatrix]:
        """The quantized matrices of a layer, by module."""
        begin = f"{self.prefix}.{layer}."
        return {module: served for module, served in self.matrices.items() if module.startswith(begin)}

    def decoded(self, layer: int, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """A layer's tensors under the names that they have in the unquantized model.

        Args:
            stored: as stored, on the device.
            dtype: of decoded matrices. The arithmetic is float32.
        """
        matrices = self.matrices_of(layer)
        parts = {info.name for served in matrices.values() for info in served.matrix.parts.values()}
        tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
        for module, served in matrices.items():
            packed = stored[served.matrix.parts["packed"].name]
            scales = stored[served.matrix.parts["scales"].name]
            tensors[f"{module}.weight"] = dequantize_blocks(packed, scales, served.divisor, dtype)
        return tensors

    def flush(
        self, layer: int, stored: Mapping[str, Tensor], decoded: dict[str, Tensor], arithmetic: Arithmetic
    ) -> None:
        """Zero, in the decoded matrices, the blocks that Marlin loses: of every matrix where weights alone are
        quantized, else of those that are served so on any GPU."""
        for module, served in self.matrices_of(layer).items():
            goes_through_marlin = arithmetic == "weight_only" or served.input_divisor is None
            if not goes_through_marlin or not bool(self.subject.histograms[module][served.flushed].any()):
                continue
            scales = stored[served.matrix.parts["scales"].name].view(torch.uint8)
            lost = served.flushed.to(scales.device)[scales.int()].unsqueeze(-1)
            weight = decoded[f"{module}.weight"]
            weight.view(weight.shape[0], -1, BLOCK).masked_fill_(lost, 0)


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
    """Rounds the inputs of W4A4 matrices as the server does, and counts what is clipped or lost."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.numbers: dict[str, InputNumbers] = {}

    def tap(self, layer: int) -> LinearTap:
        """A tap with a site for each fused layer whose input the server rounds."""
        prefix, sites = f"{self._model.prefix}.{layer}.", dict[str, list[str]]()
        for name, served in self._model.matrices_of(layer).items():
            if served.input_divisor is not None:
                sites.setdefault(served.group, []).append(name.removeprefix(prefix))
        return LinearTap(sites)

    def handle(self, layer: int, is_counted: bool = True) -> Handle:
        """A function that rounds what passes the sites of `tap`, and counts it in `numbers` if requested."""
        divisors = {served.group: served.input_divisor for served in self._model.matrices_of(layer).values()}

        def round_input(site: str, inputs: Tensor) -> Tensor:
            divisor = divisors[site]
            assert divisor is not None  # the site is of a W4A4 layer
            rounded = quantize_dequantize(inputs, divisor).to(inputs.dtype)
            if is_counted:
                self._count(site, inputs, rounded, float(divisor))
            return rounded

        return round_input

    def _count(self, group: str, inputs: Tensor, rounded: Tensor, divisor: float) -> None:
        numbers = self.numbers.setdefault(group, InputNumbers(SCALE_RANGE / divisor if divisor else float("inf")))
        amaxes = inputs.float().reshape(-1, BLOCK).abs().amax(-1)
        # A block is clipped where its scale would round to more than 448: beyond half a step above it.
        limit = numbers.calibrated * (E4M3_MAX + 16) / E4M3_MAX
        gone = (rounded.reshape(-1, BLOCK).abs().amax(-1) == 0) & (amaxes > 0)
        counted = torch.stack([(amaxes > limit).sum(), gone.sum()]).tolist()
        numbers.blocks += amaxes.numel()
        numbers.clipped += counted[0]
        numbers.lost += counted[1]
        numbers.amax = float(torch.maximum(torch.tensor(numbers.amax), amaxes.max().cpu()))  # NaN stays NaN
