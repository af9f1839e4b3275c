"""Convert SmolLM2-135M on the CPU, beside the plain forward of the same tokens and beside the peers.

usage: python benchmarks/smollm2_cpu.py FOLDER [--threads 2] [--samples 16] [--sequence-length 512] [--repeats 5]
           [--peers llmcompressor,modelopt] [--python-peer modelopt=PYTHON] [--json FILE]

FOLDER gets the model (built by `nvquant.demo.smollm2` unless FOLDER/smollm2 is there), random token ids and one output
at a time. Every run is a process of its own, bound to as many cores as it has threads. The runs of ours and
of the plain forward take turns, and the median of each counts; a peer runs once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import common


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    common.add_tool_options(parser, peers="llmcompressor,modelopt", recipe="nvfp4-full", repeats=3)
    options = parser.parse_args()
    options.device = "cpu"
    info = common.machine()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the children, all of them
    source, ids = options.folder / "smollm2", options.folder / "ids.safetensors"
    prepare(source, ids, options)
    turns: dict[str, list[common.Json]] = defaultdict(list)
    for _ in range(options.repeats):
        forward = [sys.executable, common.HERE / "forward.py", source, ids, "--device", "cpu", "--repeats", "1"]
        turns["plain forward"].append(common.run_child(forward, label="plain forward"))
        for quantizer in options.quantizers:
            run = common.convert(source, options.folder / "out", ids, options, quantizer)
            turns[f"nvquant {quantizer}"].append(run)
    runs = {name: common.median_run(every) for name, every in turns.items()}
    for name in options.peers:
        runs[name] = common.peer(name, source, options.folder / "out", ids, options)
    tokens = options.samples * options.sequence_length
    report = {
        "benchmark": "smollm2_cpu",
        "machine": {**info, "cores": options.threads},
        "versions": common.versions(),
        "work": {
            "description": f"SmolLM2-135M, {options.recipe}, {options.samples} x {options.sequence_length} tokens, "
            f"{options.threads} threads",
            "recipe": options.recipe,
            "tokens": tokens,
            "threads": options.threads,
        },
        "runs": runs,
    }
    common.print_report(report)
    common.write_report(report, options.json)


def prepare(source: Path, ids: Path, options: argparse.Namespace) -> None:
    """Build the model where it is not there, and write the ids; in a child, which needs torch."""
    options.folder.mkdir(parents=True, exist_ok=True)
    build = ""
    if not (source / "config.json").exists():
        build = f"from nvquant.demo.smollm2 import build_smollm2; build_smollm2(Path({str(source)!r}))"
    code = f"""
import sys; sys.path.insert(0, {str(common.HERE)!r})
from pathlib import Path
from gemma4 import write_ids
write_ids(Path({str(ids)!r}), {options.samples}, {options.sequence_length}, 40000)
{build}
print("{{}}")"""
    common.run_child([sys.executable, "-c", code], label="model and token ids")


if __name__ == "__main__":
    main()
