"""Fast code that quantizes and gathers statistics of inputs, bit-equal to the PyTorch reference: Triton on a GPU
(triton_kernels.py), compiled C on the CPU (native.py).

On both, division is IEEE's, and multiply-add is fused only where the reference fuses it. Codes are rounded with the
same one-addition trick as in e2m1.py and scales.py. On a GPU it is one pass over the matrix, all in registers.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import BlockQuantized, check_blocks
from .constants import BLOCK
from .native import feed_back_on_cpu, gather_on_cpu, has_native, quantize_on_cpu, round_on_cpu

BLOCKS_PER_PROGRAM = 32  # with two warps the fastest on an H200, for rtn and for the sweep
CHUNK = 64  # tokens whose squares are added in float32
COLUMNS_PER_PROGRAM = 256
ROUNDED_BLOCKS = 128  # of a program
FED_BACK_ROWS = 32  # of a program
PRODUCTS_PER_PROGRAM = 1024


def has_kernel(tensor: Tensor) -> bool:
    """Whether there is a kernel for a tensor: it is on the CPU and the extension module was built, or it is on a GPU
    and Triton, which comes with CUDA builds of torch, is installed."""
    return has_native(tensor) or has_triton(tensor)


def quantize_with_kernel(
    weight: Tensor,
    scale: Tensor,
    importance: Tensor | None = None,
    candidates: tuple[float, float, int, int] | None = None,
) -> BlockQuantized:
    """Quantize a matrix that `has_kernel` accepts.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32; cols divisible by 16; finite.
        scale: float32 scalar, the global scale (divisor).
        importance: float32 [16, cols / 16], weights of squared errors; None for ones.
        candidates: (lowest, highest, first offset, last offset) of a sweep over E4M3 scales near amax / 6; None rounds
            to nearest.
    Returns:
        the result of `blocks.quantize_blocks`, bit for bit.
    Raises:
        ShapeError: cols not divisible by 16.
    """
    if not has_native(weight):
        return quantize_on_gpu(weight, scale, importance, candidates)
    check_blocks(weight)
    packed, scales = quantize_on_cpu(weight, scale, importance, candidates)
    return BlockQuantized(packed, scales.view(torch.float8_e4m3fn))


def quantize_on_gpu(
    weight: Tensor,
    scale: Tensor,
    importance: Tensor | None = None,
    candidates: tuple[float, float, int, int] | None = None,
) -> BlockQuantized:
    """`quantize_with_kernel` for a matrix on a GPU."""
    check_blocks(weight)
    rows, cols = weight.shape
    weight = weight.contiguous()
    packed = torch.empty((rows, cols // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, cols // BLOCK), dtype=torch.uint8, device=weight.device)
    blocks = rows * (cols // BLOCK)
    lowest, highest, first, last = candidates or (0.0, 0.0, 0, -1)
    by_column = torch.ones(1, device=weight.device) if importance is None else importance.t().contiguous()
    with torch.cuda.device(weight.device) if weight.is_cuda else torch.no_grad():
        _load("quantize_kernel")[(-(-blocks // BLOCKS_PER_PROGRAM),)](
            weight, scale.reshape(1).to(weight.device, torch.float32), by_column, packed, scales, blocks, cols // BLOCK,
            lowest, highest, first, last + 1,
            IS_SWEEP=candidates is not None, IS_WEIGHTED=importance is not None, N=BLOCKS_PER_PROGRAM,
            enable_fp_fusion=False, num_warps=2,
        )  # fmt: skip
    return BlockQuantized(packed, scales.view(torch.float8_e4m3fn))


def gather_with_kernel(inputs: Tensor, histogram: Tensor, wants_squares: bool) -> tuple[Tensor, Tensor | None]:
    """Statistics of inputs that `has_kernel` accepts, in one pass and without waiting for a GPU. They equal
    those of `calibrate.statistics.ranges.gather` bit for bit.

    Args:
        inputs: [sequences, tokens, cols], bfloat16, float16 or float32, any strides; cols divisible by 16.
        histogram: int32 [copies, 32768], contiguous. Each count goes into any of its copies.
        wants_squares: whether to compute sums of squares.
    Returns:
        the largest magnitude, float32 scalar, and the sums of squares, float64 [sequences, cols], or None.
    """
    if has_native(inputs):
        return gather_on_cpu(inputs, histogram, wants_squares)
    return gather_on_gpu(inputs, histogram, wants_squares)


def gather_on_gpu(inputs: Tensor, histogram: Tensor, wants_squares: bool) -> tuple[Tensor, Tensor | None]:
    """`gather_with_kernel` for inputs on a GPU."""
    if inputs.stride(-1) != 1:
        inputs = inputs.contiguous()
    sequences, tokens, cols = inputs.shape
    chunks, column_groups = -(-tokens // CHUNK), -(-cols // COLUMNS_PER_PROGRAM)
    device = inputs.device
    largest = torch.empty((sequences, chunks, column_groups), dtype=torch.int32, device=device)
    sums = torch.empty((sequences, chunks, cols) if wants_squares else 1, dtype=torch.float32, device=device)
    squares = torch.empty((sequences, cols), dtype=torch.float64, device=device) if wants_squares else None
    with torch.cuda.device(device) if inputs.is_cuda else torch.no_grad():
        _load("gather_kernel")[(column_groups, chunks, sequences)](
            inputs, inputs.stride(0), inputs.stride(1), tokens, cols, largest, sums, histogram, len(histogram),
            WANTS_SQUARES=wants_squares, CHUNK=CHUNK, N=COLUMNS_PER_PROGRAM, PATTERNS=histogram.shape[1],
            enable_fp_fusion=False, num_warps=2,
        )  # fmt: skip
        if squares is not None:
            _load("add_chunks_kernel")[(column_groups, sequences)](
                sums, squares, chunks, cols, N=COLUMNS_PER_PROGRAM, enable_fp_fusion=False, num_warps=2
            )
    return largest.amax().view(torch.float32), squares


def round_with_kernel(inputs: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs, which `has_kernel` accepts, as a server rounds them: `activations.quantize_dequantize`, bit for bit."""
    return round_on_cpu(inputs, scale).to(dtype) if has_native(inputs) else round_on_gpu(inputs, scale, dtype)


