"""The emulation of a server's input rounding, beyond the reference vectors."""

from __future__ import annotations

import pytest
import torch
from nvquant.format.activations import quantize_dequantize
from nvquant.format.scales import global_scale

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
    ),
]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_values_beyond_the_calibrated_amax_are_clipped_to_it() -> None:
    found = quantize_dequantize(torch.full((1, 16), 40.0), global_scale(torch.tensor(10.0)))
    torch.testing.assert_close(found, torch.full((1, 16), 10.0), rtol=2.0**-21, atol=0)


def test_a_block_of_zeros_and_one_below_the_smallest_scale_give_zeros() -> None:
    x = torch.zeros(1, 48)
    x[0, 16:32] = 1e-9
    x[0, 32:] = 1.0
    found = quantize_dequantize(x, global_scale(torch.tensor(1.0)))
    assert not found[0, :32].any()
    assert (found[0, 32:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_shape_and_dtype_gives_float32_of_that_shape(dtype: torch.dtype) -> None:
    x = inputs(2, 3, 32).to(dtype)
    before = x.clone()
    found = quantize_dequantize(x, global_scale(x.abs().amax().float()))
    assert (found.shape, found.dtype) == ((2, 3, 32), torch.float32)
    assert torch.equal(found[1, 2], quantize_dequantize(x[1, 2], global_scale(x.abs().amax().float())))
    assert torch.equal(x, before)


def test_headroom_of_a_power_of_two_changes_no_value_in_the_normal_range() -> None:
    x = inputs(64, 64)
    amax = x.abs().amax()
    reference = quantize_dequantize(x, global_scale(amax))
    for headroom in (2.0, 4.0, 64.0):
        assert torch.equal(quantize_dequantize(x, global_scale(amax, headroom)), reference)


def test_columns_beyond_the_block_do_not_matter() -> None:
    x = inputs(4, 64)
    scale = global_scale(x.abs().amax())
    assert torch.equal(quantize_dequantize(x, scale)[:, 16:32], quantize_dequantize(x[:, 16:32], scale))


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gives_the_values_of_the_cpu(device: str) -> None:
    x = inputs(64, 256)
    scale = global_scale(x.abs().amax() / 2)
    assert torch.equal(quantize_dequantize(x.to(device), scale).cpu(), quantize_dequantize(x, scale))


def test_a_block_scale_multiplies_by_the_rounded_sixth_as_the_server_does() -> None:
    # amax * float32(1 / 6) and amax / 6 lie on two sides of a tie between the E4M3 bytes 14 and 15.
    amax, scale = 0.0003417186962906271, torch.tensor(497.256591796875)
    found = quantize_dequantize(torch.full((1, 16), amax), scale)
    assert torch.equal(found, torch.full((1, 16), 6.0) * (torch.tensor(15 * 2.0**-9) / scale))


def test_elements_multiply_by_two_reciprocals_as_the_server_does() -> None:
    # Half a step away from the tie at a quarter: 1 / (s * (1 / g)) rounds up, 1 / (s / g) down to zero.
    block_scale, scale = torch.tensor(0.02734375), torch.tensor(89.47743225097656)
    x = torch.full((1, 16), 7.639845716767013e-05)
    x[0, 0] = 6 * block_scale / scale
    found = quantize_dequantize(x, scale)
    assert torch.equal(found[0, 1:], torch.full((15,), 0.5) * (block_scale / scale))
