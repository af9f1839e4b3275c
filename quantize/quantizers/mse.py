"""mse: for each block the E4M3 scale with the least squared error, weighted by the mean square of each column's input.

Candidates are the E4M3 values between 0.85 and 1.8 times amax / 6: for a scale outside of that range, a better one
inside exists in all but a vanishing share of blocks (docs/recipes.md, section "Quantizers", gives the measurement
against all 126). The global scale leaves headroom for them: it is half of rtn's, which changes no rounding. Ties go
to the smaller scale. Sums are taken over neighbouring pairs in a fixed order, so that every device chooses alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..format.blocks import BlockQuantized, quantize_blocks
from ..format.constants import BLOCK, E2M1_MAX, E4M3_MAX, E4M3_MIN
from ..format.e2m1 import rounding_magic
from ..format.kernels import has_kernel, quantize_with_kernel
from ..format.scales import block_scale_bytes, decode_e4m3, sixth
from ..format.schemes import NVFP4, NVFP4_A16, Part
from ..recipe.matrices import Matrix
from .base import Claim, GroupInputs, Need, QuantizedGroup
from .blocks import BlockScales

LOWEST, HIGHEST = 0.85, 1.8
# From the byte of the nearest scale; at most 8 E4M3 values lie in an octave and log2(1.8 / 0.85) is 1.08.
OFFSETS = range(-2, 8)
LARGEST_BYTE = 0x7E


def sweep_blocks(weight: Tensor, scale: Tensor, mean_square: Tensor | None = None) -> BlockQuantized:
    """Quantize one matrix with the best scale of each block.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32, finite, cols divisible by 16.
        scale: float32 scalar, the global scale (divisor) of the fused group.
        mean_square: float64 [cols], the mean square of each column's input over the calibration tokens, or None.
    """
    importance = block_importance(weight.shape[1], mean_square).to(weight.device)
    scale = scale.to(weight.device)
    if has_kernel(weight):
        weights = importance if mean_square is not None else None
        return quantize_with_kernel(weight, scale, weights, (LOWEST, HIGHEST, OFFSETS[0], OFFSETS[-1]))
    return quantize_blocks(weight, scale, lambda blocks, _: sweep_scales(blocks, scale, importance))


CLAIM = Claim(headroom=2.0, scale_offsets=OFFSETS)


@dataclass(frozen=True)
class MSE:
    """Least weighted squared error over the E4M3 scales near amax / 6."""

    name: str = "mse"
    schemes: frozenset[str] = frozenset({NVFP4.name, NVFP4_A16.name})
    needs: frozenset[Need] = frozenset({"mean_square"})
    lane: Literal["source", "quantized"] = "source"
    by_site: bool = False
    folds: bool = False
    claim: Claim = CLAIM
    rows_claim: Claim = CLAIM

    def quantize(
        self, group: Sequence[Matrix], weights: Sequence[Tensor], inputs: GroupInputs | None
    ) -> QuantizedGroup:
        """See `Quantizer.quantize`."""
        mean_square = None if inputs is None else inputs.ranges.mean_square
        return BlockScales(self.claim.headroom).quantize(
            group, weights, lambda weight, scale: sweep_blocks(weight, scale, mean_square)
        )

    def quantize_rows(self, matrix: Matrix, weight: Tensor, amax: Tensor) -> Mapping[Part, Tensor]:
        """See `Quantizer.quantize_rows`."""
        return BlockScales(self.claim.headroom).quantize_rows(matrix, weight, amax, sweep_blocks)


def block_importance(cols: int, mean_square: Tensor | None) -> Tensor:
    """Weight of each column's squared error, relative to its block.

    Args:
        cols: number of columns, divisible by 16.
        mean_square: float64 [cols] or None.
    Returns:
        float32 [16, cols / 16]: column 16 j + i at [i, j]. The mean of a block is 1, and a block whose inputs were all
        zero counts evenly.
    """
    if mean_square is None:
        return torch.ones((BLOCK, cols // BLOCK), dtype=torch.float32)
    blocks = mean_square.detach().to("cpu", torch.float64).view(-1, BLOCK)
    mean = blocks.mean(-1, keepdim=True)
    return torch.where(mean > 0, blocks / mean, torch.ones_like(blocks)).float().t().contiguous()


def sweep_scales(blocks: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """The best block scale of each block.

    Args:
        blocks: float32 [16, n], the elements of n blocks: complete rows of the matrix.
        scale: float32 scalar, the global scale (divisor).
        importance: float32 [16, blocks a row].
    Returns:
        uint8 E4M3 bytes [n].
    """
    magnitude = blocks.abs()
    amax = magnitude.amax(0)
    nearest = block_scale_bytes(amax, scale)
    wanted = sixth(amax).mul_(scale)
    lowest = (wanted * LOWEST).clamp_(min=E4M3_MIN)
    highest = (wanted * HIGHEST).clamp_(max=E4M3_MAX)
    best_error = torch.full_like(amax, torch.inf)
    best = nearest.clone()
    work = torch.empty_like(magnitude), torch.empty_like(magnitude, dtype=torch.int32)
    for offset in OFFSETS:
        code = (nearest.to(torch.int16) + offset).clamp_(1, LARGEST_BYTE).to(torch.uint8)
        value = decode_e4m3(code)
        error = _weighted_error(magnitude, value.div(scale), importance, work)
        allowed = (value >= lowest) & (value <= highest) if offset else torch.ones_like(amax, dtype=torch.bool)
        better = allowed & (error < best_error)
        best = torch.where(better, code, best)
        best_error = torch.where(better, error, best_error)
    return best


def _weighted_error(magnitude: Tensor, step: Tensor, importance: Tensor, work: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over each block of importance * (round(x / step) * step - x)^2; float32 [n]."""
    scaled = torch.div(magnitude, step, out=work[0]).clamp_(max=E2M1_MAX)
    magic = rounding_magic(scaled, out=work[1]).view(torch.float32)
    error = scaled.add_(magic).sub_(magic).mul_(step).sub_(magnitude)
    error.mul_(error).view(BLOCK, -1, importance.shape[1]).mul_(importance.unsqueeze(1))
    for _ in range(4):
        error = error[0::2] + error[1::2]
    return error[0]
