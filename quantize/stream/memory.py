"""Memory of this process: its peak as the operating system counts it, and the return of free memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EnvironmentLack

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def peak_host_bytes() -> int:
    """Largest resident size of this process so far, including pinned host memory.

    Children do not count, because Linux lets a child's peak begin at the size of the process that started it, so that a
    compiler called by a process of 5 GB would add 5 GB.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gpu_bytes() -> int:
    """Largest amount of GPU memory that this process's allocator reserved, or 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def host_bytes_now() -> int:
    """Resident size of this process now, or 0 if the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else 0


def available_host_bytes() -> int | None:
    """Memory that a process can still take without swapping, by the system's estimate, or None without an estimate."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    lines = (line.split() for line in table.read_text(encoding="ascii").splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)


def gpu_bytes_now() -> int:
    """GPU memory that this process's allocator has reserved now, or 0 without a GPU or before its first use."""
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0


def give_back_free_memory() -> None:
    """Return the free pages of glibc's allocator to the system. With another C library nothing happens.

    Tensors of up to 32 MiB lie in glibc's heaps. They are freed in another order than they came, and leave holes there.
    Without this call, resident memory grows with every layer although it is free.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def let_gpu_memory_grow() -> None:
    """Let PyTorch's allocator grow its segments of GPU memory from now on, instead of leaving holes in them. Buffers of
    gigabytes and of many sizes, as gptq needs them, reserve a third more memory otherwise. The user's own settings of
    the allocator stay.
    """
    import torch

    if sys.platform != "linux" or any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if configure is not None:  # no public function does it after the start of the process
        configure("expandable_segments:True")


def give_back_gpu_memory() -> None:
    """Return the free GPU memory of PyTorch's allocator to the driver, for programs that take a share of the complete
    GPU. Without a GPU in use nothing happens."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def telling_of_full_gpu(what: str) -> Iterator[None]:
    """Name the data for which the GPU ran out of memory, in one sentence.

    Raises:
        EnvironmentLack: the block ran out of the GPU's memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentLack(
            f"the GPU ran out of memory for {what}",
            hint=(
                "end other programs that use it, leave fewer hidden states on it with a lower --memory-budget, "
                "or use --device cpu"
            ),
        ) from error
