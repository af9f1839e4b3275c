"""What all benchmarks share: the machine and versions, child processes and their memory, tables, result files.

Imports neither torch nor nvquant, so that the process that starts the tools takes no memory, on the GPU least of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("nvquant", "torch", "transformers", "accelerate", "safetensors", "compressed-tensors")
PEERS = {"llmcompressor": "llmcompressor", "modelopt": "nvidia-modelopt", "auto-round": "auto-round"}
POLL_SECONDS = 0.02
RUN_HEADER = ("", "seconds", "x forward", "x ours", "process s", "host GB", "GPU GB")
KERNEL_HEADER = ("", "ms", "floor ms", "x floor")
DATA_FREE = "nvfp4-a16"
LAUNCHER = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no".split()
Json = dict[str, Any]


def machine() -> Json:
    """Processor, cores that this process may use, memory, and the GPU with its driver."""
    info: Json = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None,
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        if lines:
            info["gpu"], info["driver"], info["gpu_memory"] = (part.strip() for part in lines[0].split(","))
            info["gpus"] = len(lines)
    return info


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter; a peer's own come from its process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def machine_name(info: Mapping[str, Any]) -> str:
    """A short name for file names: of the GPU, else of the CPU and its cores."""
    words = _gpus(info) or f"{info['cpu'].split('@')[0]} {info['cores']} cores"
    words = re.sub(r"\((R|TM)\)|NVIDIA|CPU|Processor", " ", words)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def run_child(command: Sequence[object], *, label: str, timeout: float | None = None) -> Json:
    """Run a program that prints one JSON document, and watch its memory.

    Returns:
        its document with `wall_seconds` (the whole process) and `peak_rss_bytes` (the sum of the resident sizes of the
        process and its children, read every 20 ms, or the VmHWM of the process where larger; mapped files count).
    Raises:
        SystemExit: it failed; the end of its log is shown.
    """
    document = try_child(command, label=label, timeout=timeout)
    if "failed" in document:
        raise SystemExit(f"{label}: {document['failed']}")
    return document


def try_child(command: Sequence[object], *, label: str, timeout: float | None = None) -> Json:
    """As `run_child`, but a failure becomes `{"failed": the last line of its log}`."""
    print(f"... {label}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=log)
        memory = _MemoryWatch(process.pid)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        seconds = time.perf_counter() - started
        peak = memory.stop()
        out.seek(0), log.seek(0)
        text, lines = out.read(), log.read().splitlines()
    if code:
        print("\n".join(lines[-25:] or text.splitlines()[-25:]), file=sys.stderr)
        return {"failed": f"exit code {code}: {lines[-1] if lines else 'no message'}", "wall_seconds": seconds}
    try:
        return {**parse_document(text), "wall_seconds": seconds, "peak_rss_bytes": peak}
    except SystemExit as error:
        return {"failed": str(error), "wall_seconds": seconds}


def parse_document(text: str) -> Json:
    """The JSON document at the end of what a program printed: all of it, or its last line."""
    for candidate in (text, *text.splitlines()[-1:]):
        try:
            document = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(document, dict):
            return document
    raise SystemExit(f"no JSON document in {text[-500:]!r}")


class _MemoryWatch(threading.Thread):
    """Largest resident size of a process tree, read from /proc until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._peak, self._stop_asked = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(POLL_SECONDS):
            resident = sum(status_bytes(pid, "VmRSS") for pid in _tree(self._pid))
            self._peak = max(self._peak, resident, status_bytes(self._pid, "VmHWM"))

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return self._peak


