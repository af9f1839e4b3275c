"""Convert a few decoder layers of Gemma 4 31B's real shapes, beside one plain forward of the same tokens through the
same layers.

usage: python benchmarks/gemma4_slice.py FOLDER [--layers 6] [--samples 128] [--sequence-length 2048] [--recipe nvfp4]
           [--json FILE]

FOLDER (a RAM disk such as /dev/shm, so that the disk is not what is measured) gets a random checkpoint with the real
names
and shapes, 9.83 GB for six layers, and the outputs; both are removed at the end. Each tool runs in a process of its
own.
The plain forward is transformers' own (sdpa, no head, one sequence at a time), without loading.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import open_checkpoint, tensor_bytes, torch_dtype
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.synthetic_gemma4 import write_synthetic_gemma4

VOCABULARY = 4000  # ids below it: only these embedding rows are asked for


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--recipe", default="nvfp4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain-forward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    source, ids = options.folder / "source", options.folder / "ids.safetensors"
    if options.plain_forward:
        print(json.dumps(plain_forward(source, ids)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_synthetic_gemma4(source, layers=options.layers, sparse=True)
    fill_with_noise(source, device)
    rows = torch.randint(
        10, VOCABULARY, (options.samples, options.sequence_length), generator=torch.Generator().manual_seed(0)
    )
    rows[:, 0] = 2
    save_file({"input_ids": rows}, ids)
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "layers": options.layers,
        "tokens": rows.numel(),
        "plain_forward": run([sys.executable, __file__, str(options.folder), "--plain-forward"]),
    }
    for quantizer in ("rtn", "mse"):
        output = options.folder / f"out-{quantizer}"
        arguments = [
            "--recipe",
            options.recipe,
            "--quantizer",
            quantizer,
            "--calibration",
            str(ids),
            "-o",
            str(output),
            "--json",
        ]
        sizes = ["--samples", str(options.samples), "--sequence-length", str(options.sequence_length)]
        report[quantizer] = run([sys.executable, "-m", "nvquant", "convert", str(source), *arguments, *sizes])
        shutil.rmtree(output)
    shutil.rmtree(source)
    ids.unlink()
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def fill_with_noise(folder: Path, device: str) -> None:
    """Random weights of a plausible size, in place; norms and buffers 1."""
    generator = torch.Generator(device).manual_seed(0)
    checkpoint = open_checkpoint(folder)
    for name, info in checkpoint.infos().items():
        values = torch.ones(info.shape, dtype=torch_dtype(info.dtype), device=device)
        if len(info.shape) > 1:
            values.normal_(std=0.02, generator=generator)
        with checkpoint.path(name).open("r+b") as file:
            os.pwrite(file.fileno(), tensor_bytes(values.cpu()), info.begin)


def plain_forward(source: Path, ids: Path) -> dict[str, float]:
    """Seconds of one forward of all sequences, the model whole on the device; two sequences of warm-up first."""
    import time

    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, device_map=device, attn_implementation="sdpa"
    ).eval()
    rows = load_file(ids)["input_ids"].to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        for row in rows[:2]:
            model.model(input_ids=row[None], use_cache=False)
        wait()
        started = time.perf_counter()
        for row in rows:
            model.model(input_ids=row[None], use_cache=False)
        wait()
    return {"seconds": time.perf_counter() - started}


def run(command: list[str]) -> dict[str, Any]:
    """Run a command that prints one JSON document."""
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return document


def show(report: dict[str, Any]) -> None:
    """A table."""
    print(f"{report['machine']}, torch {report['torch']}: {report['layers']} layers, {report['tokens']:,} tokens")
    forward = report["plain_forward"]["seconds"]
    print(f"{'plain forward':<16} {forward:7.1f} s")
    for quantizer in ("rtn", "mse"):
        result = report[quantizer]
        host, gpu = result["peak_host_bytes"] / 1e9, result["peak_gpu_bytes"] / 1e9
        speed = f"{result['seconds']:7.1f} s {result['seconds'] / forward:6.2f} x forward"
        print(f"{'convert ' + quantizer:<16} {speed}, host {host:.2f} GB, GPU {gpu:.2f} GB")


if __name__ == "__main__":
    main()
