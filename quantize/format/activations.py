"""A server's quantization of the input of a W4A4 matrix, emulated in float32.

Source: vLLM 0.33.0, `ref_nvfp4_quant` in vllm/model_executor/layers/quantization/utils/nvfp4_emulation_utils.py (the
formula, rewritten here). It is checked bit for bit against tests/data/reference_vectors.json.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import BLOCK, E4M3_MAX
from .e2m1 import round_e2m1
from .kernels import has_kernel, round_with_kernel
from .scales import decode_e4m3, encode_e4m3


def quantize_dequantize(inputs: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Round inputs to NVFP4 with dynamic block scales under the stored input global scale.

    Args:
        inputs: [..., cols], any float dtype, cols divisible by 16.
        scale: float32 scalar, the input global scale as a divisor (2688 / calibrated amax).
        dtype: of the result. Arithmetic is float32.
    Returns:
        [..., cols]: code * (block scale / scale). Values beyond the calibrated amax are clipped to it.
    """
    if has_kernel(inputs):
        return round_with_kernel(inputs, scale, dtype)
    return round_in_torch(inputs, scale).to(dtype)


def round_in_torch(inputs: Tensor, scale: Tensor) -> Tensor:
    """`quantize_dequantize` in PyTorch, float32: the reference for the kernels."""
    blocks = inputs.float().reshape(-1, BLOCK)
    scale = scale.to(blocks.device)
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=blocks.device)
    wanted = blocks.abs().amax(-1, keepdim=True).mul_(sixth).mul_(scale).clamp_(max=E4M3_MAX)
    block_scales = decode_e4m3(encode_e4m3(wanted))
    inverse = torch.where(block_scales > 0, 1.0 / (block_scales * (1.0 / scale)), torch.zeros_like(block_scales))
    return round_e2m1(blocks * inverse).mul_(block_scales / scale).reshape(inputs.shape)
