"""Bounds on the output of RMSNorms, proved from the module itself, so that their readers need no calibration.

An RMSNorm gives x / rms(x) times its effective weight, element by element. No element of x exceeds
sqrt(width) * rms(x), so no output exceeds sqrt(width) times the largest effective weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PROBES = 16  # random vectors
MAGNITUDES = (2, 4)  # of their decimal logarithms: so large that the epsilon of a norm has no effect
TOLERANCE = 1e-4  # relative to the largest output
ROOM = 1 + 2.0**-8  # for a server that rounds the output to BF16
BITS = 8  # of the bound, so that it does not depend on the last bits of a processor's root


@torch.no_grad()
def rms_norm_bound(module: nn.Module, width: int | None = None) -> float | None:
    """The largest magnitude that a norm can give, whatever its input: sqrt(width) * max |effective weight|, rounded up.

    Args:
        module: with its weights, on the CPU. The effective weight is its output for a vector of equal elements.
        width: elements of a vector, by default those of the module's only parameter.
    Returns:
        None where the module is not an RMSNorm: it is computed on random vectors and compared with the formula.
    """
    width = _width(module) if width is None else width
    if width is None:
        return None
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(*MAGNITUDES, PROBES, dtype=torch.float32).unsqueeze(1)
    probes = torch.randn((PROBES, width), generator=generator) * scales
    try:
        effective, got = _output(module, torch.full((1, width), 1e3)), _output(module, probes)
    except Exception:  # a module that takes something else than vectors raises what it likes
        return None
    if effective is None or got is None:
        return None
    expected = probes / probes.square().mean(-1, keepdim=True).sqrt() * effective
    if not bool(((got - expected).abs() <= TOLERANCE * expected.abs().max()).all()):
        return None
    return rounded_up(math.sqrt(width) * float(effective.abs().max()) * ROOM)


def _width(module: nn.Module) -> int | None:
    shapes = [parameter.shape for parameter in module.parameters()]
    return shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 1 else None


def _output(module: nn.Module, vectors: Tensor) -> Tensor | None:
    output = module(vectors)
    is_like = isinstance(output, Tensor) and output.shape == vectors.shape and bool(output.isfinite().all())
    return output.float() if is_like else None


def rounded_up(value: float) -> float:
    """The next number with `BITS` significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.ceil(math.ldexp(mantissa, BITS)), exponent - BITS)
