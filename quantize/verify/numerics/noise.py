"""The noise of BF16: the same computation with other last bits, which shows how far numbers vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOOR_ROWS = 16


def noise_words(device: torch.device) -> str:
    """The description of the noise on a device."""
    if device.type == "cpu":
        return "the source with every module's output rounded to BF16, against float32"
    return f"the source in BF16, {FLOOR_ROWS} tokens at a time, against whole sequences"


def noise_on(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Let a module compute in the noise of BF16 while the block runs."""
    return rounded_to_bfloat16(module) if device.type == "cpu" else in_small_products(module)


@contextmanager
def rounded_to_bfloat16(module: nn.Module) -> Iterator[None]:
    """Let every submodule of a float32 module round its output to BF16, as a server that computes in BF16 does, while
    the block runs."""

    def round_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        is_plain = isinstance(output, Tensor) and output.dtype == torch.float32
        return output.bfloat16().float() if is_plain else output

    leaves = [part for part in module.modules() if not list(part.children())]
    handles = [part.register_forward_hook(round_output) for part in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_small_products(module: nn.Module) -> Iterator[None]:
    """Let every linear of the module take a few tokens at a time, as a server that decodes does, while the block runs:
    its products then get other kernels, which add in another order."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]

    def small(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat(
            [nn.functional.linear(rows, linear.weight, linear.bias) for rows in x.split(FLOOR_ROWS, dim=-2)], dim=-2
        )

    for linear in linears:
        linear.__dict__["forward"] = small(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.__dict__["forward"]
