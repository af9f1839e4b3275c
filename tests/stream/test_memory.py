"""Memory: a conversion holds a few layers, however many the model has, and says truly how much it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvquant.convert.options import ConvertResult
from nvquant.stream.memory import ALLOCATOR_VARIABLES, peak_gpu_bytes, peak_host_bytes
from support.conversions import edit_config, random_samples, write_ids
from support.raw_safetensors import read_raw, write_raw
from support.tiny_models import tiny_llama

HIDDEN, INTERMEDIATE = 512, 4096
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)  # 14.7 MB in BF16
FEW, MANY = 4, 28
STATUS = Path("/proc/self/status")

# Linux counts a process's peak from before exec too, so a child started by a large process begins large; hence a
# small process between, which starts the command, waits for it and prints what the system counted.
LAUNCHER = """
import resource, subprocess, sys
ran = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.stdout.flush()
sys.stdout.buffer.write(ran.stdout)
"""


def write_source(folder: Path, layers: int) -> Path:
    """A Llama whose layers are all the same: making so many random ones would take most of the test's time."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "head_dim": 64}
    heads = {"num_attention_heads": HIDDEN // 64, "num_key_value_heads": HIDDEN // 64}
    tiny_llama(folder, num_layers=1, shards=1, base=True, **sizes, **heads)
    entries, data = read_raw(folder / "model.safetensors")
    start = "model.layers.0."
    first = {name: entries.pop(name) for name in list(entries) if name.startswith(start)}
    pieces, position = [data], len(data)
    entries |= first
    for layer in range(1, layers):
        for name, entry in first.items():
            begin, end = entry["data_offsets"]
            moved = [position, position + end - begin]
            entries[f"model.layers.{layer}.{name.removeprefix(start)}"] = {**entry, "data_offsets": moved}
            pieces.append(data[begin:end])
            position = moved[1]
    write_raw(folder / "model.safetensors", entries, b"".join(pieces))
    return edit_config(folder, num_hidden_layers=layers)


def measure(folder: Path, layers: int) -> tuple[int, ConvertResult]:
    """Convert a model of so many layers in a process of its own: the system's peak, and the command's document."""
    source = write_source(folder / f"source-{layers}", layers)
    ids = write_ids(folder / "ids.jsonl", random_samples((32, 32)))
    command = [sys.executable, "-m", "nvquant", "convert", source, "-o", folder / f"out-{layers}"]
    command += ["--recipe", "nvfp4-full", "--quantizer", "rtn", "--device", "cpu", "--json"]
    command += ["--calibration", ids, "--samples", "2", "--sequence-length", "32"]
    ran = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counted, _, document = ran.stdout.partition("\n")
    return int(counted), ConvertResult(**json.loads(document))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, ConvertResult]]:
    folder = tmp_path_factory.mktemp("memory")
    return {layers: measure(folder, layers) for layers in (FEW, MANY)}


def test_peak_host_memory_does_not_grow_with_the_number_of_layers(
    runs: dict[int, tuple[int, ConvertResult]],
) -> None:
    # Allocators and threads move a peak by two layers and more, so what is not held is many times that.
    assert runs[MANY][1].tensor_bytes - runs[FEW][1].tensor_bytes > 6 * LAYER_BYTES  # at a quarter of their size
    assert abs(runs[MANY][0] - runs[FEW][0]) < 4 * LAYER_BYTES


@pytest.mark.parametrize("layers", [FEW, MANY])
def test_the_peak_of_the_document_is_what_the_system_counted(
    runs: dict[int, tuple[int, ConvertResult]], layers: int
) -> None:
    counted, result = runs[layers]
    assert result.peak_host_bytes == pytest.approx(counted, rel=0.03)


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell a process's present size")
def test_the_peak_counts_what_this_process_touched() -> None:
    # In a process of its own: here earlier tests have left memory that comes and goes.
    code = """
import torch
from nvquant.stream.memory import peak_host_bytes
before = peak_host_bytes()
block = torch.ones(512 << 20, dtype=torch.uint8)
during = peak_host_bytes()
del block
print(before, during, peak_host_bytes())
"""
    # Started by a small process: a child's peak begins at the size of the process that started it.
    ran = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    before, during, after = map(int, ran.stdout.split()[1:])
    assert before + (448 << 20) < during < before + (576 << 20)
    assert after > before + (448 << 20)  # a peak, not the present


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_its_peak_is_zero() -> None:
    assert peak_gpu_bytes() == 0


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell a process's present size")
def test_the_peak_is_not_counted_again_for_a_child() -> None:
    block = torch.ones(256 << 20, dtype=torch.uint8)
    before = peak_host_bytes()
    subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
    assert peak_host_bytes() < before + (32 << 20)
    del block


ALLOCATOR = """
import torch
from nvquant.stream.memory import let_gpu_memory_grow
let_gpu_memory_grow()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(torch._C, "_accelerator_getAllocatorSettings"),
    reason="this PyTorch does not show the settings of its allocator",
)
@pytest.mark.parametrize(("own", "expected"), [(None, "expandable_segments:True"), ("", "")])
def test_gpu_memory_grows_unless_the_user_set_the_allocator(own: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    if own is not None:
        environment["PYTORCH_ALLOC_CONF"] = own
    ran = subprocess.run([sys.executable, "-c", ALLOCATOR], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == expected, ran.stderr
