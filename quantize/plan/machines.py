"""Machines for the forecast: GPUs by their published speed, disks, and the network for the source."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError
from .gpus import GPUS, short_name
from .measured import MEASURED_GPU, NVME_READ, NVME_WRITE, RAM_READ, RAM_WRITE

CPU = "cpu"
DEFAULT_DISK = "nvme"
HUB_BYTES = 100e6  # a second; assumed where nothing is said: what a machine gets over the network differs widely

# Dense BF16 matrix products with float32 sums, TFLOP/s, as NVIDIA publishes them: data sheets of A100, L40S, H100 SXM,
# H200 and HGX B200 (half of what they state with sparsity), white papers of Ada, Blackwell and RTX PRO Blackwell. For
# the RTX 5060 Ti a sixteenth of its published AI TOPS, as they are to each other on the RTX 5090. For GB10 NVIDIA
# publishes no such number.
BF16_TFLOPS = {
    "RTX 5060 Ti 16 GB": 47.4,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "L40S": 362.05,
    "A100 80 GB": 312.0,
    "H100 80 GB": 989.4,
    "RTX PRO 6000": 503.8,
    "H200": 989.4,
    "B200": 2250.0,
}


@dataclass(frozen=True)
class Disk:
    """A disk, which reads and writes in turn.

    Attributes:
        read_bytes, write_bytes: a second.
    """

    name: str
    read_bytes: float
    write_bytes: float

    @property
    def words(self) -> str:
        """Name and speeds."""
        speeds = f"reads {self.read_bytes / 1e9:.3g} GB/s, writes {self.write_bytes / 1e9:.3g} GB/s"
        return f"disk {self.name} ({speeds})".replace("  ", " ")


DISKS = {
    "ram": Disk("ram", RAM_READ.value, RAM_WRITE.value),
    "nvme": Disk("nvme", NVME_READ.value, NVME_WRITE.value),
    "network": Disk("network", 0.25e9, 0.25e9),  # assumed: what clouds promise of a network volume of middling price
}


@dataclass(frozen=True)
class Machine:
    """The machine of a conversion.

    Attributes:
        gpu: a name of `BF16_TFLOPS`, or None for a CPU of two cores like the measured one.
        count: GPUs, each with its process, or CPU machines that share a disk.
        disk: for the output, and for the source or its cache.
        network_bytes: rate of the Hub in bytes a second, or None if the source is on the disk.
        low_disk: whether the run keeps nothing of a source on the Hub.
    """

    gpu: str | None
    count: int
    disk: Disk
    network_bytes: float | None = None
    low_disk: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether the constants were measured on one machine of this kind."""
        return self.gpu in (None, MEASURED_GPU) and self.count == 1

    @property
    def speed(self) -> float:
        """Speed of one GPU relative to the measured one, from their published numbers."""
        return 1.0 if self.gpu is None else BF16_TFLOPS[self.gpu] / BF16_TFLOPS[MEASURED_GPU]

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return 0 if self.gpu is None else GPUS[self.gpu].memory_bytes

    @property
    def words(self) -> str:
        """The machine in words, such as `8 x H100 80 GB`."""
        return f"{self.count} x {'CPU of two cores' if self.gpu is None else self.gpu}"


def find_gpu(text: str) -> tuple[int, str | None]:
    """Number and kind of the GPUs that a word such as `H200`, `8xH100` or `cpu` means. None stands for a CPU.

    Raises:
        InputError: nvquant does not know the GPU, or their number is 0.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = (int(match[1] or 1), _plain(match[2])) if match else (1, "")
    if count < 1:
        raise InputError("the number of machines is 0", where=f"--on {text}", hint="give one or more, such as 8xH100")
    if name == CPU:
        return count, None
    for gpu in BF16_TFLOPS:
        if name in (_plain(gpu), _plain(short_name(gpu))):
            return count, gpu
    known = ", ".join(BF16_TFLOPS)
    raise InputError(
        "nvquant does not know this machine",
        where=f"--on {text}",
        hint=f"choose {known} or cpu, or several such as 8xH100",
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