def status_bytes(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status in bytes; 0 where the process or the field is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found.extend(int(child) for child in children.read_text(encoding="ascii").split())
            except OSError:
                continue
    return found


def check_room(folder: Path, needed_bytes: int) -> None:
    """Stop before any work where so much does not fit; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free and {needed_bytes / 1e9:.1f} GB are needed: use another"
        )


def make_source(source: Path, options: argparse.Namespace) -> Json:
    """Write a checkpoint of Gemma 4 31B's shapes, and token ids beside it, in a process of its own."""
    command = [sys.executable, HERE / "gemma4.py", source, "--layers", options.layers]
    command += ["--samples", options.samples, "--sequence-length", options.sequence_length]
    return run_child(command, label="writing the source")


def convert(
    source: Path, output: Path, ids: Path, options: argparse.Namespace, quantizer: str, processes: int = 1
) -> Json:
    """`nvquant convert` in a process of its own, or in several; what stood at `output` before is removed."""
    for old in (output, output.with_name(output.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    command = [*nvquant(processes), "convert", source, "--recipe", options.recipe]
    command += ["--quantizer", quantizer, "--device", options.device, "-o", output, "--json"]
    if options.recipe != DATA_FREE:
        command += ["--calibration", ids, "--samples", options.samples, "--sequence-length", options.sequence_length]
    if options.memory_budget:
        command += ["--memory-budget", options.memory_budget]
    if options.profile:
        command += ["--profile", options.profile / f"profile-{quantizer}"]
    run = run_child(command, label=f"nvquant {quantizer}, {processes} process{'es' if processes > 1 else ''}")
    del run["output"]  # a path of this machine
    return run


def nvquant(processes: int) -> list[object]:
    """The command line that starts nvquant in so many processes."""
    launcher: list[object] = [*LAUNCHER, "--num_processes", processes] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "nvquant"]


def peer(name: str, source: Path, output: Path, ids: Path, options: argparse.Namespace) -> Json:
    """A peer (PEER or PEER:METHOD) in a process of its own and its own interpreter; its output is removed."""
    tool, _, method = name.partition(":")
    python = dict(options.python_peer).get(tool, sys.executable)
    scope = "mlp" if options.recipe == "nvfp4" else "all"
    command = [python, HERE / "peer.py", tool, source, output, "--ids", ids, "--scope", scope]
    command += ["--method", method] if method else []
    result = try_child([*command, "--device", options.device], label=name, timeout=options.peer_timeout)
    shutil.rmtree(output, ignore_errors=True)
    return result


def speeds(document: Json) -> dict[str, float]:
    """The speeds out of the document of floors.py."""
    return {name: value for name, value in document.items() if "/s" in name}


def floor_seconds(work: Mapping[str, Any], output_bytes: int, measured: Mapping[str, float]) -> dict[str, float]:
    """Least seconds by device, each at its measured speed; as all can work at once, the largest is the floor."""
    floor = {
        "read": work["source_bytes"] / 1e9 / measured["read GB/s"],
        "write": output_bytes / 1e9 / measured["write GB/s"],
    }
    if work.get("recipe") != DATA_FREE:
        floor["matrix products"] = work["matmul_flop"] / 1e12 / measured["matmul TFLOP/s"]
    if "host to GPU GB/s" in measured:
        floor["host to GPU"] = work["decoder_bytes"] / 1e9 / measured["host to GPU GB/s"]
    return floor


def add_work_options(parser: argparse.ArgumentParser, *, layers: int) -> None:
    """Options that say how much is converted."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)


def work_words(options: argparse.Namespace) -> str:
    """The work in words."""
    tokens = f"{options.samples} x {options.sequence_length} tokens"
    data = "no calibration" if options.recipe == DATA_FREE else tokens
    return f"{options.layers} layers of Gemma 4 31B, {options.recipe}, {data}"


def add_tool_options(parser: argparse.ArgumentParser, *, peers: str, recipe: str, repeats: int) -> None:
    """Options that say which tools run, how and where the result goes."""
    parser.add_argument("--recipe", choices=["nvfp4", "nvfp4-fp8", "nvfp4-full", DATA_FREE], default=recipe)
    parser.add_argument("--quantizers", type=split_commas, default=["rtn", "mse"])
    parser.add_argument(
        "--peers", type=split_commas, default=split_commas(peers), help="as llmcompressor:gptq,modelopt"
    )
    parser.add_argument("--python-peer", type=peer_python, action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--peer-timeout", type=float, metavar="SECONDS", help="of each peer")
    parser.add_argument("--repeats", type=int, default=repeats, help="of ours and of the plain forward; the median")
    parser.add_argument("--memory-budget", metavar="SIZE", help="passed to nvquant convert")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="passed to nvquant convert, one folder a quantizer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a folder gets BENCHMARK-MACHINE.json")


def add_processes_option(parser: argparse.ArgumentParser, default: list[int]) -> None:
    """With how many processes to convert, in turn."""
    parser.add_argument("--processes", type=lambda text: [int(part) for part in text.split(",")], default=default)


def split_commas(text: str) -> list[str]:
    """`a,b` as a list."""
    return [part for part in text.split(",") if part]


def peer_python(text: str) -> tuple[str, str]:
    """`PEER=PYTHON` as both parts."""
    name, _, python = text.partition("=")
    if name not in PEERS or not shutil.which(python):
        raise argparse.ArgumentTypeError(f"{text}: give PEER=PYTHON, a peer of {', '.join(PEERS)} and an interpreter")
    return name, python


def median_run(runs: Sequence[Json]) -> Json:
    """The run of the median `seconds`, with all of them as `all_seconds`."""
    ordered = sorted(runs, key=lambda run: run["seconds"])
    return {**ordered[(len(ordered) - 1) // 2], "all_seconds": [run["seconds"] for run in runs]}


def median(values: Sequence[float]) -> float:
    """Of one value at least."""
    return statistics.median(values)


def write_report(report: Json, target: Path | None) -> None:
    """Write the result file, where one is asked for."""
    if target is None:
        return
    path = target
    if target.is_dir():
        path = target / f"{report['benchmark']}-{machine_name(report['machine'])}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def machine_words(info: Mapping[str, Any]) -> str:
    """The GPU, with their number where there are several; else the CPU and its cores."""
    return _gpus(info) or f"{info['cpu']}, {info['cores']} cores"


def _gpus(info: Mapping[str, Any]) -> str:
    """Number and name; empty without a GPU."""
    if not info["gpu"]:
        return ""
    count = info.get("gpus", 1)
    return f"{count} x {info['gpu']}" if count > 1 else str(info["gpu"])


def kernel_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row a kernel: name, ms, ms of its bytes at the memory's speed, the ratio."""
    floors = report["floor_seconds"]
    rows = []
    for name, seconds in report["seconds"].items():
        floor = floors[next(kind for kind in floors if name.startswith(kind))]
        rows.append([name, f"{seconds * 1e3:.3f}", f"{floor * 1e3:.3f}", f"{seconds / floor:.2f}"])
    return rows


def print_report(report: Mapping[str, Any]) -> None:
    """A title and the table of the runs."""
    found, where = report["versions"], machine_words(report["machine"])
    words = [f"{name} {found[name]}" for name in ("nvquant", "torch", "transformers") if name in found]
    print(f"{report['benchmark']} on {where}; {', '.join(words)}; {report['work']['description']}")
    print(format_table(RUN_HEADER, run_rows(report)))
    if report.get("floor"):
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report["floor"].items())
        speeds = ", ".join(f"{name} {value:.3g}" for name, value in report["speeds"].items())
        largest = max(report["floor"].values())
        print(f"floor {largest:.2f} s (seconds, overlapped: {parts})\nmeasured speeds: {speeds}")
        for name, run in report["runs"].items():
            if name.startswith("nvquant") and "seconds" in run:
                forward = report["runs"].get("plain forward", {}).get("seconds", 0.0)
                print(f"{name}: {run['seconds'] / max(largest, forward):.2f} x max(floor, plain forward)")
    for name, run in report["runs"].items():
        if run.get("phases"):
            phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in run["phases"].items())
            print(f"{name} phases: {phases}")


