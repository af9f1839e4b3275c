"""The CPU's compiled kernels (native.c): one pass over the data, vector instructions, every core. Results equal the
PyTorch reference's bit for bit.

The extension module is built at installation if there is a C compiler. Without it `has_native` returns False, and the
reference does the work. Threads share a matrix in runs whose borders change no number.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constants import BLOCK

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in native.c
_LANES = 16
_STRIP = 512  # columns whose statistics native.c takes at once, at most
# Elements below which another thread costs more than it saves.
_QUANTIZED, _SCANNED, _GATHERED, _ROUNDED, _FED_BACK = 1 << 17, 1 << 20, 1 << 19, 1 << 18, 1 << 13

_module: Any = None
with suppress(ImportError):
    _module = importlib.import_module("._native", __package__)
TARGETS = 0 if _module is None else int(_module.targets())
"""Number of instruction sets that this processor has code for; the last is the fastest."""


def has_native(tensor: Tensor) -> bool:
    """Whether the compiled kernels exist and accept a tensor: on the CPU, of a supported dtype, not empty."""
    return TARGETS > 0 and tensor.device.type == "cpu" and tensor.dtype in _DTYPES and tensor.numel() > 0


def quantize_on_cpu(
    weight: Tensor,
    scale: Tensor,
    importance: Tensor | None = None,
    candidates: tuple[float, float, int, int] | None = None,
    target: int = -1,
) -> tuple[Tensor, Tensor]:
    """Codes and block scales of a matrix.

    Args:
        weight: [rows, cols], a tensor that `has_native` accepts; cols divisible by 16; finite.
        scale: float32 scalar, the global scale (divisor).
        importance: float32 [16, cols / 16], weights of squared errors; None for ones.
        candidates: (lowest, highest, first offset, last offset) of a sweep over E4M3 scales near amax / 6; None rounds
            to nearest.
        target: which instruction set, counted as in `TARGETS`.
    Returns:
        packed uint8 [rows, cols / 2] and E4M3 bytes uint8 [rows, cols / 16], as `blocks.quantize_blocks` chooses them.
    """
    rows, cols = weight.shape
    weight = weight.contiguous()
    packed = torch.empty((rows, cols // 2), dtype=torch.uint8)
    scales = torch.empty((rows, cols // BLOCK), dtype=torch.uint8)
    in_row = cols // BLOCK
    lowest, highest, first, last = candidates or (0.0, 0.0, 0, -1)
    weights = torch.empty(0)
    if importance is not None:
        # A tile of 16 blocks may begin anywhere in a row: it finds its blocks' weights side by side.
        weights = importance.float()[:, torch.arange(in_row + _LANES) % in_row].contiguous()
    runs = _Runs(rows * in_row, _LANES, _QUANTIZED // BLOCK)

    def work(_worker: int, run: int) -> None:
        begin, count = runs[run]
        _module.quantize(
            target % TARGETS, weight.data_ptr(), _DTYPES[weight.dtype], begin, count, in_row, float(scale),
            candidates is not None, lowest, highest, first, last,
            weights.data_ptr() if weights.numel() else 0, in_row + _LANES, packed.data_ptr(), scales.data_ptr(),
        )  # fmt: skip

    _share(len(runs), work)
    return packed, scales


class Compared(NamedTuple):
    """A comparison of stored blocks with their weights.

    Attributes:
        error, energy, product: sums of (stored - weight)^2, weight^2 and stored * weight, in float32 for each block.
        amax: the largest magnitude of the weights.
        poor_blocks: blocks beyond the limits.
        unsettled_blocks: blocks that differ from the rule in any byte, or contain a value that is not finite or a block
            scale that no quantizer writes. PyTorch then decides whether they are wrong, and the sums do not count.
    """

    error: float
    energy: float
    product: float
    amax: float
    poor_blocks: int
    unsettled_blocks: int


def compare_on_cpu(
    weight: Tensor,
    packed: Tensor,
    scales: Tensor,
    divisor: float,
    bounds: tuple[float, float, float],
    rule: tuple[float, int, int] | None = None,
    target: int = -1,
) -> Compared:
    """Compare stored blocks with their weights, on the calling thread alone.

    Args:
        weight: a contiguous tensor that `has_native` accepts; a multiple of 16 elements.
        packed: uint8, half as many, contiguous.
        scales: uint8 E4M3 bytes, a sixteenth as many, contiguous.
        divisor: the stored global scale.
        bounds: of a block: squared error at most as a share of the energy, gain at least, gain at most.
        rule: the global scale behind block scales and codes, and the least and largest distance of a scale's byte from
            round-to-nearest's. None compares errors alone.
        target: which instruction set, counted as in `TARGETS`.
    """
    made_from, first, last = rule or (1.0, 0, 0)
    return Compared(
        *_module.compare(
            target % TARGETS, weight.data_ptr(), _DTYPES[weight.dtype], weight.numel() // BLOCK, packed.data_ptr(),
            scales.data_ptr(), divisor, made_from, rule is not None, first, last, *bounds,
        )
    )  # fmt: skip


def amax_on_cpu(tensor: Tensor, target: int = -1) -> Tensor:
    """The largest magnitude of a contiguous tensor that `has_native` accepts, as a float32 scalar, or a NaN or an
    infinity if there is one."""
    runs = _Runs(tensor.numel(), 1, _SCANNED)
    found = [0] * len(runs)

    def work(_worker: int, run: int) -> None:
        begin, count = runs[run]
        address = tensor.data_ptr() + begin * tensor.element_size()
        found[run] = _module.largest(target % TARGETS, address, _DTYPES[tensor.dtype], count)

    _share(len(runs), work)
    bits = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return torch.tensor(max(found), dtype=bits).view(tensor.dtype).float()


def gather_on_cpu(
    inputs: Tensor, histogram: Tensor, wants_squares: bool, target: int = -1
) -> tuple[Tensor, Tensor | None]:
    """Statistics of inputs, as `calibrate.statistics.ranges.gather` defines them.

    Args:
        inputs: [sequences, tokens, cols], a tensor that `has_native` accepts; cols divisible by 16.
        histogram: int32 [copies, 32768], contiguous. The number of its copies limits the threads.
        wants_squares: whether to compute sums of squares.
        target: which instruction set, counted as in `TARGETS`.
    """
    if inputs.stride(-1) != 1:
        inputs = inputs.contiguous()
    sequences, tokens, cols = inputs.shape
    size = inputs.element_size()
    threads = min(torch.get_num_threads(), len(histogram), max(1, inputs.numel() // _GATHERED))
    strips = max(-(-cols // _STRIP), min(-(-threads // sequences), cols // 128))
    width = -(-cols // (strips * BLOCK)) * BLOCK
    strips = -(-cols // width)
    squares = torch.zeros((sequences, cols), dtype=torch.float64) if wants_squares else None
    found = [0] * (sequences * strips)

    def work(worker: int, item: int) -> None:
        sequence, begin = item // strips, item % strips * width
        found[item] = _module.gather(
            target % TARGETS, inputs.data_ptr() + (sequence * inputs.stride(0) + begin) * size, _DTYPES[inputs.dtype],
            tokens, inputs.stride(1) * size, min(width, cols - begin),
            0 if squares is None else squares.data_ptr() + (sequence * cols + begin) * squares.element_size(),
            histogram.data_ptr() + worker * histogram.stride(0) * histogram.element_size(),
        )  # fmt: skip

    _share(len(found), work, threads)
    return torch.tensor(max(found), dtype=torch.int32).view(torch.float32), squares


def round_on_cpu(inputs: Tensor, scale: Tensor, target: int = -1) -> Tensor:
    """Inputs as a server rounds them, `activations.quantize_dequantize`.

    Args:
        inputs: [..., cols], a tensor that `has_native` accepts; cols divisible by 16; finite.
        scale: float32 scalar, the input global scale (divisor).
        target: which instruction set, counted as in `TARGETS`.
    Returns:
        float32, the same shape.
    """
    inputs = inputs.contiguous()
    rounded = torch.empty(inputs.shape, dtype=torch.float32)
    runs = _Runs(inputs.numel() // BLOCK, _LANES, _ROUNDED // BLOCK)
    divisor = float(scale)

    def work(_worker: int, run: int) -> None:
        begin, count = runs[run]
        source = inputs.data_ptr() + begin * BLOCK * inputs.element_size()
        _module.round(
            target % TARGETS, source, _DTYPES[inputs.dtype], count, divisor,
            rounded.data_ptr() + begin * BLOCK * rounded.element_size(),
        )  # fmt: skip

    _share(len(runs), work)
    return rounded


def feed_back_on_cpu(
    block: Tensor,
    upper: Tensor,
    scale: Tensor,
    offsets: range,
    into: tuple[Tensor, Tensor, Tensor, Tensor],
    target: int = -1,
) -> None:
    """Round a block column after column under the best of several scales, as `quantizers.error_feedback` defines it.

    Args:
        block: float32 [16, rows], contiguous, on the CPU.
        upper: float32 [16, 16], upper triangular, any strides.
        scale: float32 scalar, the global scale (divisor).
        offsets: neighbouring distances of the candidates' bytes from that of amax / 6.
        into: `FedBack` of contiguous tensors. Its last one is added to.
        target: which instruction set, counted as in `TARGETS`.
    """
    rows, upper = block.shape[1], upper.contiguous()
    codes, scales, errors, total = into
    runs, divisor = _Runs(rows, _LANES, _FED_BACK // BLOCK), float(scale)
    outgrown = [0] * len(runs)

    def work(_worker: int, run: int) -> None:
        begin, count = runs[run]
        outgrown[run] = _module.feed_back(
            target % TARGETS, block.data_ptr() + 4 * begin, count, rows, upper.data_ptr(), divisor, offsets[0],
            offsets[-1], codes.data_ptr() + begin, scales.data_ptr() + begin, errors.data_ptr() + 4 * begin,
        )  # fmt: skip

    _share(len(runs), work)
    total += sum(outgrown)


class _Runs:
    """`total` things cut into runs, each but the last a multiple of `unit` and none much smaller than `least`."""

    def __init__(self, total: int, unit: int, least: int) -> None:
        # A few runs a thread: a core that is busy with something else leaves its share to the others.
        count = max(1, min(total // least, 8 * torch.get_num_threads()))
        self._total = total
        self._length = -(-total // (count * unit)) * unit

    def __len__(self) -> int:
        return -(-self._total // self._length)

    def __getitem__(self, run: int) -> tuple[int, int]:
        begin = run * self._length
        return begin, min(self._length, self._total - begin)


def _share(count: int, work: Callable[[int, int], None], threads: int | None = None) -> None:
    """Call work(worker, item) for every item below `count`, on the calling thread and on others."""
    threads = min(count, threads or torch.get_num_threads())
    items = iter(range(count))

    def drain(worker: int) -> None:
        for item in items:
            work(worker, item)

    others = [_pool().submit(drain, worker) for worker in range(1, threads)]
    try:
        drain(0)
    finally:
        # One that found no thread free has nothing left to do; one at work still reads the caller's tensors.
        running = [other for other in others if not other.cancel()]
        for other in running:
            other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that all calls share. They sleep between calls."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="nvquant-native")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
