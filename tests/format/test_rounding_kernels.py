"""The kernels that round inputs and that round with error feedback, against the reference in PyTorch: the same bytes on
every processor and on a GPU."""

from __future__ import annotations

import pytest
import torch
from nvquant.format.activations import quantize_dequantize, round_in_torch
from nvquant.format.kernels import FedBack, feed_back_on_gpu, round_on_gpu
from nvquant.format.native import TARGETS, feed_back_on_cpu, round_on_cpu
from nvquant.format.scales import global_scale
from nvquant.quantizers.error_feedback import OFFSETS, InverseFactor, round_block_in_torch
from torch import Tensor

NAMES = ("plain", "avx2", "avx512")
PLACES = [
    pytest.param(name, marks=pytest.mark.skipif(at >= TARGETS, reason=f"no compiled kernels, or no {name}"))
    for at, name in enumerate(NAMES)
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
places = pytest.mark.parametrize("place", [*PLACES, pytest.param("gpu", marks=gpu)])
KINDS = ["ordinary", "wide range", "zeros", "below every scale", "clipped", "ties", "odd size"]


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs, and their global scale."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    values = torch.randn(3, 40, 208, generator=generator)
    if kind == "wide range":
        values *= torch.exp2(torch.randint(-14, 6, (3, 40, 1), generator=generator).float())
    if kind == "zeros":
        values[:, ::3, :64] = 0
        values[:, ::3, 64:80] = -0.0
    if kind == "below every scale":
        values[:, 1::2] *= 2.0**-13
    if kind == "ties":
        values = torch.randint(-24, 25, values.shape, generator=generator) / 4.0
    if kind == "odd size":
        values = values[0, :37, :48]
    values = values.to(dtype)
    room = 0.3 if kind == "clipped" else 4.0
    return values, global_scale(room * values.float().abs().amax())


@places
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_rounded_to_the_values_of_the_reference(kind: str, dtype: torch.dtype, place: str) -> None:
    values, scale = inputs(kind, dtype)
    wanted = round_in_torch(values, scale)
    if place == "gpu":
        found = round_on_gpu(values.cuda(), scale, torch.float32).cpu()
        assert torch.equal(round_on_gpu(values.cuda(), scale, dtype).cpu(), wanted.to(dtype))
    else:
        found = round_on_cpu(values, scale, NAMES.index(place))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_inputs_with_strides_are_rounded_as_they_read() -> None:
    values, scale = inputs("ordinary", torch.float32)
    turned = values.transpose(0, 1)
    assert torch.equal(quantize_dequantize(turned, scale), round_in_torch(turned.contiguous(), scale))


def block(rows: int, kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block of 16 columns, its part of U, and the global scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, rows, generator=generator)
    if kind == "zeros":
        weight[:, ::3] = 0
    if kind == "wide range":
        weight *= torch.exp2(torch.randint(-18, 1, (1, rows), generator=generator).float())
    mixed = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    upper = InverseFactor(mixed.t() @ mixed / 64, 0.03, torch.arange(mixed.shape[1])).rows(0, mixed.shape[1])
    amax = weight.abs().amax() / (64 if kind == "outgrown" else 1)
    return weight, upper, global_scale(amax, 2.0)


@places
@pytest.mark.parametrize("kind", ["ordinary", "zeros", "wide range", "outgrown"])
@pytest.mark.parametrize("rows", [1, 16, 37, 600])
def test_a_block_is_rounded_with_feedback_as_the_reference_rounds_it(rows: int, kind: str, place: str) -> None:
    weight, upper, scale = block(rows, kind, rows)
    wanted = round_block_in_torch(weight, upper, scale)
    found = FedBack.empty(rows, torch.device("cuda" if place == "gpu" else "cpu"))
    for turned in (upper, upper.t().contiguous().t()):
        if place == "gpu":
            feed_back_on_gpu(weight.cuda(), turned.cuda(), scale, OFFSETS, found)
        else:
            feed_back_on_cpu(weight, turned, scale, OFFSETS, found, NAMES.index(place))
    assert int(found.outgrown) == 2 * int(wanted.outgrown)
    assert (int(found.outgrown) > 0) == (kind == "outgrown")
    assert torch.equal(found.scales.cpu(), wanted.scales)
    assert torch.equal(found.codes.cpu(), wanted.codes)
    assert torch.equal(found.errors.cpu().view(torch.int32), wanted.errors.view(torch.int32))
