"""The bound on a norm's output holds for the worst input, is hardly above it, and is given for RMSNorms alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nvquant.calibrate.norm_bounds import rms_norm_bound
from torch import Tensor, nn

WIDTH = 96


def of_transformers(family: str, class_name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """A norm of a model's code, imported here because collecting the tests would wait for it."""
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module: nn.Module = getattr(code, class_name)(*args, **kwargs)
    return module


NORMS: dict[str, Callable[[], nn.Module]] = {
    "weight": lambda: of_transformers("llama", "LlamaRMSNorm", WIDTH, eps=1e-5),
    "one plus weight": lambda: of_transformers("gemma2", "Gemma2RMSNorm", WIDTH),
    "gemma4": lambda: of_transformers("gemma4", "Gemma4RMSNorm", WIDTH),
    "zero-centred": lambda: of_transformers("qwen3_next", "Qwen3NextRMSNorm", WIDTH),
    "torch": lambda: nn.RMSNorm(WIDTH),
}


def random_weight(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.7, 0.5, torch.Generator().manual_seed(1))
    return module.requires_grad_(False)


@pytest.mark.parametrize("name", NORMS)
def test_the_bound_is_reached_by_the_worst_input_and_by_no_other(name: str) -> None:
    module = random_weight(NORMS[name]())
    bound = rms_norm_bound(module)
    assert bound is not None
    worst = float(module(1e4 * torch.eye(WIDTH)).abs().max())
    assert worst <= bound <= 1.02 * worst
    assert float(module(torch.randn(100, WIDTH)).abs().max()) <= bound
    assert float(module(1e4 * torch.eye(WIDTH)).bfloat16().abs().max()) <= bound


def test_a_norm_without_weight_needs_its_width() -> None:
    module = of_transformers("gemma4", "Gemma4RMSNorm", WIDTH, with_scale=False)
    assert rms_norm_bound(module) is None
    bound = rms_norm_bound(module, WIDTH)
    assert bound is not None
    assert math.sqrt(WIDTH) <= bound <= 1.02 * math.sqrt(WIDTH)


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.clamp(-20, 20))
        return normed


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Identity(), nn.Dropout(), Clipped(), nn.Embedding(4, WIDTH)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_rms_norm_has_no_bound(module: nn.Module) -> None:
    assert rms_norm_bound(random_weight(module), WIDTH) is None


def test_the_bound_has_few_bits_and_so_does_not_depend_on_the_processor() -> None:
    bound = rms_norm_bound(random_weight(nn.RMSNorm(WIDTH)))
    assert bound is not None
    assert math.frexp(bound)[0] * 256 == int(math.frexp(bound)[0] * 256)
