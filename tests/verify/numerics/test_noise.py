"""The noise of BF16 changes only the last bits, and only until the block ends."""

from __future__ import annotations

import pytest
import torch
from nvquant.verify.numerics.noise import FLOOR_ROWS, in_small_products, noise_on, noise_words, rounded_to_bfloat16
from torch import Tensor, nn


def test_outputs_are_rounded_to_bf16_until_the_block_ends() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    plain = module(x)
    with rounded_to_bfloat16(module):
        rounded = module(x)
    assert torch.equal(rounded, module[0](x).bfloat16().float().tanh().bfloat16().float())
    assert not torch.equal(rounded, plain)
    assert torch.equal(module(x), plain)


def test_a_cpu_rounds_and_a_gpu_computes_in_small_products() -> None:
    linear = nn.Linear(8, 8)
    with noise_on(linear, torch.device("cpu")):
        assert linear._forward_hooks and "forward" not in vars(linear)
    with noise_on(linear, torch.device("cuda")):
        assert not linear._forward_hooks and "forward" in vars(linear)
    assert "float32" in noise_words(torch.device("cpu"))
    assert str(FLOOR_ROWS) in noise_words(torch.device("cuda"))


def test_small_products_are_the_same_products_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    linear = nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        heights.append(x.shape[-2])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4, bias=False))
    x = torch.randn(1, 2 * FLOOR_ROWS + 3, 8, generator=torch.Generator().manual_seed(0))
    whole = module(x)
    heights.clear()
    with in_small_products(module):
        torch.testing.assert_close(module(x), whole)
    assert heights == [FLOOR_ROWS, FLOOR_ROWS, 3] * 2
    heights.clear()
    assert torch.equal(module(x), whole)
    assert heights == [2 * FLOOR_ROWS + 3] * 2