def run_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row a run: name, seconds, times the plain forward, times our rtn, whole process, peak host and GPU memory."""
    runs: Mapping[str, Json] = report["runs"]
    forward = runs.get("plain forward", {}).get("seconds")
    ours = runs.get("nvquant rtn", {}).get("seconds")
    rows = []
    for name, run in runs.items():
        problem = run.get("missing") or run.get("failed")
        if problem:
            rows.append([name, problem, *[""] * 5])
            continue
        seconds = run["seconds"]
        parts = " + ".join(f"{run[part]:.1f}" for part in ("load", "quantize", "save") if part in run)
        rows.append(
            [
                f"{name} ({parts})" if parts else name,
                f"{seconds:.2f}",
                f"{seconds / forward:.2f}" if forward else "",
                f"{seconds / ours:.2f}" if ours else "",
                f"{run['wall_seconds']:.1f}" if "wall_seconds" in run else "",
                f"{run['peak_rss_bytes'] / 1e9:.2f}" if "peak_rss_bytes" in run else "",
                f"{run['peak_gpu_bytes'] / 1e9:.2f}" if run.get("peak_gpu_bytes") else "",
            ]
        )
    return rows


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right; a long sentence in a row overflows."""
    short = [row for row in [header, *rows] if len(row[1]) < 20]
    widths = [max(len(row[column]) for row in short) for column in range(len(header))]
    widths[0] = max(len(row[0]) for row in [header, *rows])
    lines = []
    for row in [header, *rows]:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{row[0]:<{widths[0]}}  {rest}".rstrip())
    return "\n".join(lines)
