"""`nvquant plan` on the 31B: exact numbers from the command line, quickly, in little memory, without its weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_gemma4 import BYTES_31B, TENSORS_31B, write_synthetic_gemma4

# At its end the process says how many bytes it has read, its own modules included, and its peak memory. (What wait4
# tells of a child begins at the memory of the process that started it.)
WITH_ACCOUNT = """
import atexit, sys, pathlib
def account():
    peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(pathlib.Path("/proc/self/io").read_text().split()[1], peak.split()[1], file=sys.stderr)
atexit.register(account)
from nvquant.cli.main import main
main(sys.argv[1:])
"""
EXPECTED = {
    "nvfp4": (1728, 32_633_255_032, 180),
    "nvfp4-full": (2418, 20_446_509_992, 410),
    "nvfp4-a16": (2008, 20_446_508_352, 410),
    "nvfp4-fp8": (1958, 24_160_822_392, 410),
}


@dataclass(frozen=True)
class Run:
    document: dict[str, Any]
    seconds: float
    peak_bytes: int
    read_bytes: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_gemma4(tmp_path_factory.mktemp("models") / "gemma-4-31b")


@pytest.fixture(scope="module", params=list(EXPECTED))
def run(request: pytest.FixtureRequest, model: Path) -> Run:
    return run_plan(model, "--recipe", request.param)


def run_plan(model: Path, *options: str) -> Run:
    command = [sys.executable, "-c", WITH_ACCOUNT, "plan", str(model), *options, "--json"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read_bytes, peak_kib = done.stderr.split()[-2:]
    return Run(json.loads(done.stdout), time.monotonic() - started, int(peak_kib) * 1024, int(read_bytes))


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/io")


@linux
def test_the_numbers_of_the_31b_are_exact(run: Run) -> None:
    recipe = run.document["recipe"]
    assert tuple(run.document[key] for key in ("tensors", "tensor_bytes", "quantized")) == EXPECTED[recipe]
    assert run.document["format"] == "compressed-tensors"
    groups = run.document["groups"]
    assert sum(group["tensors"] for group in groups) == EXPECTED[recipe][0]
    assert sum(group["bytes_out"] for group in groups) == EXPECTED[recipe][1]
    assert sum(group["bytes_in"] for group in groups) == BYTES_31B
    fits = {fit["gpu"]: fit["fits"] for fit in run.document["fits"]}
    assert fits["RTX 5090"] == (recipe != "nvfp4")
    assert fits["H100 80 GB"]


@linux
def test_it_takes_under_a_minute_and_a_gigabyte(run: Run) -> None:
    assert run.seconds < 60
    assert run.peak_bytes < 1_000_000_000


@linux
def test_no_weight_is_read(run: Run, model: Path) -> None:
    headers = sum(path.stat().st_blocks * 512 for path in model.iterdir())
    assert headers < 2_000_000, "the shards are holes"
    # Python's own modules come to some 20 MB, to 140 MB with the model's code where the recipe calibrates; the smallest
    # MLP matrix alone has 231 MB.
    assert run.read_bytes < (60_000_000 if run.document["recipe"] == "nvfp4-a16" else 200_000_000)


@linux
def test_the_comparison_of_all_recipes_takes_no_more_memory_and_reads_no_weight(model: Path) -> None:
    run = run_plan(model, "--context", "65536", "--users", "8", "--kv-cache", "fp8")
    rows = {row["recipe"]: row["weight_bytes"] for row in run.document["serving"]["rows"]}
    expected: dict[str | None, int] = {name: size for name, (_, size, _) in EXPECTED.items()}
    assert {name: rows[name] for name in expected} == expected
    assert rows[None] == BYTES_31B
    assert run.peak_bytes < 1_000_000_000
    assert run.read_bytes < 200_000_000


def test_the_synthetic_source_is_the_census_that_it_claims_to_be(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == TENSORS_31B
    assert index["metadata"]["total_size"] == BYTES_31B


@linux
def test_words_for_people_name_the_recipe_that_fits_a_smaller_card(model: Path) -> None:
    command = [sys.executable, "-m", "nvquant", "plan", str(model), "--recipe", "nvfp4", "--no-gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "180 matrices quantized, 32,633,255,032 bytes of tensors in 61 files." in done.stdout
    assert "With recipe nvfp4-fp8 (24.16 GB) it fits RTX 5090 too." in done.stdout
    assert "With recipe nvfp4-full (20.45 GB) it fits RTX 4090, RTX 5090 too." in done.stdout
    assert "and 0.0 MB of GPU memory." in done.stdout
