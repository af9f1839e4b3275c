"""Convert a few decoder layers of Gemma 4 31B's real shapes, beside one plain forward of the same tokens through the
same layers, beside the peers, and beside what the devices' speeds allow.

usage: python benchmarks/gemma4_slice.py FOLDER [--layers 6] [--samples 128] [--sequence-length 2048] [--recipe nvfp4]
           [--peers llmcompressor,modelopt] [--python-peer modelopt=PYTHON] [--json FILE]

FOLDER (on a RAM disk such as /dev/shm, so that the disk is not what is measured) gets a random checkpoint, 9.83 GB for
six layers, and one output at a time; all are removed at the end. Each tool runs in a process of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import common
from gemma4 import IDS_NAME, census


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    common.add_work_options(parser, layers=6)
    parser.add_argument("--batches", default="1,16", help="of the plain forward; the first is the one compared with")
    parser.add_argument("--keep", action="store_true", help="leave the source, for a second run in the same folder")
    common.add_tool_options(parser, peers="llmcompressor,modelopt", recipe="nvfp4", repeats=2)
    options = parser.parse_args()
    info = common.machine()
    options.device = "cuda" if info["gpu"] else "cpu"
    work = census(options.layers, options.samples * options.sequence_length)
    common.check_room(options.folder, 2 * work["source_bytes"])
    source, output, ids = options.folder / "source", options.folder / "out", options.folder / IDS_NAME
    try:
        runs, speeds = measure(options, source, output, ids)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
            ids.unlink(missing_ok=True)
    output_bytes = runs[f"nvquant {options.quantizers[0]}"]["tensor_bytes"]
    report = {
        "benchmark": "gemma4_slice",
        "machine": info,
        "versions": common.versions(),
        "work": {
            "description": common.work_words(options),
            "recipe": options.recipe,
            "tokens": options.samples * options.sequence_length,
            "output_bytes": output_bytes,
            **work,
        },
        "speeds": speeds,
        "floor": common.floor_seconds(work, output_bytes, speeds),
        "runs": runs,
    }
    common.print_report(report)
    common.write_report(report, options.json)


def measure(
    options: argparse.Namespace, source: Path, output: Path, ids: Path
) -> tuple[dict[str, common.Json], dict[str, float]]:
    """All runs, and the speeds of the devices."""
    if not (options.keep and source.exists()):
        common.make_source(source, options)
    floors = [sys.executable, common.HERE / "floors.py", source, options.folder, "--device", options.device]
    speeds = common.speeds(common.run_child(floors, label="speeds of the devices"))
    forward = [sys.executable, common.HERE / "forward.py", source, ids, "--device", options.device]
    forward += ["--batches", options.batches, "--repeats", options.repeats]
    runs = {"plain forward": common.run_child(forward, label="plain forward")}
    for batch, seconds in list(runs["plain forward"]["seconds_by_batch"].items())[1:]:
        runs[f"plain forward, {batch} at a time"] = {"seconds": seconds}
    for quantizer in options.quantizers:
        turns = [common.convert(source, output, ids, options, quantizer) for _ in range(options.repeats)]
        runs[f"nvquant {quantizer}"] = common.median_run(turns)
    shutil.rmtree(output, ignore_errors=True)
    for name in options.peers:
        runs[name] = common.peer(name, source, output, ids, options)
    return runs, speeds


if __name__ == "__main__":
    main()
