"""Make, convert, verify, serve and measure the text model of Gemma 4 31B (its shapes, random weights) on a GPU.

usage: python benchmarks/served_31b.py --source DIR --output DIR --vllm COMMAND
           [--steps make,convert,verify,bench] [--recipes nvfp4,nvfp4-full] [--gpus N]
           [--vllm-flag FLAG]... [--json FILE]

  make     writes the checkpoint to SOURCE/gemma-4-31b-text, with a small tokenizer, and token ids beside
  convert  `nvquant convert`, one output a recipe in OUTPUT
  verify   `nvquant verify` of the first output against the source: structure, numerics and serve
  bench    `nvquant bench` of the first output against the others and the source: decode and prefill rates

With --gpus N, N processes convert, a GPU each, and the server splits the model over N GPUs.

Random weights say nothing of words, but all of speed, memory, loading and likelihoods. Steps may be spread over several
calls on one machine: OUTPUT/served_31b.json keeps what earlier ones measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import common
from gemma4 import IDS_NAME
from nvquant.report.document import publishable

SAMPLES, SEQUENCE_LENGTH = 16, 512
PROOFS = ["structure", "numerics", "numerics+serve"]
WORDS = {"convert": "converted", "verify": "proved", "bench": "served"}


def main() -> None:
    """Run the steps, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=common.split_commas, default=list(STEPS))
    parser.add_argument("--recipes", type=common.split_commas, default=["nvfp4", "nvfp4-full"])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--vllm", default="vllm")
    parser.add_argument("--vllm-flag", action="append", default=[])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--proofs", type=common.split_commas, default=PROOFS, help="verify: stages of each of its runs")
    parser.add_argument("--users", default="1,8,32")
    parser.add_argument("--contexts", default="256,1024")
    parser.add_argument("--prompts", type=int, help="bench: requests for each point")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--without-source", action="store_true", help="bench: leave the BF16 model out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a folder gets BENCHMARK-MACHINE.json")
    options = parser.parse_args()
    options.model = options.source / "gemma-4-31b-text"
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "served_31b.json"
    if kept.exists():
        report = json.loads(kept.read_text(encoding="utf-8"))
    else:
        head = {"benchmark": "served_31b", "machine": common.machine(), "versions": common.versions()}
        report = {**head, "work": {"description": "", "tokens": SAMPLES * SEQUENCE_LENGTH}, "convert": {}}
    for step in [step for step in STEPS if step in options.steps]:
        STEPS[step](options, report)
        done = ", ".join(word for key, word in WORDS.items() if report.get(key))
        report["work"]["description"] = f"The text model of Gemma 4 31B, {options.layers} layers: {done}"
        kept.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    common.write_report(report, options.json)


def make(options: argparse.Namespace, report: common.Json) -> None:
    """Write the source."""
    command = [sys.executable, common.HERE / "gemma4.py", options.model, "--layers", options.layers, "--text-only"]
    command += ["--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH]
    report["make"] = common.run_child(command, label="writing the source")


def convert(options: argparse.Namespace, report: common.Json) -> None:
    """One output a recipe."""
    for recipe in options.recipes:
        output = options.output / f"gemma-4-31b-text-{recipe}"
        shutil.rmtree(output, ignore_errors=True)
        command = [*common.nvquant(options.gpus), "convert", options.model, "--recipe", recipe, "-o", output]
        command += ["--calibration", options.source / IDS_NAME, "--samples", SAMPLES]
        command += ["--sequence-length", SEQUENCE_LENGTH, "--device", options.device, "--json"]
        run = common.run_child(command, label=f"convert {recipe}")
        del run["output"]  # a path of this machine
        report["convert"][recipe] = run
        print(f"{recipe}: {run['tensor_bytes']:,} bytes in {run['wall_seconds']:.0f} s", file=sys.stderr)


def verify(options: argparse.Namespace, report: common.Json) -> None:
    """All stages on the first output; each stage's time by itself."""
    checkpoint = options.output / f"gemma-4-31b-text-{options.recipes[0]}"
    report["verify"] = {}
    for proof in options.proofs:
        stages = proof.split("+")
        command = [sys.executable, "-m", "nvquant", "verify", checkpoint, "--against", options.model, "--json"]
        command += [word for stage in stages for word in ("--stage", stage)]
        command += ["--text", options.source / IDS_NAME, "--samples", 2 if "serve" in stages else SAMPLES]
        command += ["--sequence-length", SEQUENCE_LENGTH, "--device", options.device]
        # Random weights have nearly even predictions: that they agree about the likeliest token is not to be asked.
        command += ["--min-top1", 0, "--vllm", options.vllm, *flags(options), "--report", options.output / "proof"]
        run = common.try_child(command, label=f"verify {', '.join(stages)}")
        document = options.output / "proof" / "report.json"
        found = json.loads(document.read_text(encoding="utf-8")) if document.exists() else {}
        report["verify"][proof] = {**run, **without_lists(found)}
        for check in found.get("checks", []):
            word = "ok" if check["passed"] else "FAILED"
            print(f"{word:<7} {check['stage']:<10} {check['name']:<14} {check['detail'][:300]}", file=sys.stderr)
        gigabytes = run.get("peak_rss_bytes", 0) / 1e9
        print(f"{run['wall_seconds']:.1f} s, peak {gigabytes:.2f} GB of host memory", file=sys.stderr)


def without_lists(found: common.Json) -> common.Json:
    """A report of `nvquant verify` without what it says of each layer, matrix and input."""
    numbers = found.get("numerics") or {}
    kept = {key: value for key, value in numbers.items() if key not in ("layers", "matrices", "inputs")}
    return {**found, "numerics": kept or None}


def bench(options: argparse.Namespace, report: common.Json) -> None:
    """The first output against the others and the source."""
    first, *others = [options.output / f"gemma-4-31b-text-{recipe}" for recipe in options.recipes]
    folder = options.output / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "nvquant", "bench", first, "--users", options.users, "-o", folder, "--no-plots"]
    for other in [*others, *([] if options.without_source else [options.model])]:
        command += ["--against", other]
    command += ["--contexts", options.contexts, "--kv-cache-dtype", options.kv_cache_dtype, "--json"]
    if options.prompts:
        command += ["--prompts", options.prompts]
    run = common.try_child([*command, "--vllm", options.vllm, *flags(options)], label="bench")
    kept = folder / "bench.json"
    if kept.exists():
        run = publishable({"bench": json.loads(kept.read_text(encoding="utf-8"))})["bench"]
    report["bench"] = run
    if (folder / "bench.md").exists():
        print((folder / "bench.md").read_text(encoding="utf-8"), file=sys.stderr)


def flags(options: argparse.Namespace) -> list[object]:
    """The GPUs and further flags of the server."""
    return ["--tensor-parallel", options.gpus, *(f"--vllm-flag={flag}" for flag in options.vllm_flag)]


STEPS: dict[str, Callable[[argparse.Namespace, common.Json], None]] = {
    "make": make,
    "convert": convert,
    "verify": verify,
    "bench": bench,
}


if __name__ == "__main__":
    main()