def round_on_gpu(inputs: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_with_kernel` for inputs on a GPU."""
    inputs = inputs.contiguous()
    rounded = torch.empty(inputs.shape, dtype=dtype, device=inputs.device)
    blocks = inputs.numel() // BLOCK
    with torch.cuda.device(inputs.device) if inputs.is_cuda else torch.no_grad():
        _load("round_kernel")[(-(-blocks // ROUNDED_BLOCKS),)](
            inputs, scale.reshape(1).to(inputs.device, torch.float32), rounded, blocks, N=ROUNDED_BLOCKS,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    return rounded


class FedBack(NamedTuple):
    """A block of 16 columns of all rows, rounded with error feedback.

    Attributes:
        codes: uint8 [16, rows], E2M1 codes.
        scales: uint8 [rows], E4M3 bytes.
        errors: float32 [16, rows], each divided by the diagonal of U.
        outgrown: int32 scalar, the number of rows whose largest magnitude outgrew the largest block scale.
    """

    codes: Tensor
    scales: Tensor
    errors: Tensor
    outgrown: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> FedBack:
        """Tensors that a block can be written into. Nothing is outgrown yet."""
        codes, scales = (torch.empty(shape, dtype=torch.uint8, device=device) for shape in ((BLOCK, rows), (rows,)))
        errors = torch.empty((BLOCK, rows), device=device)
        return cls(codes, scales, errors, torch.zeros((), dtype=torch.int32, device=device))


def feed_back_with_kernel(block: Tensor, upper: Tensor, scale: Tensor, offsets: range, into: FedBack) -> None:
    """Round a block, which `has_kernel` accepts, column after column under the best of several scales:
    `quantizers.error_feedback.round_block_in_torch`, bit for bit.

    Args:
        block: float32 [16, rows], contiguous.
        upper: float32 [16, 16], upper triangular, any strides.
        scale: float32 scalar, the global scale (divisor).
        offsets: neighbouring distances of the candidates' bytes from that of amax / 6.
        into: contiguous tensors for the result. `outgrown` is added to.
    """
    chosen = feed_back_on_cpu if has_native(block) else feed_back_on_gpu
    chosen(block, upper, scale, offsets, into)


def feed_back_on_gpu(block: Tensor, upper: Tensor, scale: Tensor, offsets: range, into: FedBack) -> None:
    """`feed_back_with_kernel` for a block on a GPU."""
    rows, device = block.shape[1], block.device
    with torch.cuda.device(device) if block.is_cuda else torch.no_grad():
        _load("feed_back_kernel")[(-(-rows // FED_BACK_ROWS),)](
            block, rows, upper, upper.stride(0), upper.stride(1), scale.reshape(1).to(device, torch.float32),
            offsets[0], offsets[-1] + 1, into.codes, into.scales, into.errors, into.outgrown, N=FED_BACK_ROWS,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip


def add_products_on_gpu(products: Tensor, sums: Tensor, peak: Tensor, fraction_bits: int) -> None:
    """Add products to sums in fixed point: `calibrate.statistics.moments.add_products`, bit for bit.

    Args:
        products: float32, contiguous.
        sums: int64 of the same shape, contiguous. They change in place.
        peak: float32 scalar, which changes in place.
        fraction_bits: of the sums.
    """
    with torch.cuda.device(products.device) if products.is_cuda else torch.no_grad():
        _load("add_products_kernel")[(-(-products.numel() // PRODUCTS_PER_PROGRAM),)](
            products, sums, products.numel(), peak.view(torch.int32), FRACTION_BITS=fraction_bits,
            N=PRODUCTS_PER_PROGRAM, enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip


def has_triton(tensor: Tensor) -> bool:
    """Whether there is a Triton kernel for a tensor, see `has_kernel`."""
    return tensor.is_cuda and tensor.numel() > 0 and importlib.util.find_spec("triton") is not None


def _load(kernel: str) -> Any:
    from . import triton_kernels

    return getattr(triton_kernels, kernel)
