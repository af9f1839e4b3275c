"""The GPU's kernels against the reference in PyTorch: the same bytes for every kind of matrix. The CPU's are tested in
test_native.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nvquant.errors import ShapeError
from nvquant.format.blocks import BlockQuantized, quantize_blocks, weight_amax
from nvquant.format.kernels import has_kernel, quantize_on_gpu, quantize_with_kernel
from nvquant.format.native import has_native
from nvquant.format.scales import global_scale
from nvquant.quantizers.mse import CLAIM, block_importance, sweep_blocks, sweep_scales
from nvquant.quantizers.rtn import round_blocks
from torch import Tensor

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
NAMES = ["ordinary", "wide range", "zeros", "minus zero", "subnormal scales", "large", "one block", "odd size", "ties"]
CASES = [(name, dtype) for name in NAMES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.float16) for name in NAMES if name not in ("large", "wide range")]  # beyond its range


def matrix(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    weight = 0.02 * torch.randn(64, 256, generator=generator)
    if name == "wide range":
        return weight * torch.logspace(-6, 4, 64)[:, None]
    if name == "zeros":
        weight[::3] = 0
        return weight
    if name == "minus zero":
        return torch.where(weight > 0, weight, -0.0)
    if name == "subnormal scales":
        weight[0, 0] = 1e4
        return weight
    if name == "large":
        return weight * 1e36
    if name == "one block":
        return weight[:1, :16]
    if name == "odd size":
        return weight[:37, :208]
    if name == "ties":
        return torch.randint(-24, 25, (64, 256), generator=generator) / 4.0
    return weight


def assert_same(found: BlockQuantized, wanted: BlockQuantized) -> None:
    assert torch.equal(found.scales.cpu().view(torch.uint8), wanted.scales.view(torch.uint8))
    assert torch.equal(found.packed.cpu(), wanted.packed)


@pytest.mark.parametrize(("name", "dtype"), [pytest.param(*case, marks=gpu) for case in CASES])
def test_rounding_to_nearest_gives_the_bytes_of_the_reference(name: str, dtype: torch.dtype) -> None:
    weight = matrix(name).to(dtype)
    scale = global_scale(weight_amax(weight))
    assert_same(quantize_on_gpu(weight.cuda(), scale), quantize_blocks(weight, scale))
    assert_same(round_blocks(weight.cuda(), scale), quantize_blocks(weight, scale))


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in NAMES])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_the_sweep_gives_the_bytes_of_the_reference(name: str, weighted: bool) -> None:
    weight = matrix(name)
    scale = global_scale(weight_amax(weight), CLAIM.headroom)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(weight.shape[1], generator=generator, dtype=torch.float64)
    mean_square = noise.exp() if weighted else None
    importance = block_importance(weight.shape[1], mean_square)
    wanted = quantize_blocks(weight, scale, lambda blocks, _: sweep_scales(blocks, scale, importance))
    assert_same(sweep_blocks(weight.cuda(), scale, mean_square), wanted)


@pytest.mark.parametrize("name", [pytest.param("ordinary", marks=gpu)])
def test_a_strided_matrix_is_read_by_its_strides(name: str) -> None:
    weight = matrix(name)
    scale = global_scale(weight_amax(weight))
    assert_same(quantize_on_gpu(weight.cuda().t().contiguous().t(), scale), quantize_blocks(weight, scale))


def test_matrices_without_elements_or_data_have_no_kernel() -> None:
    assert not has_kernel(torch.zeros(4, 16, device="meta"))
    assert not has_kernel(torch.zeros(0, 16))


def test_on_the_cpu_there_is_a_kernel_where_the_extension_was_built() -> None:
    weight = matrix("ordinary")
    assert has_kernel(weight) == has_native(weight)


@pytest.mark.parametrize("quantize", [quantize_on_gpu, quantize_with_kernel])
def test_columns_that_are_no_whole_blocks_are_refused_before_anything_is_loaded(
    quantize: Callable[[Tensor, Tensor], BlockQuantized],
) -> None:
    with pytest.raises(ShapeError):
        quantize(torch.zeros(4, 24), torch.tensor(1.0))
