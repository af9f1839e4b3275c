"""MXFP4 matrices: E2M1 codes with a power of two for every 32 columns, which an E8M0 byte stores.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MX_BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255


def decode_e8m0(stored: Tensor) -> Tensor:
    """Values of E8M0 bytes: 2^(byte - 127), and NaN for 255.

    Args:
        stored: uint8 or float8_e8m0fnu, any shape.
    Returns:
        float32, the same shape. 2^-127 is subnormal.
    """
    import torch

    exponents = stored.view(torch.uint8).int() - E8M0_BIAS
    values = torch.ldexp(torch.ones(exponents.shape, device=stored.device), exponents)
    return values.masked_fill_(exponents == E8M0_NAN - E8M0_BIAS, float("nan"))
