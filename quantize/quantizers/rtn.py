"""Round to nearest: every block scale is amax / 6, and every code is the nearest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..format.blocks import BlockQuantized, quantize_blocks
from ..format.kernels import has_kernel, quantize_with_kernel
from ..format.schemes import NVFP4, NVFP4_A16, Part
from ..recipe.matrices import Matrix
from .base import Claim, GroupInputs, Need, QuantizedGroup
from .blocks import BlockScales


def round_blocks(weight: Tensor, scale: Tensor) -> BlockQuantized:
    """Quantize one matrix to nearest, as llm-compressor's minmax observer and modelopt's max calibration do.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32, finite, cols divisible by 16.
        scale: float32 scalar, the global scale (divisor) of the fused group.
    """
    return quantize_with_kernel(weight, scale) if has_kernel(weight) else quantize_blocks(weight, scale)


CLAIM = Claim(headroom=1.0, scale_offsets=range(1))


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    name: str = "rtn"
    schemes: frozenset[str] = frozenset({NVFP4.name, NVFP4_A16.name})
    needs: frozenset[Need] = frozenset()
    lane: Literal["source", "quantized"] = "source"
    by_site: bool = False
    folds: bool = False
    claim: Claim = CLAIM
    rows_claim: Claim = CLAIM

    def quantize(
        self, group: Sequence[Matrix], weights: Sequence[Tensor], inputs: GroupInputs | None
    ) -> QuantizedGroup:
        """See `Quantizer.quantize`. `inputs` are not used."""
        return BlockScales(self.claim.headroom).quantize(group, weights, round_blocks)

    def quantize_rows(self, matrix: Matrix, weight: Tensor, amax: Tensor) -> Mapping[Part, Tensor]:
        """See `Quantizer.quantize_rows`."""
        return BlockScales(self.claim.headroom).quantize_rows(matrix, weight, amax, round_blocks)
