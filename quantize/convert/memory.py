"""Peak memory of this process and its children, as the operating system counted it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_host_bytes() -> int:
    """Largest resident size of this process so far, plus that of its largest finished child; pinned host memory
    included."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return (
        max(
            _high_water_bytes(),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if sys.platform == "darwin" else 0,
        )
        + children
    )


def _high_water_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_gpu_bytes() -> int:
    """Largest amount of GPU memory that this process's allocator reserved; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
