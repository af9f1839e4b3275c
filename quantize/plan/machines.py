"""Machines to forecast for: GPUs by their published speed, disks, and the network that the source may come over."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError
from .forecast import GPUS_MIB
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
    """A disk; it reads and writes in turn.

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
    """What a conversion runs on.

    Attributes:
        gpu: a name of `BF16_TFLOPS`; None for a CPU of two cores, as the measured one.
        count: GPUs, and as many processes; or CPU machines that share a disk.
        disk: that holds the output, and the source or the cache of it.
        network_bytes: a second, at which the source comes from the Hub; None where it lies on the disk.
        low_disk: nothing of a source from the Hub is kept.
    """

    gpu: str | None
    count: int
    disk: Disk
    network_bytes: float | None = None
    low_disk: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether the constants were measured on this kind of machine, and on one of it."""
        return self.gpu in (None, MEASURED_GPU) and self.count == 1

    @property
    def speed(self) -> float:
        """One GPU beside the one that was measured, by their published numbers."""
        return 1.0 if self.gpu is None else BF16_TFLOPS[self.gpu] / BF16_TFLOPS[MEASURED_GPU]

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return 0 if self.gpu is None else GPUS_MIB[self.gpu] << 20

    @property
    def words(self) -> str:
        """As `8 x H100 80 GB`."""
        return f"{self.count} x {'CPU of two cores' if self.gpu is None else self.gpu}"


def find_gpu(text: str) -> tuple[int, str | None]:
    """Number and kind of the GPUs that a word such as `H200`, `8xH100` or `cpu` means; None is a CPU.

    Raises:
        InputError: no such GPU is known here, or none of it is asked for.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    count, name = (int(match[1] or 1), _plain(match[2])) if match else (1, "")
    if count < 1:
        raise InputError(f"--on {text}: no machine is asked for: give one or more, as 8xH100.")
    if name == CPU:
        return count, None
    for gpu in BF16_TFLOPS:
        if name in (_plain(gpu), _plain(re.sub(r" \d+ GB$", "", gpu))):
            return count, gpu
    known = ", ".join(BF16_TFLOPS)
    raise InputError(f"--on {text}: its speed is not known here; known are {known} and cpu, several as 8xH100.")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
