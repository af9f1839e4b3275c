"""The kernels of a server, by the class that vLLM logs: their arithmetic, and their descriptions.

Source of the table: vLLM 0.32.0, model_executor/kernels/linear/__init__.py (`_POSSIBLE_NVFP4_KERNELS`,
`_POSSIBLE_FP8_KERNELS`) and the classes named there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..format.schemes import ARITHMETICS, Arithmetic

NATIVE = "native FP4: weights and inputs multiplied as FP4 by the GPU's FP4 units"
W8A8 = "FP8: weights and inputs multiplied as FP8"
FP8_WEIGHT_ONLY = "FP8 weight-only: weights decoded to 16 bits, inputs unchanged"
WEIGHT_ONLY = "weight-only: weights decoded to 16 bits, inputs unchanged"
EMULATION = "emulation: weights decoded, inputs rounded to FP4 in software, multiplied in 16 bits"


@dataclass(frozen=True)
class Kernel:
    """A kernel for linear layers.

    Attributes:
        name: vLLM's class.
        arithmetic: of its own layers. None for a class that this version of nvquant does not know.
        words: its description for a reader.
        is_fp8: whether its layers are in FP8 instead of NVFP4.
    """

    name: str
    arithmetic: Arithmetic | None
    words: str
    is_fp8: bool = False


def _native(label: str) -> tuple[Arithmetic, str]:
    return "w4a4", f"{NATIVE} ({label})"


_KNOWN: dict[str, tuple[Arithmetic, str]] = {
    "FlashInferCuteDslNvFp4LinearKernel": _native("FlashInfer, CuTe DSL"),
    "FlashInferCutlassNvFp4LinearKernel": _native("FlashInfer, CUTLASS"),
    "FlashInferB12xNvFp4LinearKernel": _native("FlashInfer, for consumer Blackwell"),
    "FlashInferTrtllmNvFp4LinearKernel": _native("FlashInfer, TensorRT-LLM"),
    "FlashInferCudnnNvFp4LinearKernel": _native("FlashInfer, cuDNN"),
    "CutlassNvFp4LinearKernel": _native("CUTLASS"),
    "FbgemmNvFp4LinearKernel": _native("FBGEMM"),
    "B12xNvFp4LinearKernel": _native("for consumer Blackwell"),
    "TorchNvFp4LinearKernel": _native("PyTorch"),
    "FlashInferCuteDslNvFp4W4A16LinearKernel": ("weight_only", f"{WEIGHT_ONLY} (FlashInfer, CuTe DSL)"),
    "B12xNvFp4W4A16LinearKernel": ("weight_only", f"{WEIGHT_ONLY} (for consumer Blackwell)"),
    "MarlinNvFp4LinearKernel": ("weight_only", f"{WEIGHT_ONLY} (Marlin)"),
    "HummingNvFp4LinearKernel": ("weight_only", f"{WEIGHT_ONLY} (Humming)"),
    "EmulationNvFp4LinearKernel": ("w4a4", f"{EMULATION} (vLLM's own, slow)"),
    "CpuNvFp4LinearKernel": ("w4a4", f"{EMULATION} (nvquant's plugin for the CPU)"),
    "CpuNvFp4WeightOnlyLinearKernel": ("weight_only", f"{WEIGHT_ONLY} (nvquant's plugin for the CPU)"),
    "CpuNvFp4PackedWeightOnlyLinearKernel": (
        "weight_only",
        f"{WEIGHT_ONLY}, at each use (nvquant's plugin for the CPU, slow)",
    ),
}
_KNOWN_FP8: dict[str, tuple[Arithmetic, str]] = {
    "FlashInferFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (FlashInfer)"),
    "CutlassFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (CUTLASS)"),
    "B12xTensorFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (for consumer Blackwell)"),
    "PerTensorTorchFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (PyTorch)"),
    "ChannelWiseTorchFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (PyTorch)"),
    "RowWiseTorchFP8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (PyTorch)"),
    "CPUFP8W8A8ScaledMMLinearKernel": ("w8a8", f"{W8A8} (CPU)"),
    "CPUFp8PerTensorScaledMMLinearKernel": ("w8a8", f"{W8A8} (CPU)"),
    "MarlinFP8ScaledMMLinearKernel": ("weight_only", f"{FP8_WEIGHT_ONLY} (Marlin)"),
    "HummingFP8ScaledMMLinearKernel": ("weight_only", f"{FP8_WEIGHT_ONLY} (Humming)"),
}
# In memory these keep decoded weights, so a forecast from the file says nothing of them.
DECODED_IN_MEMORY = frozenset({"CpuNvFp4LinearKernel", "CpuNvFp4WeightOnlyLinearKernel"})


def kernel_named(name: str) -> Kernel:
    """The kernel of a class. An unknown one has a description, but no arithmetic."""
    known = _KNOWN | _KNOWN_FP8
    if name in known:
        return Kernel(name, *known[name], is_fp8=name in _KNOWN_FP8)
    return Kernel(name, None, f"{name}, which this version of nvquant does not know", is_fp8="FP8" in name.upper())


def server_arithmetic(kernels: Sequence[Kernel]) -> Arithmetic | None:
    """The arithmetic of a server with these kernels. None without kernels, or with one that nvquant does not know."""
    found = {kernel.arithmetic for kernel in kernels}
    if not found or None in found:
        return None
    return next(arithmetic for arithmetic in ARITHMETICS if arithmetic in found)
