"""Gathering statistics of inputs in one pass: the reference in PyTorch gives the bits of its definition, and every
kernel those of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvquant.calibrate.statistics.ranges import gather, sums_of_squares
from nvquant.format.kernels import gather_with_kernel
from nvquant.format.native import TARGETS, gather_on_cpu
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(TARGETS == 0, reason="nvquant was installed without a C compiler")
SHAPES = [(1, 1, 16), (2, 63, 48), (3, 64, 512), (1, 65, 576), (2, 130, 528), (1, 40, 5376)]


def squares_in_numpy(sequence: Tensor) -> np.ndarray:
    """The definition: float32 within chunks of 64 tokens, float64 over them, always one after the other."""
    total = np.zeros(sequence.shape[-1])
    rows = sequence.float().numpy()
    for begin in range(0, len(rows), 64):
        sums = np.zeros(rows.shape[1], dtype=np.float32)
        for row in rows[begin : begin + 64]:
            sums = sums + row * row
        total = total + sums.astype(np.float64)
    return total


def wide(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """[sequences, tokens, cols]: magnitudes over many powers of two, some blocks zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    values *= torch.randn((*shape[:2], 1), generator=generator).mul(2).exp()
    values[:, ::7, :16] = 0
    return values.to(dtype)


def views(inputs: Tensor) -> list[Tensor]:
    """The same values under other strides."""
    return [
        inputs,
        inputs.transpose(0, 1).contiguous().transpose(0, 1),
        inputs.mT.contiguous().mT,
        torch.cat([inputs, inputs], -1)[..., : inputs.shape[-1]],
    ]


def assert_gathers_like_the_reference(inputs: Tensor, wants_squares: bool, **options: int) -> None:
    """The kernel of the device of `inputs` against PyTorch on the CPU, bit for bit."""
    counts, wanted_counts = (torch.zeros(copies, 1 << 15, dtype=torch.int32) for copies in (3, 1))
    counts = counts.to(inputs.device)
    wanted_amax, wanted_squares = gather(inputs.cpu(), wanted_counts, wants_squares)
    if options:
        amax, squares = gather_on_cpu(inputs, counts, wants_squares, **options)
    else:
        amax, squares = gather_with_kernel(inputs, counts, wants_squares)
    assert torch.equal(amax.cpu(), wanted_amax) and amax.dtype == torch.float32
    assert torch.equal(counts.sum(0).cpu(), wanted_counts.sum(0))
    assert (squares is None) == (wanted_squares is None)
    if squares is not None and wanted_squares is not None:
        assert torch.equal(squares.cpu(), wanted_squares)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_squares_follow_their_definition_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = wide(shape, dtype)
    found = sums_of_squares(inputs)
    assert found.dtype == torch.float64
    for sequence, squares in zip(inputs, found, strict=True):
        np.testing.assert_array_equal(squares.numpy(), squares_in_numpy(sequence))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_pass_gathers_the_bits_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for view in views(wide(shape, dtype)):
        for target in range(TARGETS):
            assert_gathers_like_the_reference(view, True, target=target)
    assert_gathers_like_the_reference(wide(shape, dtype), False, target=0)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compiled_pass_reads_every_finite_16_bit_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    assert_gathers_like_the_reference(finite[:, None].expand(-1, 16)[None], True)
    assert_gathers_like_the_reference(finite[: len(finite) // 512 * 512].view(1, -1, 512), False)


@compiled
def test_the_compiled_pass_rounds_block_amaxes_to_nearest_even() -> None:
    # Float32 numbers on, just under and just over the middle between two BF16 numbers, and the largest, which rounds up
    # to infinity.
    middles = torch.arange(0, 0x7F80, 3, dtype=torch.int32).mul(1 << 16).add(1 << 15)
    patterns = torch.cat([middles - 1, middles, middles + 1, torch.tensor([0x7F7FFFFF], dtype=torch.int32)])
    assert_gathers_like_the_reference(patterns.view(torch.float32)[None, :, None].expand(-1, -1, 16), False)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before, inputs = torch.get_num_threads(), [wide(shape, torch.float32) for shape in ((1, 700, 2064), (4, 300, 1536))]
    wanted = [(torch.zeros(1, 1 << 15, dtype=torch.int32), sums_of_squares(tensor)) for tensor in inputs]
    for tensor, (counts, _) in zip(inputs, wanted, strict=True):
        gather(tensor, counts, False)
    torch.set_num_threads(threads)
    try:
        for tensor, (wanted_counts, wanted_squares) in zip(inputs, wanted, strict=True):
            counts = torch.zeros(5, 1 << 15, dtype=torch.int32)
            amax, squares = gather_on_cpu(tensor, counts, True)
            assert squares is not None and torch.equal(squares, wanted_squares)
            assert torch.equal(counts.sum(0), wanted_counts[0])
            assert amax == tensor.abs().max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("wants_squares", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_gathers_the_bits_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, wants_squares: bool
) -> None:
    for view in views(wide(shape, dtype).cuda()):
        assert_gathers_like_the_reference(view, wants_squares)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_reference_gathers_the_same_bits_on_the_gpu() -> None:
    inputs = wide((2, 130, 528), torch.bfloat16)
    counts, there = torch.zeros(1, 1 << 15, dtype=torch.int32), torch.zeros(1, 1 << 15, dtype=torch.int32).cuda()
    wanted, found = gather(inputs, counts, True), gather(inputs.cuda(), there, True)
    assert wanted[1] is not None and found[1] is not None
    assert torch.equal(found[0].cpu(), wanted[0]) and torch.equal(found[1].cpu(), wanted[1])
    assert torch.equal(there.cpu(), counts)
