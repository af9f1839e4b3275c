"""Rounding of trained numbers: the bytes that are stored, and gradients that pass it."""

from __future__ import annotations

import math

import pytest
import torch
from nvquant.distill.norms import adds_one
from nvquant.distill.rounding import moved_norm, moved_scales, stored_blocks
from nvquant.format.blocks import quantize_blocks
from nvquant.stream.distillation import MOST_SCALE_CHANGE
from torch import nn

EVERY_SCALE = torch.arange(0x7F, dtype=torch.uint8)


def values(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.float8_e4m3fn).double()


def test_no_change_keeps_every_byte() -> None:
    assert torch.equal(moved_scales(EVERY_SCALE, torch.zeros(0x7F)), EVERY_SCALE)


@pytest.mark.parametrize("share", [-1.0, -0.4, -0.03, 0.01, 0.2, 0.7, 1.0])
def test_a_moved_scale_is_the_nearest_value_within_the_factor_and_never_zero(share: float) -> None:
    theta = torch.full((0x7F,), share * MOST_SCALE_CHANGE)
    before, after = values(EVERY_SCALE), values(moved_scales(EVERY_SCALE, theta))
    assert after[0] == 0
    assert (after[1:] > 0).all()
    assert ((after[1:] / before[1:]).log().abs() <= MOST_SCALE_CHANGE + 1e-6).all()
    wanted = (before.float() * theta.exp()).clamp(2.0**-9, 448)
    normal = before >= 2.0**-5  # above, no rounding to a subnormal exceeds the factor
    nearest = wanted.to(torch.float8_e4m3fn).double()
    assert torch.equal(after[normal], nearest[normal])


def test_the_gradient_of_a_scale_is_that_of_an_unrounded_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, outer = torch.randn((8, 64), generator=generator), torch.randn((8, 64), generator=generator)
    divisor = torch.tensor(30.0)
    quantized = quantize_blocks(weight, divisor)
    scales = quantized.scales.view(torch.uint8)
    theta = (0.1 * torch.randn((8, 4), generator=generator)).requires_grad_()
    (stored_blocks(theta, quantized.packed, scales, divisor, torch.float32) * outer).sum().backward()
    codes = stored_blocks(torch.zeros(8, 4), quantized.packed, scales, divisor, torch.float32).double().view(8, 4, 16)
    codes = codes * divisor / quantized.scales.double().unsqueeze(-1)
    plain = theta.detach().double().requires_grad_()
    smooth = codes * (quantized.scales.double() * plain.exp() / divisor).unsqueeze(-1)
    (smooth.flatten(1) * outer.double()).sum().backward()
    assert theta.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(theta.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_one_added", [False, True])
def test_a_norm_moves_its_factor_in_its_own_dtype(is_one_added: bool) -> None:
    weight = torch.tensor([0.5, -2.0, 0.0, 1e-9], dtype=torch.bfloat16)
    assert torch.equal(moved_norm(weight, torch.zeros(4), is_one_added), weight.float())
    change = torch.full((4,), 0.1, requires_grad=True)
    moved = moved_norm(weight, change, is_one_added)
    one = int(is_one_added)
    wanted = ((weight.double() + one) * (1 + 0.1) - one).to(torch.bfloat16)
    assert torch.allclose(moved.double(), wanted.double(), rtol=2**-7)
    assert torch.equal(moved, moved.bfloat16().float())
    moved.sum().backward()
    assert torch.equal(change.grad, weight.float() + one)  # type: ignore[arg-type]


def test_norms_are_known_by_what_they_compute() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert adds_one(LlamaRMSNorm(32), 32) is False
    assert adds_one(nn.LayerNorm(32), 32) is False
    assert adds_one(Gemma2RMSNorm(32), 32) is True
    assert adds_one(LlamaRMSNorm(32).to("meta"), 32) is False

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + self.weight

    assert adds_one(Shifted(), 32) is None
    assert math.isclose(MOST_SCALE_CHANGE, math.log(2))
