"""Convert a few decoder layers of Gemma 4 31B's real shapes with one process and with several, each on a GPU of its own
where there are GPUs; are the bytes the same, and how much faster is it?

usage: python benchmarks/scale_out.py FOLDER [--processes 1,2] [--layers 6] [--samples 128] [--sequence-length 2048]
           [--quantizers rtn,mse] [--json FILE]

FOLDER (on a RAM disk such as /dev/shm) gets a random checkpoint, 9.83 GB for six layers, and one output at a time; all
are removed at the end. Memory is that of all processes together; the GPU's is that of the first. On a CPU, give every
process as many threads (OMP_NUM_THREADS=1 and as many processes as cores): the last bits of matrix products depend on
how many threads share one.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import common
from gemma4 import IDS_NAME, census


def main() -> None:
    """Measure, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    common.add_tool_options(parser, peers="", recipe="nvfp4", repeats=1)
    options = parser.parse_args()
    info = common.machine()
    options.device = "cuda" if info["gpu"] else "cpu"
    source, output, ids = options.folder / "source", options.folder / "out", options.folder / IDS_NAME
    options.folder.mkdir(parents=True, exist_ok=True)
    make = [sys.executable, common.HERE / "gemma4.py", source, "--layers", options.layers]
    make += ["--samples", options.samples, "--sequence-length", options.sequence_length]
    runs: dict[str, common.Json] = {}
    try:
        common.run_child(make, label="writing the source")
        for quantizer in options.quantizers:
            for processes in options.processes:
                turns = [
                    common.convert(source, output, ids, options, quantizer, processes) for _ in range(options.repeats)
                ]
                run = common.median_run(turns)
                runs[f"{quantizer}, {processes}"] = run | {"processes": processes, "sha256": shards_sha256(output)}
    finally:
        for folder in (source, output):
            shutil.rmtree(folder, ignore_errors=True)
        ids.unlink(missing_ok=True)
    report = {
        "benchmark": "scale_out",
        "machine": info,
        "versions": common.versions(),
        "work": {
            "description": f"{options.layers} layers of Gemma 4 31B, {options.recipe}, "
            f"{options.samples} x {options.sequence_length} tokens",
            **census(options.layers, options.samples * options.sequence_length),
        },
        "runs": runs,
    }
    common.write_report(report, options.json)
    common.print_report(report)
    for quantizer in options.quantizers:
        first, *others = [runs[f"{quantizer}, {processes}"] for processes in options.processes]
        for other in others:
            same = "the same bytes" if other["sha256"] == first["sha256"] else "OTHER BYTES"
            print(
                f"{quantizer}: {other['processes']} processes {first['seconds'] / other['seconds']:.2f} x as fast as "
                f"{first['processes']}, {same}"
            )
    if len({runs[name]["sha256"] for name in runs if name.startswith(options.quantizers[0])}) > 1:
        raise SystemExit("the bytes depend on the number of processes")


def shards_sha256(folder: Path) -> str:
    """One digest of all shards of a checkpoint, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
