"""Quantize-and-pack, amax and input statistics of one matrix, against the bytes that must move and against
compressed-tensors.

usage: python benchmarks/kernel_speed.py [--rows 21504] [--cols 5376] [--tokens 2048] [--device cpu|cuda] [--repeats 7]
           [--threads N] [--json FILE]

Every number is the median of the repeats, the tasks taken in turn (ours, theirs, ours, ...) in one process on the same
data. Quantizing starts from the BF16 weight and ends with packed codes, block scales and the global scale, as convert
does for a matrix of its own. The floor is the time of the bytes that must move at the speed of a copy of the weight on
the same device: the weight read once for its amax and once to be quantized, codes and scales written; the inputs read
once. On the CPU inputs are float32, as convert computes there, on a GPU bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from nvquant.calibrate.statistics.ranges import InputRanges
from nvquant.format.blocks import weight_amax
from nvquant.format.scales import global_scale
from nvquant.quantizers import QUANTIZERS
from nvquant.quantizers.mse import sweep_blocks
from nvquant.quantizers.rtn import round_blocks

Task = Callable[[], object]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=21504)
    parser.add_argument("--cols", type=int, default=5376)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(options.rows, options.cols, generator=generator) * 0.02).bfloat16().to(options.device)
    mean_square = torch.rand(options.cols, generator=generator, dtype=torch.float64)
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    inputs = torch.randn(1, options.tokens, options.cols, generator=generator).to(options.device, dtype)
    seconds = measure(tasks_for(weight, mean_square, inputs), options.repeats, weight.is_cuda)
    speed = 2 * weight.nbytes / seconds.pop("copy of the weight")
    packed_bytes = weight.numel() * 9 // 16
    floors = {
        "weight amax": weight.nbytes,
        "quantize": 2 * weight.nbytes + packed_bytes,
        "statistics": inputs.nbytes,
    }
    floor = {name: moved / speed for name, moved in floors.items()}
    info = common.machine()
    report = {
        "benchmark": "kernels",
        "machine": {**info, "gpu": info["gpu"] if weight.is_cuda else None},
        "versions": common.versions(),
        "work": {
            "description": f"BF16 {list(weight.shape)}, inputs {list(inputs.shape)} {inputs.dtype}",
            "weight": list(weight.shape),
            "inputs": list(inputs.shape),
            "threads": torch.get_num_threads(),
        },
        "copy_bytes_per_second": speed,
        "floor_seconds": floor,
        "seconds": seconds,
    }
    show(report)
    common.write_report(report, options.json)


def tasks_for(weight: torch.Tensor, mean_square: torch.Tensor, inputs: torch.Tensor) -> dict[str, Task]:
    """What is timed, by name; the names begin with what their floor is called."""
    target = torch.empty_like(weight)
    tasks: dict[str, Task] = {
        "copy of the weight": lambda: target.copy_(weight),
        "weight amax": lambda: weight_amax(weight),
        "quantize: nvquant rtn": lambda: quantize("rtn", weight, None),
        "quantize: nvquant mse": lambda: quantize("mse", weight, None),
        "quantize: nvquant mse, weighted": lambda: quantize("mse", weight, mean_square),
        "statistics": lambda: observe(inputs, wants_mean_square=False),
        "statistics with mean squares": lambda: observe(inputs, wants_mean_square=True),
    }
    peer = compressed_tensors_task(weight)
    if peer is not None:
        tasks["quantize: compressed-tensors"] = peer
    return tasks


def quantize(quantizer: str, weight: torch.Tensor, mean_square: torch.Tensor | None) -> object:
    """Weight to codes, block scales and global scale, ours."""
    scale = global_scale(weight_amax(weight), QUANTIZERS[quantizer].claim.headroom)
    return round_blocks(weight, scale) if quantizer == "rtn" else sweep_blocks(weight, scale, mean_square)


_ranges: dict[bool, InputRanges] = {}


def observe(inputs: torch.Tensor, *, wants_mean_square: bool) -> None:
    """One batch taken in by a statistic that lives on, as in convert."""
    ranges = _ranges.setdefault(wants_mean_square, InputRanges(wants_mean_square))
    ranges.observe({"source": inputs})
    ranges.commit()


def compressed_tensors_task(weight: torch.Tensor) -> Task | None:
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


def measure(tasks: dict[str, Task], repeats: int, on_gpu: bool) -> dict[str, float]:
    """Median seconds of each task; one untimed turn first."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    calls = 10 if on_gpu else 1  # a GPU is fed ahead, as convert does
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            wait()
            started = time.perf_counter()
            for _ in range(calls):
                task()
            wait()
            if turn:
                times[name].append((time.perf_counter() - started) / calls)
    return {name: common.median(values) for name, values in times.items()}


def show(report: common.Json) -> None:
    """A table."""
    info = report["machine"]
    where = info["gpu"] or f"{info['cpu']}, {report['work']['threads']} threads"
    print(f"kernels on {where}; torch {report['versions']['torch']}; {report['work']['description']}")
    print(f"copy: {report['copy_bytes_per_second'] / 1e9:.1f} GB/s, bytes read and written")
    print(common.format_table(common.KERNEL_HEADER, common.kernel_rows(report)))


if __name__ == "__main__":
    main()
