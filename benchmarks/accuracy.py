"""Compare the accuracy of nvquant and of its peers: the same calibration tokens, and one judge that none of them wrote.

usage: python benchmarks/accuracy.py ids SOURCE WORK [--text FILE]     writes all token ids
       python benchmarks/accuracy.py run SOURCE WORK [--methods A,B]   converts, one child process a method and seed
       python benchmarks/accuracy.py judge SOURCE WORK                 judges every checkpoint
       python benchmarks/accuracy.py collect SOURCE WORK --name MODEL --json benchmarks/results

The steps may run on different machines. Each skips what it finds done: WORK/ids, WORK/runs/METHOD-SEED.json,
WORK/judged/METHOD-SEED.json. A failure is noted in its file and tried again by the next call. Only `ids` and nvquant's
own methods need nvquant. `python benchmarks/plot.py` then brings the results into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from methods import METHODS, Method, with_more

if TYPE_CHECKING:
    from nvquant.calibrate.samples import CalibrationSet

JUDGE_IDS = "judge.jsonl"
DIGITS = 5  # of a number of one sequence, in the kept results


def main() -> None:
    """One step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("source", type=Path, help="the folder of the BF16 model")
    parser.add_argument("work", type=Path, help="the folder of ids, checkpoints and results")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    ids = parser.add_argument_group("ids")
    ids.add_argument("--samples", type=int, default=256, help="calibration sequences")
    ids.add_argument("--sequence-length", type=int, default=512, help="of calibration and judgement")
    ids.add_argument("--judge-samples", type=int, default=18, help="sequences of each kind, if so many are there")
    ids.add_argument(
        "--text", type=Path, action="append", default=[], help="a further kind to judge, named as the file"
    )
    run = parser.add_argument_group("run and judge")
    run.add_argument("--methods", type=common.split_commas, help=f"of {', '.join(METHODS)} (default: all)")
    run.add_argument("--more", type=_named_options, action="append", default=[], metavar="NAME=OPTIONS")
    run.add_argument("--python-peer", type=common.peer_python, action="append", default=[], metavar="PEER=PYTHON")
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    run.add_argument("--parallel", type=int, default=1, help="so many at once, which makes each slower")
    run.add_argument("--timeout", type=float, help="seconds of one method")
    run.add_argument("--batch", type=int, default=1, help="sequences in one forward of the judge")
    run.add_argument("--discard", action="store_true", help="remove a checkpoint when it is judged")
    collect = parser.add_argument_group("collect")
    collect.add_argument("--name", help="the model's, for the tables")
    collect.add_argument("--json", type=Path, metavar="FOLDER", help="gets accuracy-MODEL.json")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if common.machine()["gpu"] else "cpu")
    STEPS[options.step](options)


def write_token_ids(options: argparse.Namespace) -> None:
    """The calibration ids of each seed and the held-out ids, by nvquant's own loader, as the model's template wants."""
    from nvquant.calibrate.samples import load_calibration
    from nvquant.calibrate.specs import shipped_folder
    from safetensors.torch import save_file
    from torch import stack

    config = json.loads((options.source / "config.json").read_text(encoding="utf-8"))
    folder = options.work / "ids"
    folder.mkdir(parents=True, exist_ok=True)

    def load(name: str, samples: int, seed: int, in_kinds: bool = False) -> CalibrationSet:
        size = {"samples": samples, "sequence_length": options.sequence_length}
        return load_calibration(
            name, model_folder=options.source, config=config, seed=seed, in_equal_kinds=in_kinds, **size
        )

    for seed in options.seeds:
        found = load("offline", options.samples, seed)
        if {len(ids) for ids in found.samples} != {options.sequence_length}:
            raise SystemExit("calibration sequences differ in length, and not every peer takes that")
        save_file({"input_ids": stack(found.samples)}, ids_path(options.work, seed))
        print(f"seed {seed}: {found.tokens:,} tokens, sha256 {found.sha256}")
    heldout = str(shipped_folder() / "heldout.jsonl.xz")
    kinds = len(set(load(heldout, 64, 1, in_kinds=True).kinds))
    judged = load(heldout, kinds * options.judge_samples, 1, in_kinds=True)
    rows = [(kind, ids.tolist()) for kind, ids in zip(judged.kinds, judged.samples, strict=True)]
    for path in options.text:
        rows += [(path.stem, ids.tolist()) for ids in load(str(path), options.judge_samples, 1).samples]
    lines = [json.dumps({"kind": kind, "input_ids": ids}) + "\n" for kind, ids in sorted(rows, key=lambda row: row[0])]
    (folder / JUDGE_IDS).write_text("".join(lines), encoding="utf-8")
    print(f"judged: {sum(len(ids) for _, ids in rows):,} tokens of {len({kind for kind, _ in rows})} kinds")


def run_methods(options: argparse.Namespace) -> None:
    """Convert by each method with each seed's ids, where that is not done."""
    methods = with_more(options.more)
    wanted = [(name, seed) for seed in options.seeds for name in options.methods or methods]
    unknown = {name for name, _ in wanted} - set(methods)
    if unknown:
        raise SystemExit(f"no such methods: {', '.join(sorted(unknown))}")
    open_ones = [(name, seed) for name, seed in wanted if not _is_done(options.work / "runs" / f"{name}-{seed}.json")]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda one: run_method(methods[one[0]], *one, options), open_ones))


