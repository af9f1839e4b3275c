"""Measured speeds of the devices that a conversion goes through; one JSON document.

usage: python benchmarks/floors.py SOURCE OUTPUT [--read-gb 4] [--device cpu|cuda]

SOURCE is a folder of shards, read from their beginnings as they lie (drop them from the page cache before, to measure
the disk); OUTPUT a folder on the file system that is written to. On a GPU also pinned host memory to device, and a
bfloat16 matrix product of random 8192 x 8192 matrices; on the CPU a float32 one of 2048 x 2048.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import disk
import torch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--read-gb", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    paths = sorted(options.source.glob("*.safetensors"))
    speeds = {
        "read GB/s": disk.read_speed(paths, int(options.read_gb * 1e9)) / 1e9,
        "write GB/s": disk.write_speed(options.output, min(2 << 30, int(options.read_gb * 1e9))) / 1e9,
    }
    if options.device == "cuda":
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        device = torch.empty_like(host, device="cuda")
        speeds["host to GPU GB/s"] = host.numel() / best_seconds(lambda: device.copy_(host, non_blocking=True)) / 1e9
    speeds["matmul TFLOP/s"] = matmul_flops(options.device) / 1e12
    print(json.dumps(speeds))


def matmul_flops(device: str) -> float:
    """Operations a second of a square matrix product on random data."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=result))


def best_seconds(task: Callable[[], object], repeats: int = 5, calls: int = 4) -> float:
    """Of one call, the best of the repeats."""
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            task()
        synchronize()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
