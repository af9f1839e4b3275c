"""Convert the whole of Gemma 4 31B's shapes (60 layers, 62.5 GB, random weights), its source cold on the disk.

usage: python benchmarks/whole_31b.py --source DIR --output DIR [--steps make,speeds,forward,convert,verify]
           [--quantizers mse] [--processes 1,2] [--json FILE]

  make     writes the checkpoint to SOURCE/gemma-4-31b in shards of at most 5 GB, synced, and the token ids beside
  speeds   drops the source from the page cache (proved with mincore), reads 4 GB of it cold, writes 2 GB to OUTPUT,
           copies pinned host memory to the GPU, multiplies bfloat16 matrices
  forward  the plain forward of the same tokens through all layers, the model whole on the GPU, one sequence at a
           time, transformers, sdpa, no head. Its weights are made there (same shapes, same distribution) instead of
           being read for a minute: the time does not depend on their values, and loading is not counted
  convert  drops the source from the page cache again and runs `nvquant convert` into OUTPUT/out, with each number of
           processes (a GPU each)
  verify   runs `nvquant verify OUTPUT/out --stage structure --against` the source

With --recipe nvfp4-a16 nothing is calibrated, no forward runs, and a CPU will do (--device cpu); --layers N cuts the
model where the disk is smaller.

Steps may be spread over several calls on one machine: OUTPUT/whole_31b.json keeps what earlier ones measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import common
import disk
from gemma4 import IDS_NAME, census

EXPECTED = {"nvfp4": (1728, 32_633_255_032), "nvfp4-full": (2418, 20_446_509_992)}  # tensors, their bytes
WHOLE = 60


def main() -> None:
    """Run the steps, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    common.add_work_options(parser, layers=WHOLE)
    parser.add_argument("--steps", type=common.split_commas, default=list(STEPS))
    common.add_processes_option(parser, [1])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    common.add_tool_options(parser, peers="", recipe="nvfp4", repeats=1)
    parser.set_defaults(quantizers=["mse"])
    options = parser.parse_args()
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        parser.error(f"--steps {','.join(unknown)}: the steps are {','.join(STEPS)}")
    options.model = options.source / "gemma-4-31b"
    options.ids = options.source / IDS_NAME
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "whole_31b.json"
    report = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else start_report(options)
    for step in [step for step in STEPS if step in options.steps]:
        STEPS[step](options, report)
        kept.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finish(report)
    common.write_report(report, options.json)


def start_report(options: argparse.Namespace) -> common.Json:
    """Machine, versions and the work, before any step."""
    tokens = options.samples * options.sequence_length
    words = f"{common.work_words(options)}, from a cold disk"
    work = {"description": words, "recipe": options.recipe, "layers": options.layers, "tokens": tokens}
    work.update(census(options.layers, tokens))
    return {
        "benchmark": "data_free" if options.recipe == common.DATA_FREE else "whole_31b",
        "machine": common.machine(),
        "versions": common.versions(),
        "work": work,
        "speeds": {},
        "runs": {},
    }


def make(options: argparse.Namespace, report: common.Json) -> None:
    """Write the source where it is not there yet."""
    present = sum(path.stat().st_blocks * 512 for path in options.model.glob("*.safetensors"))
    common.check_room(options.source, report["work"]["source_bytes"] - present)
    report["make"] = common.make_source(options.model, options)
    print(f"written in {report['make']['seconds']:.0f} s", file=sys.stderr)


def speeds(options: argparse.Namespace, report: common.Json) -> None:
    """Speeds of the devices, the disk's with nothing in the page cache."""
    report["resident_share_before_speeds"] = drop(options.model)
    command = [sys.executable, common.HERE / "floors.py", options.model, options.output, "--device", options.device]
    report["speeds"] = common.speeds(common.run_child(command, label="speeds of the devices"))


def forward(options: argparse.Namespace, report: common.Json) -> None:
    """The plain forward through all layers, where the conversion computes one."""
    if options.recipe == common.DATA_FREE:
        return
    command = [sys.executable, common.HERE / "forward.py", options.model, options.ids, "--device", options.device]
    command += ["--repeats", options.repeats, "--made-on-device"]
    report["runs"]["plain forward"] = common.run_child(command, label="plain forward")


def convert(options: argparse.Namespace, report: common.Json) -> None:
    """One conversion a quantizer and number of processes, each from the cold source."""
    for quantizer, processes in product(options.quantizers, options.processes):
        resident = drop(options.model)
        run = common.convert(options.model, options.output / "out", options.ids, options, quantizer, processes)
        run["source_resident_share"] = resident
        report["runs"][f"nvquant {quantizer}" + (f", {processes} GPUs" if processes > 1 else "")] = run
        report["work"]["output_bytes"] = run["tensor_bytes"]
        found = (run["tensors"], run["tensor_bytes"])
        if options.layers == WHOLE and found != EXPECTED.get(options.recipe, found):
            raise SystemExit(f"{found[0]} tensors of {found[1]:,} bytes instead of {EXPECTED[options.recipe]}")


def verify(options: argparse.Namespace, report: common.Json) -> None:
    """The structure of the last output, every weight against the source's."""
    command = [sys.executable, "-m", "nvquant", "verify", options.output / "out", "--against", options.model]
    document = common.run_child([*command, "--stage", "structure", "--json"], label="verify")
    report["verify"] = {"seconds": document["wall_seconds"], "passed": document["passed"]}


STEPS: dict[str, Callable[[argparse.Namespace, common.Json], None]] = {
    "make": make,
    "speeds": speeds,
    "forward": forward,
    "convert": convert,
    "verify": verify,
}


def drop(folder: Path) -> float:
    """Drop the source from the page cache; the share that stayed, which is said aloud."""
    share = disk.drop_from_cache(sorted(folder.glob("*.safetensors")))
    print(f"... {100 * share:.2f} % of the source are in the page cache", file=sys.stderr, flush=True)
    return share


def finish(report: common.Json) -> None:
    """Floors from what was measured, and the table."""
    work = report["work"]
    if report["speeds"] and "output_bytes" in work:
        report["floor"] = common.floor_seconds(work, work["output_bytes"], report["speeds"])
    common.print_report(report)
    if "verify" in report:
        word = "passed" if report["verify"]["passed"] else "FAILED"
        print(f"verify --stage structure {word} in {report['verify']['seconds']:.1f} s")


if __name__ == "__main__":
    main()
