"""Block scales that vLLM's Marlin kernel flushes to zero on GPUs without FP4 units (Hopper, Ada, Ampere).

Marlin keeps block scales in an 8-bit format of its own. At load it multiplies the scales of the fused tensor (gate +
up, q + k + v) by the power of two that brings the largest one into (224, 448], and then stores zero for every scale
below 2^-6: such a block is served as zeros. Relative to the largest scale, the limit is 3.5e-5 (top scale 448) to
7.0e-5 (just above 224).
Source: vLLM 0.33.0, `nvfp4_marlin_process_scales` and `_nvfp4_compute_scale_factor` in
vllm/model_executor/layers/quantization/utils/marlin_utils_fp4.py, BF16 activations, tensor parallel size 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import E4M3_MAX
from .scales import decode_e4m3

RULE_READ_FROM = "vLLM 0.33.0"
_SMALLEST_KEPT = 2.0**-6


def scale_histogram(scales: Tensor) -> Tensor:
    """Number of times that each E4M3 byte occurs: float8_e4m3fn or uint8, any shape, to int64 [256] on the CPU."""
    return torch.bincount(scales.view(torch.uint8).flatten().int(), minlength=256).cpu()


def flushed_bytes(histogram: Tensor) -> Tensor:
    """The E4M3 bytes that Marlin turns to zero.

    Args:
        histogram: int64 [256], `scale_histogram` summed over the members of a fused tensor.
    Returns:
        bool [256], on the CPU.
    """
    flushed = torch.zeros(256, dtype=torch.bool)
    values = decode_e4m3(torch.arange(127, dtype=torch.uint8))
    present = histogram[:127] > 0
    if bool(present.any()):
        top = values[present].max()
        factor = torch.floor(torch.log2(E4M3_MAX / top)).exp2() if 0 < top < E4M3_MAX else torch.ones(())
        flushed[:127] = (values > 0) & (values * factor < _SMALLEST_KEPT)
    return flushed


def count_flushed_blocks(histogram: Tensor) -> int:
    """Number of blocks that Marlin serves as zeros.

    Args:
        histogram: int64 [256], `scale_histogram` summed over the members of a fused tensor.
    """
    return int(histogram[flushed_bytes(histogram)].sum())
