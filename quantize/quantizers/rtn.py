"""Round to nearest: every block scale is amax / 6, and every code is the nearest one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..format.blocks import BlockQuantized, quantize_blocks
from ..format.kernels import has_kernel, quantize_with_kernel


@dataclass(frozen=True)
class RTN:
    """Round to nearest, as in llm-compressor's minmax observer and modelopt's max calibration."""

    name: str = "rtn"
    headroom: float = 1.0
    uses_mean_square: bool = False

    def quantize(self, weight: Tensor, scale: Tensor, mean_square: Tensor | None = None) -> BlockQuantized:
        """See `Quantizer.quantize`. `mean_square` is not used."""
        return quantize_with_kernel(weight, scale) if has_kernel(weight) else quantize_blocks(weight, scale)
