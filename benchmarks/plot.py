"""Bring the kept results into the documentation: the tables of docs/benchmarks.md and docs/accuracy.md, and the plot
docs/benchmarks.svg.

usage: python benchmarks/plot.py [--check]

Reads benchmarks/results/*.json and writes the part of each page between its two marks, and the plot (which needs the
extra `plot`). With --check nothing is written: the exit code is 1 where a page does not say what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import accuracy_table
import common
from accuracy_table import markdown

ROOT = common.HERE.parent
PAGE, PLOT = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
ACCURACY = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
ORDER = (
    "gemma4_slice",
    "whole_31b",
    "data_free",
    "scale_out",
    "smollm2_cpu",
    "kernels",
    "served_31b",
    "judged",
    "accuracy",
)
RATES = {"decode_tokens_per_second": 0, "ceiling_tokens_per_second": 0, "prefill_tokens_per_second": 0}
RATES |= {"ttft_p50_ms": 1, "itl_p50_ms": 1}  # columns of a served model, and their decimals
COLOURS = {"nvquant": "#2f7d4f", "plain": "#8a8f98"}
PEER_COLOUR = "#c9cdd3"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    reports = load_reports(common.HERE / "results")
    speed = [report for report in reports if report["benchmark"] != "accuracy"]
    tables = ["\n".join([*accuracy_table.section(report), ""]) for report in reports if report not in speed]
    pages = {PAGE: "\n".join(map(section, speed)), ACCURACY: "\n".join(tables)}
    for page, generated in pages.items():
        text = page.read_text(encoding="utf-8")
        wanted = with_generated(text, generated)
        if options.check and text != wanted:
            sys.exit(f"{page} does not say what benchmarks/results says: run python benchmarks/plot.py")
        if not options.check:
            page.write_text(wanted, encoding="utf-8")
    if not options.check:
        plot([report for report in speed if any(peer in report.get("runs", {}) for peer in common.PEERS)])


def with_generated(text: str, generated: str) -> str:
    """A page with another text between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + generated + END + tail


def load_reports(folder: Path) -> list[common.Json]:
    """All results, in the order in which the page shows them."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda report: ORDER.index(report["benchmark"]))


def section(report: common.Json) -> str:
    """Heading, machine and table of one result, as Markdown."""
    found = dict(report["versions"])
    for run in report.get("runs", {}).values():
        found |= {name: version for name, version in run.get("versions", {}).items() if name not in found}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    lines = [f"### {report['work']['description']}", "", f"{common.machine_words(report['machine'])}. {versions}.", ""]
    lines += TABLES.get(report["benchmark"], run_table)(report)
    return "\n".join(lines) + "\n"


def kernel_table(report: common.Json) -> list[str]:
    """Every kernel beside what the memory allows."""
    return markdown(common.KERNEL_HEADER, common.kernel_rows(report))


def served_tables(report: common.Json) -> list[str]:
    """Conversions, stages of the proof, and rates of the servers."""
    runs = [(f"convert, {recipe}", run, _gigabytes(run)) for recipe, run in report["convert"].items()]
    runs += [(f"verify, {stages}", run, _verdict(run)) for stages, run in report.get("verify", {}).items()]
    processes = [
        (name, f"{run['wall_seconds']:.1f}", f"{run['peak_rss_bytes'] / 1e9:.2f}", words) for name, run, words in runs
    ]
    bench = report["bench"]
    rates = []
    for point in bench["points"]:
        server = bench["servers"][point["server"]]
        row = (point["name"], server["scheme"], point["kv_cache"], f"{point['context']:,}", str(point["users"]))
        if point.get("failed"):
            rates.append((*row, point["failed"], *[""] * 4))
            continue
        rates.append((*row, *(f"{point[key]:,.{digits}f}" for key, digits in RATES.items())))
    header = ("model", "weights", "KV cache", "context", "users")
    header += ("decode tok/s", "ceiling", "prefill tok/s", "TTFT ms", "token ms")
    held = [
        (
            *(server["name"], server["kv_cache"], f"{server['weights_bytes'] / 2**30:.2f} GiB"),
            *(f"{server['kv_cache_tokens']:,}", f"{server['max_model_len']:,}", f"{server['ready_seconds']:.0f}"),
        )
        for server in bench["servers"]
        if server.get("kv_cache_tokens")
    ]
    vllm = next(server["vllm"] for server in bench["servers"] if server.get("vllm"))
    words = f"vLLM {vllm}, {bench['settings']['output_tokens']} output tokens"
    if not bench["complete"]:
        words += ", cut off (these points are what it had measured)"
    return [
        *markdown(("", "process s", "host GB", ""), processes),
        *("", f"`nvquant bench`, {words}, medians of TTFT and inter-token time:", ""),
        *markdown(header, rates),
        *("", "Weights in memory and room of the KV cache, on each GPU:", ""),
        *markdown(("model", "KV cache", "weights", "KV-cache tokens", "longest request", "ready s"), held),
    ]


def _gigabytes(run: common.Json) -> str:
    return f"{run['tensor_bytes'] / 1e9:.2f} GB of tensors"


def _verdict(run: common.Json) -> str:
    return f"{sum(check['passed'] for check in run['checks'])} of {len(run['checks'])} checks passed"


def judged_table(report: common.Json) -> list[str]:
    """What the stage numerics says beside what the judge says."""
    rows = [
        (name, *(f"{of[name][key]:.4f}" for key in ("kl", "top1", "nll") for of in report["runs"].values()))
        for name in report["runs"]["judge"]
    ]
    header = ("", *(f"{words}, {of}" for words in ("KL", "top-1", "NLL") for of in report["runs"]))
    return markdown(header, rows)


def run_table(report: common.Json) -> list[str]:
    """Seconds, ratios and memory of every run; the floor below."""
    lines = markdown(common.RUN_HEADER, common.run_rows(report))
    if report.get("floor"):
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report["floor"].items())
        lines += ["", f"Floor (bytes and operations over the measured speeds, all at once): {parts}."]
    return lines


TABLES: dict[str, Callable[[common.Json], list[str]]] = {
    "kernels": kernel_table,
    "served_31b": served_tables,
    "judged": judged_table,
}


def plot(reports: list[common.Json]) -> None:
    """One panel a result: a bar a run, longest last."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "nvquant"  # the same results give the same file
    figure, panels = pyplot.subplots(len(reports), 1, figsize=(8, 2.3 * len(reports)), squeeze=False)
    for panel, report in zip(panels[:, 0], reports, strict=True):
        runs = {name: run["seconds"] for name, run in report["runs"].items() if "seconds" in run}
        runs = dict(sorted(runs.items(), key=lambda item: -item[1]))
        colours = [COLOURS.get(name.split()[0], PEER_COLOUR) for name in runs]
        bars = panel.barh(list(runs), list(runs.values()), color=colours)
        panel.bar_label(bars, [f"{seconds:.1f} s" for seconds in runs.values()], padding=4, fontsize=9)
        info = report["machine"]
        where = info["gpu"] or f"CPU, {info['cores']} cores"
        panel.set_title(f"{report['work']['description']}; {where}", fontsize=10, loc="left")
        panel.set_xlim(0, 1.12 * max(runs.values()))
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("seconds", fontsize=9)
        panel.tick_params(labelsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
