"""Write a checkpoint with the names, shapes and config of Gemma 4 31B, cut to some layers, with random weights; fast.

usage: python benchmarks/gemma4.py FOLDER --layers 60 [--samples 128 --sequence-length 2048]

Matrices are Gaussian with a few outlier columns, norms and buffers 1, made on the GPU if there is one; several threads
write, and every file is synced. Token ids (`ids.safetensors`, int64 [samples, length]) go beside. Prints one JSON
document: tensors, bytes, seconds, and what a conversion moves and computes.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.synthetic_gemma4 import tensor_shapes, write_synthetic_gemma4
from support.tiny_tokenizer import write_tiny_tokenizer

VOCABULARY = 4000  # ids below it: only these embedding rows are asked for
OUTLIER_COLUMNS, OUTLIER_FACTOR = 8, 6.0
WRITERS = 6
IDS_NAME = "ids.safetensors"


def main() -> None:
    """Write and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--text-only", action="store_true", help="the text model, with a tokenizer: what can be served")
    options = parser.parse_args()
    started = time.perf_counter()
    write_checkpoint(options.folder, options.layers, options.text_only)
    if options.text_only:
        write_tiny_tokenizer(options.folder, "gemma4", vocab_size=VOCABULARY)
    write_ids(options.folder.parent / IDS_NAME, options.samples, options.sequence_length, VOCABULARY)
    seconds = time.perf_counter() - started
    print(json.dumps({**census(options.layers, options.samples * options.sequence_length), "seconds": seconds}))


def census(layers: int, tokens: int) -> dict[str, Any]:
    """What a conversion reads, brings to the device and computes in matrix products of the decoder layers."""
    shapes = tensor_shapes(layers)
    decoder = {name: shape for name, shape in shapes.items() if ".language_model.layers." in name}
    matrices = [shape for shape in decoder.values() if len(shape) == 2]
    return {
        "tensors": len(shapes),
        "source_bytes": 2 * sum(map(prod, shapes.values())),
        "decoder_bytes": 2 * sum(map(prod, decoder.values())),
        "matmul_flop": 2 * tokens * sum(map(prod, matrices)),
    }


def write_checkpoint(folder: Path, layers: int, text_only: bool = False) -> None:
    """Sparse files first, then the data of every tensor into its place."""
    write_synthetic_gemma4(folder, layers=layers, sparse=True, text_only=text_only)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    waiting = threading.Semaphore(2 * WRITERS)
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs: list[Future[None]] = []
        descriptors = {path: os.open(path, os.O_WRONLY) for path in sorted(folder.glob("*.safetensors"))}
        for path, descriptor in descriptors.items():
            for shape, begin in _places(path):
                waiting.acquire()
                job = pool.submit(_write_tensor, descriptor, shape, begin, len(jobs), device)
                job.add_done_callback(lambda _job: waiting.release())
                jobs.append(job)
        for job in jobs:
            job.result()
        list(pool.map(os.fsync, descriptors.values()))
    for descriptor in descriptors.values():
        os.close(descriptor)


def random_weight(shape: tuple[int, ...], device: str, seed: int) -> torch.Tensor:
    """BF16 on the device: vectors 1, matrices Gaussian of deviation 0.02 with some columns six times larger."""
    values = torch.ones(shape, dtype=torch.bfloat16, device=device)
    if len(shape) > 1:
        values.normal_(std=0.02, generator=torch.Generator(device).manual_seed(seed))
        values[..., :: max(1, shape[-1] // OUTLIER_COLUMNS)] *= OUTLIER_FACTOR
    return values


def write_ids(path: Path, samples: int, length: int, vocabulary: int) -> None:
    """Random token ids [samples, length]; every sequence begins with BOS, which is 2."""
    ids = torch.randint(10, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    save_file({"input_ids": ids}, path)


def _places(path: Path) -> list[tuple[tuple[int, ...], int]]:
    """Shape and first byte in the file of each tensor of a shard."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return [(tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]) for entry in entries]


def _write_tensor(descriptor: int, shape: tuple[int, ...], begin: int, seed: int, device: str) -> None:
    values = random_weight(shape, device, seed).cpu()
    data = memoryview(values.flatten().view(torch.uint8).numpy())
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], begin + done)


if __name__ == "__main__":
    main()
