"""Quantize and pack one matrix: nvquant against compressed-tensors on the CPU, against the memory floor on a GPU.

usage: python benchmarks/quantize_and_pack.py [--rows 4096] [--cols 4096] [--device cpu|cuda] [--repeats 5] [--json
FILE]

Every row is the median of the repeats, taken in turn (ours, theirs, ours, ...) in one process on the same BF16 matrix.
Both sides start from the weight
and end with packed codes, block scales and the global scale. The floor of a GPU is the time of the bytes that must
move (the weight read twice, once
for its amax; codes and scales written) at the speed of a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nvquant.format.blocks import weight_amax
from nvquant.format.scales import global_scale
from nvquant.quantizers import QUANTIZERS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(options.rows, options.cols, generator=generator) * 0.02).bfloat16().to(options.device)
    mean_square = torch.rand(options.cols, generator=generator, dtype=torch.float64)
    tasks: dict[str, Callable[[], object]] = {"nvquant rtn": lambda: ours("rtn", weight, None)}
    peer = compressed_tensors_task(weight)
    if peer is not None:
        tasks["compressed-tensors"] = peer
    tasks["nvquant mse"] = lambda: ours("mse", weight, None)
    tasks["nvquant mse, weighted"] = lambda: ours("mse", weight, mean_square)
    seconds = measure(tasks, options.repeats, options.device)
    report = {
        "machine": machine(options.device),
        "torch": torch.__version__,
        "matrix": [options.rows, options.cols],
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "floor_seconds": floor_seconds(weight, options.repeats),
    }
    show(report, weight.numel())
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def ours(quantizer: str, weight: torch.Tensor, mean_square: torch.Tensor | None) -> object:
    """Weight to codes, block scales and global scale, ours."""
    chosen = QUANTIZERS[quantizer]
    scale = global_scale(weight_amax(weight), chosen.headroom)
    return chosen.quantize(weight, scale, mean_square)


def compressed_tensors_task(weight: torch.Tensor) -> Callable[[], object] | None:
    """The same with compressed-tensors' own functions; None where its API is another."""
    try:
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.quantization import preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    except ImportError:
        return None
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])

    def task() -> object:
        blocks = weight.view(weight.shape[0], -1, 16)
        low, high = blocks.amin(-1), blocks.amax(-1)
        scale = generate_gparam(low.amin().reshape(1), high.amax().reshape(1))
        block_scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=scale)
        state = {"weight": weight, "weight_scale": block_scale, "weight_zero_point": zero, "weight_global_scale": scale}
        return NVFP4PackedCompressor.compress(state, scheme)

    return task


def measure(tasks: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each task; one untimed turn first."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    calls = 10 if device.startswith("cuda") else 1  # a GPU is fed ahead, as convert does
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            synchronize(device)
            started = time.perf_counter()
            for _ in range(calls):
                task()
            synchronize(device)
            if turn:
                times[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def floor_seconds(weight: torch.Tensor, repeats: int) -> float | None:
    """Time of the bytes that must move on a GPU, at the speed of a copy on it."""
    if not weight.is_cuda:
        return None
    target = torch.empty_like(weight)
    copy = measure({"copy": lambda: target.copy_(weight)}, repeats, "cuda")["copy"]
    bytes_each_second = 2 * weight.nbytes / copy
    return (2 * weight.nbytes + weight.numel() * 9 / 16) / bytes_each_second


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """What it ran on."""
    return (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{platform.processor() or platform.machine()}, CPU"
    )


def show(report: dict[str, object], elements: int) -> None:
    """A table."""
    seconds = report["seconds"]
    assert isinstance(seconds, dict)
    reference = seconds.get("compressed-tensors")
    print(f"{report['machine']}, torch {report['torch']}, {report['threads']} threads, BF16 matrix {report['matrix']}")
    for name, value in seconds.items():
        ratio = f"{reference / value:6.2f} x compressed-tensors' speed" if reference else ""
        print(f"{name:<24} {value * 1e3:9.3f} ms {elements / value / 1e9:8.2f} G weights/s {ratio}")
    if report["floor_seconds"]:
        print(f"{'floor (memory traffic)':<24} {report['floor_seconds'] * 1e3:9.3f} ms")  # type: ignore[operator]


if __name__ == "__main__":
    main()
