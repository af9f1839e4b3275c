"""The two levels of NVFP4 scales: one float32 global scale a fused group, one E4M3 block scale for every 16 columns.

A stored global scale is a divisor in the compressed-tensors layout (2688 / amax) and a multiplier in modelopt's (amax
/ 2688), where 2688 = 448 * 6. nvquant uses the divisor internally. Arithmetic is float32 in compressed-tensors'
order of operations.
Source: docs/formats.md, section "Block scales".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import E2M1_MAX, E4M3_MAX, E4M3_MIN, SCALE_RANGE, ZERO_BLOCK_BYTE

_SMALLEST_NORMAL = (127 - 6) << 23  # float32 bits of 2^-6, where E4M3's subnormals begin
_EXPONENT = 0x7F800000
_MAGIC = (20 << 23) + (1 << 22)  # added to the bits of p it gives the bits of 1.5 * 2^20 * p


def global_scale(amax: Tensor, headroom: float = 1.0) -> Tensor:
    """The global scale (a divisor) for a matrix or a fused group whose largest magnitude is `amax`.

    Args:
        amax: float32 scalar, not negative, finite: over the union of a fused group's matrices, or of its inputs.
        headroom: factor by which block scales may exceed amax / 6. A power of two changes no rounding (2 for the mse
            quantizer).
    Returns:
        float32 scalar 2688 / headroom * (1 / amax), in that order, or 1.0 if that is not finite (an all-zero matrix).
    """
    scale = (1.0 / amax.float()) * (SCALE_RANGE / headroom)
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def encode_e4m3(values: Tensor) -> Tensor:
    """Bytes of the nearest E4M3 values, ties to even.

    Args:
        values: float32, any shape, in [0, 448].
    Returns:
        uint8, the same shape, 0x00 to 0x7E, never NaN.
    """
    power = values.view(torch.int32).bitwise_and(_EXPONENT).clamp_(min=_SMALLEST_NORMAL)
    magic = power + _MAGIC
    eighths = (values + magic.view(torch.float32)).view(torch.int32).sub_(magic)
    return power.sub_(_SMALLEST_NORMAL).bitwise_right_shift_(20).add_(eighths).to(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Values of E4M3 bytes: uint8 or float8_e4m3fn, any shape, to float32. 0x7F and 0xFF are NaN."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def sixth(block_amax: Tensor) -> Tensor:
    """amax / 6 by a true division. For a plain Python number CUDA would multiply by the rounded reciprocal instead."""
    return block_amax / torch.full((), E2M1_MAX, dtype=torch.float32, device=block_amax.device)


def block_scale_bytes(block_amax: Tensor, scale: Tensor) -> Tensor:
    """Round-to-nearest block scales: the E4M3 bytes of clamp(global scale * (amax / 6)).

    Args:
        block_amax: float32, any shape: the largest magnitude of each block of 16.
        scale: float32 scalar, the global scale (divisor).
    Returns:
        uint8 E4M3 bytes, the same shape: clamped to [2^-9, 448] for non-zero blocks (so that no block is lost to
        underflow), 0x20 for zero blocks.
    """
    wanted = sixth(block_amax).mul_(scale).clamp_(E4M3_MIN, E4M3_MAX)
    codes = encode_e4m3(wanted)
    return codes.masked_fill_(block_amax == 0, ZERO_BLOCK_BYTE)
