"""MXFP4 matrices: E2M1 codes with a power of two for every 32 columns, which an E8M0 byte stores.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .constants import BLOCK, ZERO_BLOCK_BYTE

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CAST, SMALLEST_CAST = 8, -9
"""Exponents of the largest and of the smallest power of two in E4M3."""
MX_BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255
_MANTISSA_BITS = 23  # of float32, below its exponent


def decode_e8m0(stored: Tensor) -> Tensor:
    """Values of E8M0 bytes: 2^(byte - 127), and NaN for 255.

    Args:
        stored: uint8 or float8_e8m0fnu, any shape.
    Returns:
        float32, the same shape. 2^-127 is subnormal.
    """
    import torch

    exponents = stored.view(torch.uint8).int()
    values = (exponents << _MANTISSA_BITS).view(torch.float32)
    values.masked_fill_(exponents == 0, 2.0**-E8M0_BIAS)
    return values.masked_fill_(exponents == E8M0_NAN, float("nan"))


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^exponent by the bits of float32, because a device's power function may be off by an ulp.

    Args:
        exponents: int32, any shape, from -126 to 127.
    Returns:
        float32, the same shape.
    """
    import torch

    return ((exponents + E8M0_BIAS) << _MANTISSA_BITS).view(torch.float32)


@dataclass(frozen=True)
class CastRows:
    """Rows of MXFP4 as NVFP4.

    Attributes:
        packed: uint8 [rows, cols / 2].
        scales: float8_e4m3fn [rows, cols / 16].
        shifted: blocks of 16 with the same values under a larger scale and smaller codes.
        rounded: blocks of 16 that lost bits.
    """

    packed: Tensor
    scales: Tensor
    shifted: int
    rounded: int


def largest_exponent(weight: Tensor, exponents: Tensor) -> int | None:
    """The largest exponent of a scale whose block is not zero. None for a matrix of zeros.

    Args:
        weight: [rows, cols], the decoded values, in any float dtype.
        exponents: int32 [rows, cols / 32], of the scales.
    """
    used = weight.unflatten(1, (-1, MX_BLOCK)).ne(0).any(-1)
    found = exponents[used]
    return int(found.max()) if found.numel() else None


def cast_rows(weight: Tensor, exponents: Tensor, exponent: int) -> CastRows:
    """MXFP4 rows as NVFP4 under a power of two for their global scale. The codes stay as they are where E4M3 has the
    scale of a block, which it does from 2^-9 to 2^8.

    Below, the scale becomes 2^-9, and the codes the nearest under it.

    Args:
        weight: [rows, cols], the decoded values, exact, in any float dtype.
        exponents: int32 [rows, cols / 32], of the scales, on the same device.
        exponent: of the global scale as a multiplier. A block scale is 2^(its exponent - this).
    Source: docs/formats.md, section "MXFP4 becomes NVFP4".
    """
    import torch

    from .e2m1 import decode_e2m1, encode_e2m1, pack_codes

    wanted = exponents.repeat_interleave(MX_BLOCK // BLOCK, dim=1) - exponent
    kept = wanted.clamp(SMALLEST_CAST, LARGEST_CAST)
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    power = -(kept + exponent)  # in two steps, because 2^power alone may exceed float32
    half = power >> 1
    scaled = blocks * powers_of_two(half).unsqueeze(-1) * powers_of_two(power - half).unsqueeze(-1)
    codes = encode_e2m1(scaled)
    is_zero = blocks.eq(0).all(-1)
    moved = (wanted < SMALLEST_CAST) & ~is_zero
    exact = decode_e2m1(codes).eq(scaled).all(-1)
    scales = powers_of_two(kept).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = scales.masked_fill(is_zero, ZERO_BLOCK_BYTE).view(torch.float8_e4m3fn)
    return CastRows(pack_codes(codes.flatten(1)), scales, int((moved & exact).sum()), int((moved & ~exact).sum()))
