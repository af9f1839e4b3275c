"""The norms that can be trained: modules that multiply each channel by its weight, or by 1 + weight.

nvquant has no list of classes for this. A norm is tried with other weights, and the others stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 4
_TOLERANCE = 1e-5


def one_weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, whose only parameters are a vector `weight` and perhaps a vector `bias`."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters())
        if "weight" in own and set(own) <= {"weight", "bias"} and all(value.ndim == 1 for value in own.values()):
            yield name, module


def adds_one(module: nn.Module, channels: int) -> bool | None:
    """Whether a module multiplies channels by 1 + weight instead of the weight. None if it does neither.

    Args:
        module: from `one_weight_modules`, on any device, with or without values. It is not changed.
    """
    trial = copy.deepcopy(module)
    weights = 1 + torch.arange(channels) % 3 / 4
    inputs = torch.randn((_ROWS, channels), generator=torch.Generator().manual_seed(0))

    def given(weight: Tensor) -> Tensor | None:
        trial.weight = nn.Parameter(weight, requires_grad=False)
        if getattr(trial, "bias", None) is not None:
            trial.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        try:
            output: Any = trial(inputs)
        except Exception:  # a module with other arguments raises what it likes
            return None
        return output.float() if isinstance(output, Tensor) and output.shape == inputs.shape else None

    with torch.no_grad():
        at_zero, at_one, at_weights = (given(values) for values in (torch.zeros(channels), weights * 0 + 1, weights))
    if at_zero is None or at_one is None or at_weights is None or not bool(at_one.any()):
        return None
    if not bool(at_zero.any()) and torch.allclose(at_weights, at_one * weights, rtol=_TOLERANCE):
        return False
    if torch.allclose(at_one, 2 * at_zero, rtol=_TOLERANCE) and torch.allclose(
        at_weights, at_zero * (1 + weights), rtol=_TOLERANCE
    ):
        return True
    return None
