"""NVFP4 linear kernels that decode the weight, mostly when it is loaded, and multiply in the model's own dtype."""

from __future__ import annotations

import torch
from vllm import envs
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.platforms import PlatformEnum

BLOCK_COLUMNS = 16


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """The values of a layer's packed weight, [rows, columns] in the model's dtype."""
    return dequantize_to_dtype(
        layer.weight.data,
        layer.weight_scale.data,
        layer.weight_global_scale,
        layer.params_dtype,
        BLOCK_COLUMNS,
        swizzle=False,
    )


class CpuNvFp4WeightOnlyLinearKernel(linear.NvFp4LinearKernel):
    """W4A16: decoded weight, untouched input."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Accept any CPU; `install` registers the class for that platform only."""
        return True, None

    @classmethod
    def can_implement(cls, config: linear.NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Accept any layer; an NVFP4 layer's configuration has no fields."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weight, uint8 [rows, columns / 2], by its values, [rows, columns] in the model's dtype."""
        layer.weight = torch.nn.Parameter(decoded(layer), requires_grad=False)
        # Never read again, and a stale scale beside a decoded weight would mislead.
        del layer.weight_scale

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x, [..., columns], by the decoded weight."""
        return torch.nn.functional.linear(x, layer.weight, bias)


class CpuNvFp4PackedWeightOnlyLinearKernel(CpuNvFp4WeightOnlyLinearKernel):
    """W4A16 in the memory of the packed weight, which is decoded at every call."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weight as it is stored."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Decode the weight and multiply x, [..., columns], by it."""
        return torch.nn.functional.linear(x, decoded(layer), bias)


class CpuNvFp4LinearKernel(CpuNvFp4WeightOnlyLinearKernel):
    """W4A4: decoded weight, input quantized and dequantized as vLLM's emulation kernel does it."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Round x, [..., columns], to NVFP4 values in blocks of 16 and multiply it by the decoded weight."""
        rows = x.reshape(-1, x.shape[-1])
        rounded = ref_nvfp4_quant_dequant(rows, layer.input_global_scale_inv, BLOCK_COLUMNS)
        return super().apply_weights(layer, rounded.reshape(x.shape), bias)


def install() -> None:
    """Make vLLM choose these kernels on a CPU; calling it again changes nothing."""
    if issubclass(linear.MarlinNvFp4LinearKernel, CpuNvFp4WeightOnlyLinearKernel):
        return
    # The first supported class wins. vLLM's own emulation decodes the weight at every call: some sixteen times slower,
    # but 0.56 instead of 2 bytes a weight. VLLM_DISABLED_KERNELS=CpuNvFp4LinearKernel selects it.
    for kernel in (CpuNvFp4LinearKernel, linear.EmulationNvFp4LinearKernel):
        linear.register_linear_kernel(kernel, PlatformEnum.CPU, "nvfp4")
    # For weight-only layers vLLM consults neither that list nor that variable: it takes the class bound to this name in
    # its module.
    is_disabled = CpuNvFp4WeightOnlyLinearKernel.__name__ in envs.VLLM_DISABLED_KERNELS
    linear.MarlinNvFp4LinearKernel = (
        CpuNvFp4PackedWeightOnlyLinearKernel if is_disabled else CpuNvFp4WeightOnlyLinearKernel
    )
