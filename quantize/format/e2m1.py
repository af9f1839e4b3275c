"""E2M1, the 4-bit float of NVFP4: a sign bit, two exponent bits, one mantissa bit. Two codes share a byte, the even
column in the low nibble.

Rounding is to nearest, ties to the even code, saturating at 6, as `cvt.rn.satfinite.e2m1x2` does. It is done with one
float32 addition: adding 1.5 * 2^22 * p to a value in [p, 2p) leaves exactly one mantissa bit of it, and the float32
adder itself rounds to nearest even. The same trick serves every device, so all give the same bytes.
Sources: docs/formats.md, section "E2M1", and OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import E2M1_MAX

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_EXPONENT = 0x7F800000
_ONE, _FOUR = 0x3F800000, 0x40800000
_MAGIC = (22 << 23) + (1 << 22)  # added to the bits of p it gives the bits of 1.5 * 2^22 * p


def rounding_magic(magnitude: Tensor, out: Tensor | None = None) -> Tensor:
    """Bits of the float32 number that rounds each magnitude to E2M1 when added to it.

    Args:
        magnitude: float32, any shape, in [0, 6].
        out: int32 buffer of the same shape, to avoid an allocation.
    Returns:
        int32 bits of 1.5 * 2^22 * p, where p is 1, 2 or 4: the power of two under the magnitude, at least 1.
    """
    bits = torch.bitwise_and(magnitude.view(torch.int32), _EXPONENT, out=out)
    return bits.clamp_(_ONE, _FOUR).add_(_MAGIC)


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes 0 to 15 of the nearest E2M1 values.

    Args:
        values: float32, any shape, finite. They saturate beyond 6.
    Returns:
        uint8, the same shape. A negative value that rounds to zero gives code 8 (minus zero).
    """
    magnitude = values.abs().clamp_(max=E2M1_MAX)
    magic = rounding_magic(magnitude)
    steps = magnitude.add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
    # `steps` counts halves of p: codes 0 to 4 for p = 1, two more for each doubling of p.
    codes = steps.add_(magic.sub_(_MAGIC + _ONE).bitwise_right_shift_(22))
    sign = values.contiguous().view(torch.int32).bitwise_right_shift(28).bitwise_and_(8)
    return codes.bitwise_or_(sign).to(torch.uint8)


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 values themselves, from float32 to float32. The sign of zero is kept."""
    magnitude = values.abs().clamp_(max=E2M1_MAX)
    magic = rounding_magic(magnitude).view(torch.float32)
    return torch.copysign(magnitude.add_(magic).sub_(magic), values)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of codes 0 to 15.

    Args:
        codes: uint8, any shape, each below 16.
    Returns:
        float32, the same shape.
    """
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def pack_codes(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low nibble: uint8 [rows, cols] to uint8 [rows, cols / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: uint8 [rows, cols / 2] to uint8 [rows, cols]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
