"""The part of docs/accuracy.md that compares methods: tables out of the reports that `accuracy.py collect` wrote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import common
from methods import BASELINE

HEADER = ("", "KL", "by seed", "more than {base}", "top-1", "perplexity", "bits a weight")
COSTS = ("", "seconds", "process s", "host GB", "GPU GB")


def section(report: common.Json) -> list[str]:
    """Heading, versions and three tables of one model: accuracy, KL by kind of text, time and memory."""
    methods: dict[str, common.Json] = report["methods"]
    base = BASELINE if BASELINE in methods else min(methods, key=lambda name: mean_of(methods[name], "kl"))
    order = sorted(methods, key=lambda name: mean_of(methods[name], "kl"))
    first = columns(methods[order[0]])
    kinds = sorted(set(first["kind"]))
    seeds = sorted({seed for method in methods.values() for seed in method["seeds"]})
    tokens, count = sum(first["tokens"]), len(first["kind"])
    samples, length = report["work"]["calibration"]
    header = tuple(word.format(base=methods[base]["label"]) for word in HEADER)
    rows = [accuracy_row(methods[name], methods[base]) for name in order]
    by_kind = [(label(methods[name]), *(f"{kl_of(methods[name], kind):.3f}" for kind in kinds)) for name in order]
    return [
        f"### {report['work']['model']}",
        "",
        f"{common.machine_words(report['machine'])}. {versions(report)}. Calibration: {samples} x {length} = "
        f"{samples * length:,} tokens, seed{'s' if len(seeds) > 1 else ''} {' and '.join(seeds)}. Judged on "
        f"{tokens:,} tokens in {count} sequences of {len(kinds)} kinds. Perplexity of the BF16 model: "
        f"{math.exp(statistics.fmean(first['nll_source'])):.2f}.",
        "",
        *markdown(header, rows),
        "",
        "KL by kind of text:",
        "",
        *markdown(("", *kinds), by_kind),
        "",
        cost_words(methods),
        "",
        *markdown(COSTS, [cost_row(methods[name]) for name in order]),
        *notes(methods, order),
    ]


def accuracy_row(method: common.Json, base: common.Json) -> tuple[str, ...]:
    """Label, KL and its standard error, KL of each seed, paired difference from the baseline, and the rest."""
    mean, error = stratified(columns(method)["kl"], columns(method)["kind"])
    by_seed = [statistics.fmean(run["sequences"]["kl"]) for _, run in sorted(method["seeds"].items())]
    more = "-"
    if method is not base:
        more = "{:+.4f} ± {:.4f}".format(*paired(method, base))
    bits = statistics.fmean(run["bits"] for run in method["seeds"].values())
    return (
        label(method),
        f"{mean:.4f} ± {error:.4f}",
        ", ".join(f"{one:.4f}" for one in by_seed),
        more,
        f"{100 * mean_of(method, 'top1'):.1f} %",
        f"{math.exp(mean_of(method, 'nll')):.2f}",
        f"{bits:.2f}",
    )


def paired(method: common.Json, base: common.Json) -> tuple[float, float]:
    """Mean difference of KL, and its standard error, over the sequences and the seeds that both have."""
    seeds = sorted(set(method["seeds"]) & set(base["seeds"]))
    both = [columns({"seeds": {seed: one["seeds"][seed] for seed in seeds}}) for one in (method, base)]
    differences = [mine - theirs for mine, theirs in zip(both[0]["kl"], both[1]["kl"], strict=True)]
    return stratified(differences, both[0]["kind"])


def stratified(values: Sequence[float], kinds: Sequence[str]) -> tuple[float, float]:
    """Mean over all sequences and its standard error, where the kinds and their shares are given and the texts drawn.

    The variance is the sum over kinds of (n_k / n)^2 s_k^2 / n_k (Cochran, Sampling Techniques, chapter 5).
    """
    groups = [[value for value, kind in zip(values, kinds, strict=True) if kind == one] for one in sorted(set(kinds))]
    variance = sum(len(group) * statistics.variance(group) for group in groups if len(group) > 1) / len(values) ** 2
    return statistics.fmean(values), math.sqrt(variance)


def columns(method: common.Json) -> common.Json:
    """The sequences, each number the mean of the seeds."""
    runs = [run["sequences"] for run in method["seeds"].values()]
    if any(run["kind"] != runs[0]["kind"] or run["tokens"] != runs[0]["tokens"] for run in runs):
        raise SystemExit("the seeds were judged on different sequences")
    means = {
        key: [statistics.fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]
        for key in ("kl", "top1", "nll", "nll_source")
    }
    return {"kind": runs[0]["kind"], "tokens": runs[0]["tokens"], **means}


def mean_of(method: common.Json, key: str) -> float:
    """Mean over sequences and seeds."""
    return statistics.fmean(columns(method)[key])


def kl_of(method: common.Json, kind: str) -> float:
    """Mean KL over the sequences of a kind."""
    found = columns(method)
    return statistics.fmean(kl for kl, of in zip(found["kl"], found["kind"], strict=True) if of == kind)


def cost_words(methods: Mapping[str, common.Json]) -> str:
    """Of the runs that stand in the table of costs."""
    most = max(_undisturbed(method)["parallel"] for method in methods.values())
    words = "Time from the first byte read to the last one written, the whole process, and peak memory"
    return f"{words} ({most} processes at once on the device):" if most > 1 else f"{words}, one process at a time:"


def cost_row(method: common.Json) -> tuple[str, ...]:
    """Time and memory of the run that had the fewest beside it."""
    run = _undisturbed(method)
    gpu = f"{run['peak_gpu_bytes'] / 1e9:.2f}" if run["peak_gpu_bytes"] else ""
    host = f"{run['peak_rss_bytes'] / 1e9:.2f}"
    return (label(method), f"{run['seconds']:.1f}", f"{run['wall_seconds']:.1f}", host, gpu)


def _undisturbed(method: common.Json) -> common.Json:
    runs = sorted(method["seeds"].items(), key=lambda item: (item[1]["parallel"], item[0]))
    return dict(runs[0][1])


def notes(methods: Mapping[str, common.Json], order: Sequence[str]) -> list[str]:
    """A sentence for each checkpoint that a server would not serve as it is judged."""
    found: list[str] = []
    for name in order:
        run, words = next(iter(methods[name]["seeds"].values())), methods[name]["label"]
        if run["pre_quant_scales"]:
            words += f" requires the inputs of {run['pre_quant_scales']} matrices multiplied by stored factors. "
            found += ["", words + "The judge does that, and stock vLLM does not."]
        elif run["unequal"]:
            words += f" stores unequal global scales in {run['unequal']} fused groups. "
            found += ["", words + "The judge uses each matrix's own, and vLLM uses one of them for all."]
    return found


def label(method: common.Json) -> str:
    """Of a method, ours in bold."""
    return f"**{method['label']}**" if method["tool"] == "nvquant" else str(method["label"])


def versions(report: common.Json) -> str:
    """Of nvquant, the libraries and each peer."""
    found = dict(report["versions"])
    for method in report["methods"].values():
        found |= {name: version for name, version in method["versions"].items() if name not in found}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
