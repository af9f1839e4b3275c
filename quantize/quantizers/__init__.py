"""Quantizers choose the codes and block scales of a matrix, given the global scale of its fused group."""

from __future__ import annotations

from ..errors import InputError
from .base import Quantizer
from .mse import MSE
from .rtn import RTN

QUANTIZERS: dict[str, Quantizer] = {quantizer.name: quantizer for quantizer in (RTN(), MSE())}


def get_quantizer(name: str) -> Quantizer:
    """The quantizer with this name.

    Raises:
        InputError: no quantizer has that name.
    """
    if name not in QUANTIZERS:
        raise InputError(f"quantizer '{name}' does not exist: choose {' or '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]
