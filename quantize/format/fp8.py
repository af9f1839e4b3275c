"""FP8 (E4M3) matrices and inputs: quantized to nearest under a float32 scale, and back.

A scale is a multiplier, amax / 448. Division by it and rounding to E4M3, to nearest with ties to even, follow vLLM.
Source: vLLM 0.32.0, `scaled_fp8_quant` in vllm/_custom_ops.py and csrc/quantization/w8a8/fp8 (the formula, rewritten
here); docs/formats.md, section "FP8".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import E4M3_MAX

SMALLEST_TOKEN_SCALE = 1.0 / (E4M3_MAX * 512.0)
"""The least scale of a token's inputs in vLLM, which keeps a token of zeros finite."""


def fp8_scale(amax: Tensor) -> Tensor:
    """The scale for magnitudes up to `amax`: amax / 448, or 1.0 where that is zero.

    Args:
        amax: float32, any shape, not negative, finite.
    Returns:
        float32, the same shape.
    """
    scale = amax.float() / torch.full((), E4M3_MAX, dtype=torch.float32, device=amax.device)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_rows(weight: Tensor, scales: Tensor) -> Tensor:
    """The E4M3 codes nearest to the elements of a matrix.

    Args:
        weight: [rows, cols], bfloat16, float16 or float32, finite.
        scales: float32 [rows, 1] or a scalar.
    Returns:
        float8_e4m3fn [rows, cols]. Elements beyond 448 times their scale saturate.
    """
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _strips(weight):
        by = scales[rows] if scales.ndim else scales
        codes[rows] = (weight[rows].float() / by).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale.

    Args:
        codes: float8_e4m3fn [rows, cols].
        scales: float32 or bfloat16, [rows, 1], or one element.
        dtype: of the result. Arithmetic is float32.
    """
    matrix = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scales = scales.float().to(codes.device)
    for rows in _strips(codes):
        by = scales[rows] if scales.numel() > 1 else scales.reshape(())
        matrix[rows] = codes[rows].float() * by
    return matrix


def round_by_token(inputs: Tensor) -> Tensor:
    """Inputs as a server rounds them under a scale of each token: max(amax, 448 * `SMALLEST_TOKEN_SCALE`) / 448.

    Args:
        inputs: [..., cols], any float dtype.
    Returns:
        float32, the same shape.
    """
    values = inputs.float()
    amax = values.abs().amax(-1, keepdim=True)
    limit = torch.full((), E4M3_MAX, dtype=torch.float32, device=values.device)
    scale = (amax / limit).clamp_(min=SMALLEST_TOKEN_SCALE)
    return (values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float().mul_(scale)


def round_under(inputs: Tensor, scale: Tensor) -> Tensor:
    """Inputs as a server rounds them under one stored scale. Values beyond 448 times the scale are clipped.

    Args:
        inputs: [..., cols], any float dtype.
        scale: float32, one element.
    Returns:
        float32, the same shape.
    """
    scale = scale.float().reshape(()).to(inputs.device)
    return (inputs.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float().mul_(scale)


def _strips(matrix: Tensor) -> list[slice]:
    """Ranges of rows whose float32 copies stay small."""
    height = max(1, (1 << 24) // max(1, matrix.shape[1]))
    return [slice(begin, begin + height) for begin in range(0, matrix.shape[0], height)]
