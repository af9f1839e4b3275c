"""The facts of this machine: its GPUs (without importing torch), their NVFP4 arithmetic and memory bandwidth, RAM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..plan.gpus import GPUS

Capability = tuple[int, int]
Fp4 = Literal["native", "weight_only", "none", "emulated"]

MIB = 1 << 20
SECONDS = 30
_FIELDS = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")

# Gigabytes (10^9) a second by what the name holds, as nvidia-smi gives it: the first that matches counts, so the
# special ones stand before the general ones. Source: plan/gpus.py, or NVIDIA's data sheet or product page of each.
BANDWIDTH_GB: tuple[tuple[str, float], ...] = (
    (r"\bGB300\b|\bB300\b", 8000),
    (r"\bGB200\b|\bB200\b", GPUS["B200"].bandwidth_gb),
    (r"\bGH200 144G", 4900),
    (r"\bGH200\b", 4000),
    (r"\bH200\b", GPUS["H200"].bandwidth_gb),
    (r"\bH100 NVL\b", 3900),
    (r"\bH100 PCIe\b", 2000),
    (r"\bH100\b", GPUS["H100 80 GB"].bandwidth_gb),
    (r"\bA100-SXM4-80GB\b", GPUS["A100 80 GB"].bandwidth_gb),
    (r"\bA100 80GB PCIe\b", 1935),
    (r"\bA100\b", 1555),
    (r"\bRTX PRO 6000 Blackwell Server\b", 1597),
    (r"\bRTX PRO 6000\b", GPUS["RTX PRO 6000"].bandwidth_gb),
    (r"\bRTX PRO 5000 Blackwell$", 1344),
    (r"\bRTX PRO 4500 Blackwell$", 896),
    (r"\bRTX PRO 4000 Blackwell$", 672),
    (r"\bGB10\b|\bThor\b", GPUS["GB10 (DGX Spark)"].bandwidth_gb),
    (r"\bRTX 6000 Ada\b", 960),
    (r"\bRTX 5000 Ada Generation$", 576),
    (r"\bRTX A6000\b|\bRTX A5000$", 768),
    (r"\bL40S?\b", GPUS["L40S"].bandwidth_gb),
    (r"\bL4\b", 300),
    (r"\bA40\b", 696),
    (r"\bA10G?\b", 600),
    (r"\bT4\b", 320),
    (r"\bV100", 900),
    (r"\bQuadro RTX 8000\b", 672),
    (r"\bRTX 5090 Laptop\b", 896),
    (r"\bRTX 4090 Laptop\b", 576),
    (r"\bRTX 5090( D)?$", GPUS["RTX 5090"].bandwidth_gb),
    (r"\bRTX 5080$", 960),
    (r"\bRTX 5070 Ti$", 896),
    (r"\bRTX 5070$", 672),
    (r"\bRTX 5060 Ti$", GPUS["RTX 5060 Ti 16 GB"].bandwidth_gb),
    (r"\bRTX 4090( D)?$", GPUS["RTX 4090"].bandwidth_gb),
    (r"\bRTX 4080 SUPER$", 736),
    (r"\bRTX 4080$", 717),
    (r"\bRTX 4070 Ti SUPER$", 672),
    (r"\bRTX 4070( Ti| SUPER)?$", 504),
    (r"\bRTX 4060 Ti$", 288),
    (r"\bRTX 3090 Ti$", 1008),
    (r"\bRTX 3090$", 936),
)
FP4_WORDS: dict[Fp4, str] = {
    "native": "W4A4 checkpoints run on the FP4 units, weight-only ones are decoded to 16 bits",
    "weight_only": "no FP4 units, so Marlin decodes weights to 16 bits and leaves inputs unchanged, for W4A4 too "
    "(saves memory and decoding time, not prefill)",
    "none": "too old, vLLM has no NVFP4 kernel for it (at least 7.5 is required)",
    "emulated": "vLLM's CPU build emulates NVFP4 with the plugin integrations/vllm_cpu, which is slow",
}
BANDWIDTH_SOURCE = "NVIDIA's data sheets and product pages"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi sees it.

    Attributes:
        capability: compute capability. None where the driver does not report it.
        total_bytes, free_bytes: of its memory, or of the machine's where the two share one (GB10).
    """

    index: int
    uuid: str
    name: str
    capability: Capability | None
    total_bytes: int
    free_bytes: int
    driver: str

    @property
    def bandwidth_bytes(self) -> float | None:
        """Bytes that its memory moves in a second at most."""
        return bandwidth_bytes(self.name)


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that CUDA may use here: all, or those in CUDA_VISIBLE_DEVICES. None of them without a driver."""
    lines = _query("gpu", _FIELDS)
    return _visible([gpu for line in lines if (gpu := _parse(line)) is not None])


def used_bytes(among: Sequence[Gpu]) -> int | None:
    """Memory in use on these GPUs now, by all programs. None where nvidia-smi does not report it."""
    wanted = {str(gpu.index) for gpu in among}
    rows = [line.split(", ") for line in _query("gpu", ("index", "memory.used"))]
    used = [row[1] for row in rows if len(row) == 2 and row[0] in wanted]
    if not wanted or len(used) != len(wanted) or not all(value.isdigit() for value in used):
        return None
    return sum(int(value) * MIB for value in used)


def fp4_kind(capability: Capability | None) -> Fp4:
    """vLLM's arithmetic for NVFP4 weights on a GPU of this compute capability. None stands for a CPU.

    Source: vLLM 0.32.0, model_executor/kernels/linear/__init__.py: CUTLASS and FlashInfer from 10.0 on, Marlin from
    7.5.
    """
    if capability is None:
        return "emulated"
    if capability >= (10, 0):
        return "native"
    return "weight_only" if capability >= (7, 5) else "none"


def fp4_path(capability: Capability | None) -> str:
    """The same in words."""
    words = FP4_WORDS[fp4_kind(capability)]
    if capability is None:
        return f"no GPU: {words}"
    return f"compute capability {capability[0]}.{capability[1]}, {generation(capability)}: {words}"


def bandwidth_bytes(name: str) -> float | None:
    """The memory bandwidth of the GPU of this name in bytes a second, by its maker. None for unknown ones."""
    bare = name.strip()
    for pattern, gigabytes in BANDWIDTH_GB:
        if re.search(pattern, bare) and (("Laptop" in bare) == ("Laptop" in pattern)):
            return gigabytes * 1e9
    return None


def ram_bytes() -> tuple[int, int]:
    """Total and available memory of the machine, or of the container where that has less, or (0, 0) if unknown."""
    total, available = _meminfo()
    limit, taken = _cgroup()
    if limit is not None and total and limit < total:
        total, available = limit, min(available, max(0, limit - taken))
    return total, available


def generation(capability: Capability) -> str:
    """NVIDIA's name for the GPUs of a compute capability."""
    major, minor = capability
    if major >= 10:
        return "Blackwell" if major <= 12 else "newer than Blackwell"
    return {9: "Hopper", 8: "Ada" if minor == 9 else "Ampere", 7: "Turing" if minor >= 5 else "Volta"}.get(
        major, "before Volta"
    )


