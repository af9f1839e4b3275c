"""Quantizers: how codes and block scales of a matrix are chosen once its group's global scale is known."""

from __future__ import annotations

from ..errors import InputError
from .base import Quantizer
from .mse import MSE
from .rtn import RTN

QUANTIZERS: dict[str, Quantizer] = {quantizer.name: quantizer for quantizer in (RTN(), MSE())}


def get_quantizer(name: str) -> Quantizer:
    """The quantizer called `name`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in QUANTIZERS:
        raise InputError(f"quantizer '{name}' does not exist; available: {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]
