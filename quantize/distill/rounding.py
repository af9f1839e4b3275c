"""The trained numbers as a checkpoint stores them, with gradients that pass the rounding unchanged.

A block scale s becomes s·e^θ rounded to E4M3, and the factor f of a norm's channel becomes f·(1 + r), stored in the
norm's dtype. Codes and global scales stay. The gradient of a rounded value is taken for that of the value itself
(straight-through: Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..format.blocks import dequantize_blocks
from ..format.constants import BLOCK, E4M3_MAX, E4M3_MIN
from ..format.e2m1 import decode_e2m1, unpack_codes
from ..format.scales import decode_e4m3, encode_e4m3
from ..stream.distillation import MOST_SCALE_CHANGE

_STRIP_ELEMENTS = 1 << 24  # of a decoded matrix, while its gradient is summed


def moved_scales(scales: Tensor, theta: Tensor) -> Tensor:
    """The bytes of s·e^θ.

    Args:
        scales: uint8, E4M3 bytes, any shape.
        theta: float32, the same shape, at most `MOST_SCALE_CHANGE` in magnitude.
    Returns:
        uint8, the same shape: equal bytes where θ is zero, never zero where s is not, and within the factor of
        `MOST_SCALE_CHANGE` even among E4M3's subnormals.
    """
    before = decode_e4m3(scales)
    after = encode_e4m3((before * theta.exp()).clamp_(E4M3_MIN, E4M3_MAX))
    too_low = decode_e4m3(after) * torch.full((), MOST_SCALE_CHANGE, device=before.device).exp() < before
    return torch.where((theta == 0) | (before == 0), scales, after + too_low)


def stored_blocks(theta: Tensor, packed: Tensor, scales: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that a server decodes from codes and moved block scales, with the gradient of θ.

    Args:
        theta: float32 [rows, cols / 16].
        packed: uint8 [rows, cols / 2], E2M1 codes.
        scales: uint8 [rows, cols / 16], E4M3 bytes before the training.
        divisor: float32 scalar, the global scale.
    Returns:
        [rows, cols] in `dtype`.
    """
    matrix: Tensor = _StoredBlocks.apply(theta, packed, scales, divisor, dtype)  # type: ignore[no-untyped-call]
    return matrix


def straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(values)`, of the same shape, with the gradient of the values themselves."""
    result: Tensor = _StraightThrough.apply(values, rounded)  # type: ignore[no-untyped-call]
    return result


class _StoredBlocks(torch.autograd.Function):
    """See `stored_blocks`."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, packed: Tensor, scales: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(theta, packed, scales, divisor)
        return dequantize_blocks(packed, moved_scales(scales, theta), divisor, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of θ: s·e^θ / global scale, times the sum of gradient times code over the block."""
        theta, packed, scales, divisor = ctx.saved_tensors
        (gradient,) = gradients
        rows, cols = gradient.shape
        sums = torch.empty_like(theta)
        height = max(1, _STRIP_ELEMENTS // cols)
        for begin in range(0, rows, height):
            part = slice(begin, min(rows, begin + height))
            codes = decode_e2m1(unpack_codes(packed[part]))
            sums[part] = (codes * gradient[part].float()).view(len(codes), -1, BLOCK).sum(-1)
        return sums * (decode_e4m3(scales) * theta.exp() / divisor), None, None, None, None


class _StraightThrough(torch.autograd.Function):
    """See `straight_through`."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(values)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def moved_norm(weight: Tensor, change: Tensor, adds_one: bool) -> Tensor:
    """A norm's weight with its factor times (1 + r), in the weight's stored dtype.

    Args:
        weight: [channels], as stored.
        change: float32 [channels], r.
        adds_one: whether the factor is 1 + weight, and not the weight.
    Returns:
        float32 [channels], with the gradient of r, values of that dtype. Equal where r is zero.
    """
    before = weight.float()
    factor = before + 1 if adds_one else before
    return straight_through(before + factor * change, lambda values: values.to(weight.dtype).float())
