"""Quantizers choose the codes and scales of the matrices of a fused group."""

from __future__ import annotations

from ..errors import unknown_name
from .base import Quantizer
from .fp8 import Fp8Nearest
from .gptq import GPTQ
from .mse import MSE
from .rtn import RTN

QUANTIZERS: dict[str, Quantizer] = {quantizer.name: quantizer for quantizer in (RTN(), MSE(), GPTQ())}
"""The quantizers that a recipe can choose."""
_FIXED: tuple[Quantizer, ...] = (Fp8Nearest(),)  # of schemes that have only one


def get_quantizer(name: str) -> Quantizer:
    """The quantizer with this name.

    Raises:
        InputError: no quantizer has that name.
    """
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, QUANTIZERS)
    return QUANTIZERS[name]


def quantizer_for(scheme: str, chosen: Quantizer) -> Quantizer:
    """The quantizer of matrices in a scheme: the chosen one, or the scheme's own if it has only one.

    Args:
        scheme: its name.
        chosen: of the recipe or of `--quantizer`.
    """
    return next((quantizer for quantizer in (chosen, *_FIXED) if scheme in quantizer.schemes), chosen)
