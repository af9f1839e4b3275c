"""The plain forward that conversions are held against: the same tokens through the same decoder layers, no head.

usage: python benchmarks/forward.py SOURCE IDS [--device cpu|cuda] [--batches 1,16] [--repeats 3] [--made-on-device]

transformers' own model, sdpa, no cache, bfloat16 on a GPU and float32 on the CPU, whole on the device. What is timed is
the base model's forward of all sequences of IDS (safetensors `input_ids`), a batch at a time, up to the last hidden
state and with the GPU waited for; loading is not, nor two sequences of warm-up. `seconds` is the median for the first
batch size. With --made-on-device the weights are not read from SOURCE, which needs only its config then: they are made
on the device, as gemma4.py makes them (the time does not depend on the values), and the vision tower is left out.
Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--made-on-device", action="store_true")
    options = parser.parse_args()
    started = time.perf_counter()
    model = base_model(options.source, options.device, options.made_on_device).eval().requires_grad_(False)
    rows = load_file(options.ids)["input_ids"].to(options.device)
    synchronize()
    load = time.perf_counter() - started
    all_seconds = {size: [run(model, rows, size) for _ in range(options.repeats)] for size in options.batches}
    medians = {size: statistics.median(seconds) for size, seconds in all_seconds.items()}
    document: dict[str, Any] = {
        "seconds": medians[options.batches[0]],
        "all_seconds": all_seconds[options.batches[0]],
        "seconds_by_batch": medians,
        "load_seconds": load,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved() if options.device == "cuda" else 0,
    }
    print(json.dumps(document))


def base_model(source: Path, device: str, made_on_device: bool) -> nn.Module:
    """Embedding, decoder layers and last norm, on the device."""
    config = AutoConfig.from_pretrained(source)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if not made_on_device:
        where = {"dtype": dtype, "device_map": device, "attn_implementation": "sdpa"}
        model: nn.Module = auto.from_pretrained(source, **where).model
        return model
    from accelerate import init_empty_weights
    from gemma4 import random_weight

    with init_empty_weights(include_buffers=False):
        whole = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=dtype, attn_implementation="sdpa")
    seed = 0
    for module in whole.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = random_weight(tuple(parameter.shape), device, seed).to(dtype)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            seed += 1
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    base: nn.Module = whole.model
    return base


@torch.no_grad()
def run(model: nn.Module, rows: torch.Tensor, batch: int) -> float:
    """Seconds of one forward of all rows, `batch` at a time."""
    for part in rows[: 2 * batch].split(batch):
        model(input_ids=part, use_cache=False)
    synchronize()
    started = time.perf_counter()
    for part in rows.split(batch):
        model(input_ids=part, use_cache=False)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
