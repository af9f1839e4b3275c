"""The GPUs that a plan knows: memory, and the memory bandwidth that NVIDIA publishes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU.

    Attributes:
        memory_mib: total memory as nvidia-smi reports it.
        size_gb: memory in the words of its maker.
        bandwidth_gb: gigabytes (10^9) a second between memory and GPU.
    """

    memory_mib: int
    size_gb: int
    bandwidth_gb: float

    @property
    def memory_bytes(self) -> int:
        """Total memory in bytes."""
        return self.memory_mib << 20

    @property
    def bandwidth_bytes(self) -> float:
        """Bytes a second between memory and GPU."""
        return self.bandwidth_gb * 1e9


# Size and bandwidth come from NVIDIA's page or data sheet in the comment.
GPUS = {
    "RTX 5060 Ti 16 GB": GpuModel(16311, 16, 448),  # GeForce RTX 5060 family page
    "RTX 4090": GpuModel(24564, 24, 1008),  # white paper "NVIDIA Ada GPU Architecture", table of the RTX 4090
    "RTX 5090": GpuModel(32607, 32, 1792),  # white paper "NVIDIA RTX Blackwell GPU Architecture"
    "L40S": GpuModel(46068, 48, 864),  # data sheet L40S
    "A100 80 GB": GpuModel(81920, 80, 2039),  # data sheet A100, SXM. PCIe has 1935
    "H100 80 GB": GpuModel(81559, 80, 3350),  # data sheet H100, SXM. PCIe has 2000
    "RTX PRO 6000": GpuModel(97887, 96, 1792),  # data sheet RTX PRO 6000 Blackwell Workstation. Server has 1597
    "GB10 (DGX Spark)": GpuModel(122572, 128, 273),  # data sheet DGX Spark
    "H200": GpuModel(143771, 141, 4800),  # data sheet H200
    "B200": GpuModel(183359, 180, 8000),  # data sheet DGX B200: 64 TB/s and 1,440 GB of eight GPUs
}


def short_name(gpu: str) -> str:
    """The name of a GPU of `GPUS` without a size of memory in it."""
    return re.sub(r" \d+ GB$", "", gpu)
