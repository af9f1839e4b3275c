"""FP8 against a search over all of its values, and against torch's own arithmetic."""

from __future__ import annotations

import pytest
import torch
from nvquant.format.fp8 import dequantize_rows, fp8_scale, quantize_rows, round_by_token, round_under
from nvquant.format.schemes import FP8, FP8_STATIC
from torch import Tensor

VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FINITE = VALUES[~VALUES.isnan()].unique()  # ascending, both zeros once


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(values: Tensor) -> Tensor:
    """The nearest E4M3 values by a search over all, ties to the even mantissa."""
    distance = (values.double()[..., None] - FINITE.double()).abs()
    least = distance.amin(-1, keepdim=True)
    tied = distance == least
    mantissa = FINITE.to(torch.float8_e4m3fn).view(torch.uint8) & 1
    choice = torch.where(tied & (mantissa == 0), 2, tied.int())
    return FINITE[choice.argmax(-1)]


def test_a_scale_brings_the_largest_magnitude_to_448() -> None:
    assert torch.equal(
        fp8_scale(torch.tensor([448.0, 896.0, 7.0])), torch.tensor([1.0, 2.0, 7.0]) / torch.tensor([1.0, 1.0, 448.0])
    )
    assert fp8_scale(torch.tensor(0.0)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest_values_under_the_scale_of_their_row(dtype: torch.dtype) -> None:
    weight = (noise(24, 64) * torch.logspace(-6, 3, 24)[:, None]).to(dtype)
    scales = fp8_scale(weight.float().abs().amax(1, keepdim=True))
    codes = quantize_rows(weight, scales)
    assert torch.equal(codes.float(), nearest(weight.float() / scales))
    assert torch.equal(codes.float().abs().amax(1), torch.full((24,), 448.0))
    assert torch.equal(dequantize_rows(codes, scales), codes.float() * scales)


def test_codes_under_one_scale_saturate() -> None:
    codes = quantize_rows(torch.tensor([[1000.0, -1000.0, 2.0, -0.0]]), torch.tensor(1.0))
    assert codes.float().tolist() == [[448.0, -448.0, 2.0, -0.0]]


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noise(40, 32)
    scales = fp8_scale(weight.abs().amax(1, keepdim=True))
    whole = quantize_rows(weight, scales)
    monkeypatch.setattr("nvquant.format.fp8._strips", lambda matrix: [slice(at, at + 3) for at in range(0, 40, 3)])
    assert torch.equal(quantize_rows(weight, scales).view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(dequantize_rows(whole, scales), whole.float() * scales)


def test_inputs_are_rounded_under_a_scale_of_each_token() -> None:
    inputs = noise(2, 5, 32) * torch.logspace(-2, 3, 5)[:, None]
    scale = inputs.abs().amax(-1, keepdim=True) / torch.tensor(448.0)
    assert torch.equal(round_by_token(inputs), nearest(inputs / scale) * scale)
    assert torch.equal(round_by_token(torch.zeros(3, 16)), torch.zeros(3, 16))
    tiny = torch.full((1, 16), 1e-9)
    assert torch.equal(round_by_token(tiny), torch.zeros(1, 16))  # the least scale is 1 / (448 * 512)


def test_inputs_are_rounded_and_clipped_under_a_stored_scale() -> None:
    scale = torch.tensor([0.25])
    inputs = torch.tensor([[1.0, 100.0, 200.0, -1e4]])
    assert round_under(inputs, scale).tolist() == [[1.0, 96.0, 112.0, -112.0]]


def test_the_schemes_round_and_decode_with_them() -> None:
    inputs, weight = noise(3, 32), noise(8, 32)
    scales = fp8_scale(weight.abs().amax(1, keepdim=True))
    codes = quantize_rows(weight, scales)
    assert torch.equal(FP8.decode({"codes": codes, "scales": scales}, torch.float32), dequantize_rows(codes, scales))
    assert torch.equal(FP8.round_inputs(inputs, {}), round_by_token(inputs))
    scale = torch.tensor(0.01)
    assert torch.equal(FP8_STATIC.round_inputs(inputs, {"input_scale": scale}), round_under(inputs, scale))
    assert FP8.round_inputs(inputs.bfloat16(), {}).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_gives_the_same_bytes() -> None:
    weight = noise(64, 256).bfloat16()
    scales = fp8_scale(weight.float().abs().amax(1, keepdim=True))
    on_gpu = quantize_rows(weight.cuda(), scales.cuda()).cpu()
    assert torch.equal(on_gpu.view(torch.uint8), quantize_rows(weight, scales).view(torch.uint8))
    assert torch.equal(round_by_token(weight.cuda()).cpu(), round_by_token(weight))
