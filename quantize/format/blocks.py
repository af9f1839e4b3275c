"""Quantize a matrix to NVFP4 and back.

The reference in PyTorch below runs on every device. kernels.py has faster code for the same bytes. The reference
works on strips of rows that fit the processor's cache, turned so that the 16 elements of a block lie in 16 long
vectors. Every step is then one vector operation over many blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, ShapeError
from .constants import BLOCK
from .e2m1 import decode_e2m1, encode_e2m1, unpack_codes
from .native import amax_on_cpu, has_native
from .scales import block_scale_bytes, decode_e4m3

_STRIP_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class BlockQuantized:
    """One NVFP4 matrix without its global scale.

    Attributes:
        packed: uint8 [rows, cols / 2], two E2M1 codes a byte, the even column in the low nibble.
        scales: float8_e4m3fn [rows, cols / 16], row-major, not swizzled.
    """

    packed: Tensor
    scales: Tensor


ChooseScales = Callable[[Tensor, int], Tensor]
"""Chooses block scales for a strip: ([16, n] float32 elements, index of the strip's first block) to uint8 E4M3
bytes [n]."""


def check_blocks(weight: Tensor, name: str = "the matrix") -> None:
    """Refuse a tensor that does not divide into blocks of 16 along the last axis.

    Raises:
        ShapeError: not a matrix, or its columns are not a multiple of 16.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ShapeError(name, tuple(weight.shape))


def weight_amax(weight: Tensor, name: str = "the matrix") -> Tensor:
    """The largest magnitude of a matrix as a float32 scalar on its device.

    Raises:
        NonFiniteError: a NaN or an infinity in the matrix. The error has the first row and column.
    """
    if weight.is_meta or weight.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=weight.device)
    if has_native(weight) and weight.is_contiguous():
        amax = amax_on_cpu(weight)
    else:
        low, high = torch.aminmax(weight)  # NaN wins in both
        amax = torch.maximum(-low, high).float()
    if not bool(torch.isfinite(amax)):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise NonFiniteError(name, row, column)
    return amax


def quantize_blocks(weight: Tensor, scale: Tensor, choose: ChooseScales | None = None) -> BlockQuantized:
    """Quantize a matrix to E2M1 codes with one E4M3 scale for every 16 columns.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32, any device (meta gives meta); cols divisible by 16; finite.
        scale: float32 scalar, the global scale (divisor) of the matrix or of its fused group.
        choose: chooses block scales, by default round-to-nearest (`block_scale_bytes`).
    Returns:
        codes and block scales: s = e4m3(scale * (amax / 6)), code = e2m1(x / (s / scale)), each step rounded to
            float32.
    Raises:
        ShapeError: cols not divisible by 16.
    Source: docs/formats.md, section "Block scales". A test checks it against tests/data/reference_vectors.json.
    """
    check_blocks(weight)
    rows, cols = weight.shape
    packed = torch.empty((rows, cols // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, cols // BLOCK), dtype=torch.uint8, device=weight.device)
    if not weight.is_meta:
        scale = scale.to(weight.device)
        for begin, end in _strips(rows, cols, weight.device.type):
            turned = weight[begin:end].reshape(-1, BLOCK).t()
            # A copy even of float32, which `to` would hand back as it is: the division below is in place.
            blocks = torch.empty(turned.shape, dtype=torch.float32, device=weight.device).copy_(turned)
            if choose is None:
                chosen = block_scale_bytes(blocks.abs().amax(0), scale)
            else:
                chosen = choose(blocks, begin * (cols // BLOCK))
            codes = encode_e2m1(blocks.div_(decode_e4m3(chosen).div_(scale)))
            pairs = codes[0::2].bitwise_or_(codes[1::2] << 4)
            packed[begin:end] = pairs.t().reshape(end - begin, -1)
            scales[begin:end] = chosen.view(end - begin, -1)
    return BlockQuantized(packed, scales.view(torch.float8_e4m3fn))


def dequantize_blocks(packed: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that a checkpoint stores: code * (block scale / global scale).

    Args:
        packed: uint8 [rows, cols / 2].
        scales: float8_e4m3fn or uint8 [rows, cols / 16].
        scale: float32 scalar, the global scale (divisor).
        dtype: of the result. Arithmetic is float32.
    Returns:
        [rows, cols] in `dtype`, on the device of `packed`.
    """
    rows, cols = packed.shape[0], packed.shape[1] * 2
    matrix = torch.empty((rows, cols), dtype=dtype, device=packed.device)
    scale = scale.to(packed.device)
    for begin, end in _strips(rows, cols, packed.device.type):
        values = decode_e2m1(unpack_codes(packed[begin:end])).view(end - begin, -1, BLOCK)
        step = decode_e4m3(scales[begin:end]) / scale
        matrix[begin:end] = values.mul_(step.unsqueeze(-1)).flatten(1)
    return matrix


def _strips(rows: int, cols: int, device: str) -> Iterator[tuple[int, int]]:
    """Ranges of at least one row whose elements fit the cache."""
    height = max(1, _STRIP_ELEMENTS.get(device, 1 << 24) // max(1, cols))
    for begin in range(0, rows, height):
        yield begin, min(rows, begin + height)
