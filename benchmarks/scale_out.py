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
import shutil
from pathlib import Path

import common
from gemma4 import IDS_NAME, census
from nvquant.checkpoint.digest import file_sha256


def main() -> None:
    """Measure, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    common.add_processes_option(parser, [1, 2])
    common.add_work_options(parser, layers=6)
    common.add_tool_options(parser, peers="", recipe="nvfp4", repeats=1)
    options = parser.parse_args()
    info = common.machine()
    options.device = "cuda" if info["gpu"] else "cpu"
    work = census(options.layers, options.samples * options.sequence_length)
    common.check_room(options.folder, 2 * work["source_bytes"])
    source, output, ids = options.folder / "source", options.folder / "out", options.folder / IDS_NAME
    runs: dict[str, common.Json] = {}
    try:
        common.make_source(source, options)
        for quantizer in options.quantizers:
            for processes in options.processes:
                turns = [
                    common.convert(source, output, ids, options, quantizer, processes) for _ in range(options.repeats)
                ]
                runs[f"{quantizer}, {processes}"] = common.median_run(turns) | {"sha256": shards_sha256(output)}
    finally:
        for folder in (source, output):
            shutil.rmtree(folder, ignore_errors=True)
        ids.unlink(missing_ok=True)
    report = {
        "benchmark": "scale_out",
        "machine": info,
        "versions": common.versions(),
        "work": {"description": common.work_words(options), "recipe": options.recipe, **work},
        "runs": runs,
    }
    common.write_report(report, options.json)
    common.print_report(report)
    if not all([compare(runs, quantizer, options.processes) for quantizer in options.quantizers]):
        raise SystemExit("the bytes depend on the number of processes")


def shards_sha256(folder: Path) -> dict[str, str]:
    """sha256 of every shard of a checkpoint, by name."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def compare(runs: dict[str, common.Json], quantizer: str, processes: list[int]) -> bool:
    """Print how much faster the larger numbers of processes are than the first; whether all gave the same bytes."""
    first = runs[f"{quantizer}, {processes[0]}"]
    is_equal = True
    for count in processes[1:]:
        other = runs[f"{quantizer}, {count}"]
        is_same = other["sha256"] == first["sha256"]
        is_equal &= is_same
        print(
            f"{quantizer}: {count} processes {first['seconds'] / other['seconds']:.2f} x as fast as {processes[0]}, "
            f"{'the same bytes' if is_same else 'OTHER BYTES'}"
        )
    return is_equal


if __name__ == "__main__":
    main()