def _query(kind: str, fields: Sequence[str]) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _parse(line: str) -> Gpu | None:
    values = dict(zip(_FIELDS, (value.strip() for value in line.split(",")), strict=False))
    if len(values) != len(_FIELDS) or not values["index"].isdigit():
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", values["compute_cap"])
    total, free = (_mib(values[name]) for name in ("memory.total", "memory.free"))
    if total is None:  # a GPU without memory of its own says [N/A]
        total, free = ram_bytes()
    return Gpu(
        int(values["index"]),
        values["uuid"],
        values["name"],
        (int(match[1]), int(match[2])) if match else None,
        total,
        total if free is None else free,
        values["driver_version"],
    )


def _mib(value: str) -> int | None:
    return int(value) * MIB if value.isdigit() else None


def _visible(found: list[Gpu]) -> tuple[Gpu, ...]:
    """CUDA's rule: names in the given order, up to the first that is none; CUDA orders by PCI bus as nvidia-smi does
    where all GPUs are alike."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(found)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        matches = [gpu for gpu in found if word == str(gpu.index) or (word[:4] == "GPU-" and gpu.uuid.startswith(word))]
        if len(matches) != 1:
            break
        chosen += matches
    return tuple(chosen)


def _meminfo() -> tuple[int, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if len(line.split()) > 1}
    return values.get("MemTotal", 0), values.get("MemAvailable", values.get("MemFree", 0))


def _cgroup() -> tuple[int | None, int]:
    """A container's limit and its use. None where there is no limit."""
    for limit, taken in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit).read_text()), int(Path(taken).read_text())
        except (OSError, ValueError):
            continue
    return None, 0
