"""The GPU's way to quantize: one pass over the matrix, everything in registers; bytes equal the PyTorch reference's.
operation by operation.

Division is IEEE (`div_rn`) and multiply-add is not fused, as in the reference. A program handles a run of blocks;
codes are rounded with the same one-addition trick as in e2m1.py and scales.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockQuantized, check_blocks
from .constants import BLOCK

BLOCKS_PER_PROGRAM = 32  # with two warps the fastest on an H200, for rtn and for the sweep


def quantize_on_gpu(
    weight: Tensor,
    scale: Tensor,
    importance: Tensor | None = None,
    candidates: tuple[float, float, int, int] | None = None,
) -> BlockQuantized:
    """Quantize a matrix on its GPU.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32, on a GPU; cols divisible by 16; finite.
        scale: float32 scalar, the global scale (divisor).
        importance: float32 [16, cols / 16], weights of squared errors; None for ones.
        candidates: (lowest, highest, first offset, last offset) of a sweep over E4M3 scales near amax / 6; None rounds
            to nearest.
    Returns:
        what `blocks.quantize_blocks` gives, bit for bit.
    Raises:
        ShapeError: cols not divisible by 16.
    """
    check_blocks(weight)
    rows, cols = weight.shape
    weight = weight.contiguous()
    packed = torch.empty((rows, cols // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, cols // BLOCK), dtype=torch.uint8, device=weight.device)
    blocks = rows * (cols // BLOCK)
    lowest, highest, first, last = candidates or (0.0, 0.0, 0, -1)
    by_column = torch.ones(1, device=weight.device) if importance is None else importance.t().contiguous()
    with torch.cuda.device(weight.device) if weight.is_cuda else torch.no_grad():
        _load_kernel()[(-(-blocks // BLOCKS_PER_PROGRAM),)](
            weight, scale.reshape(1).to(weight.device, torch.float32), by_column, packed, scales, blocks, cols // BLOCK,
            lowest, highest, first, last + 1,
            IS_SWEEP=candidates is not None, IS_WEIGHTED=importance is not None, N=BLOCKS_PER_PROGRAM,
            enable_fp_fusion=False, num_warps=2,
        )  # fmt: skip
    return BlockQuantized(packed, scales.view(torch.float8_e4m3fn))


def has_kernel(weight: Tensor) -> bool:
    """Whether `quantize_on_gpu` can take a matrix: it is on a GPU, and Triton, which CUDA builds of torch bring
    along, is there."""
    return weight.is_cuda and weight.numel() > 0 and importlib.util.find_spec("triton") is not None


def _load_kernel() -> Any:
    from .triton_kernels import quantize_kernel

    return quantize_kernel