def run_method(method: Method, name: str, seed: int, options: argparse.Namespace) -> None:
    """One conversion in a process of its own, and its result file."""
    output = options.work / "checkpoints" / f"{name}-{seed}"
    for old in (output, output.with_name(output.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = convert_command(method, ids_path(options.work, seed), output, options)
    result = common.try_child(command, label=f"{name}, seed {seed}", timeout=options.timeout)
    if method.ours:
        result.pop("output", None)  # a path of this machine
        result["versions"] = common.versions()
    named = {"method": name, "tool": method.tool, "label": method.label, "seed": seed}
    about = {"machine": common.machine(), "device": options.device, "parallel": options.parallel}
    _write(options.work / "runs" / f"{name}-{seed}.json", {**named, **about, **result})


def convert_command(method: Method, ids: Path, output: Path, options: argparse.Namespace) -> list[object]:
    """The command line of a tool; the first `nvquant` in it is that of this interpreter."""
    if not method.ours:
        python = dict(options.python_peer).get(method.tool, sys.executable)
        command = [python, common.HERE / "peer.py", method.tool, options.source, output, "--ids", ids]
        return [*command, "--scope", "all", "--method", *method.options, "--device", options.device]
    samples, length = ids_shape(ids)
    command = [*common.nvquant(1), "convert", options.source, *method.options, "--calibration", ids]
    command += ["--samples", samples, "--sequence-length", length]
    return [*command, "--device", options.device, "-o", output, "--json"]


def judge_checkpoints(options: argparse.Namespace) -> None:
    """Judge each checkpoint that is there and not judged."""
    folder = options.work / "checkpoints"
    names = sorted(path.name for path in folder.iterdir() if _is_done(options.work / "runs" / f"{path.name}.json"))
    open_ones = [name for name in names if not _is_done(options.work / "judged" / f"{name}.json")]

    def judge(name: str) -> None:
        command = [sys.executable, common.HERE / "judge.py", options.source, folder / name]
        command += [options.work / "ids" / JUDGE_IDS, "--device", options.device, "--batch", options.batch]
        result = common.try_child(command, label=f"judging {name}", timeout=options.timeout)
        _write(options.work / "judged" / f"{name}.json", result)
        if options.discard and "failed" not in result:
            shutil.rmtree(folder / name)

    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(judge, open_ones))


def collect_results(options: argparse.Namespace) -> None:
    """One report of all runs and judgements of a model."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((options.work / "runs").glob("*.json"))]
    methods: dict[str, common.Json] = {}
    for run in runs:
        judged = options.work / "judged" / f"{run['method']}-{run['seed']}.json"
        if "seconds" not in run or not _is_done(judged):
            print(f"{run['method']}, seed {run['seed']}: no result ({run.get('failed') or run.get('missing')})")
            continue
        about = {key: run[key] for key in ("tool", "label", "versions")}
        seeds = methods.setdefault(run["method"], {**about, "seeds": {}})["seeds"]
        seeds[str(run["seed"])] = _kept(run, json.loads(judged.read_text(encoding="utf-8")))
    machines = {json.dumps(run["machine"], sort_keys=True): run["machine"] for run in runs}
    if len(machines) != 1 or not methods:
        raise SystemExit(f"{options.work} has the results of {len(machines)} machines: collect each one's by itself")
    samples, length = ids_shape(ids_path(options.work, options.seeds[0]))
    report = {
        "benchmark": "accuracy",
        "machine": next(iter(machines.values())),
        "versions": next((run["versions"] for run in runs if run["tool"] == "nvquant"), common.versions()),
        "work": {
            "description": f"{options.name}, {samples} x {length} calibration tokens, W4A4 on every matrix",
            "model": options.name,
            "calibration": [samples, length],
        },
        "methods": methods,
    }
    words = "".join(letter if letter.isalnum() else "-" for letter in options.name.lower())
    path = options.json / f"accuracy-{words}.json"
    path.write_text(_compact(report) + "\n", encoding="utf-8")
    print(f"wrote {path}: {len(methods)} methods")


def _kept(run: common.Json, judged: common.Json) -> common.Json:
    """What the kept results have of one checkpoint; the sequences by column."""
    sequences = judged.pop("sequences")
    measured = ("seconds", "wall_seconds", "peak_rss_bytes", "peak_gpu_bytes", "parallel", "device")
    columns = {
        key: [one[key] if isinstance(one[key], str) else round(one[key], DIGITS) for one in sequences]
        for key in sequences[0]
    }
    counted = ("matrices", "rounded", "bits", "tensor_bytes", "unequal", "pre_quant_scales", "judge_device")
    return {key: run[key] for key in measured} | {key: judged[key] for key in counted} | {"sequences": columns}


def _compact(report: common.Json) -> str:
    """Indented JSON with each list of numbers or words on one line."""
    lists: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(part) for key, part in value.items()}
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"@{len(lists) - 1}@"
        return value

    text = json.dumps(marked(report), indent=2)
    for at, line in enumerate(lists):
        text = text.replace(f'"@{at}@"', line)
    return text


def ids_path(work: Path, seed: int) -> Path:
    """Where the calibration ids of a seed are."""
    return work / "ids" / f"calibration-{seed}.safetensors"


def ids_shape(path: Path) -> tuple[int, int]:
    """Sequences and their length, from the header of a safetensors file and without torch."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    samples, length = header["input_ids"]["shape"]
    return samples, length


def _is_done(path: Path) -> bool:
    """Whether a result is there that is no failure."""
    return path.exists() and not {"failed", "missing"} & set(json.loads(path.read_text(encoding="utf-8")))


def _write(path: Path, document: common.Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
    partial.replace(path)


def _named_options(text: str) -> tuple[str, str]:
    name, _, options = text.partition("=")
    if not name or not options:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=OPTIONS, the options of nvquant convert")
    return name, options


STEPS = {"ids": write_token_ids, "run": run_methods, "judge": judge_checkpoints, "collect": collect_results}


if __name__ == "__main__":
    main()
