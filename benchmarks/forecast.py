"""The forecast of `nvquant plan --on` beside what was measured, and for models that are too large to have at hand.

usage: python benchmarks/forecast.py [--table | --write | --check]

  without   the forecast of every conversion in benchmarks/results beside its measured times
  --table   models of 31B to 1T parameters on several machines
  --write   brings both into docs/scale-out.md
  --check   writes nothing; the exit code is 1 where the page does not say what this program says

No model is needed: headers are made from shapes, and nothing but their arithmetic is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import common

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from nvquant.checkpoint.source import Checkpoint
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.conversion import Conversion, forecast_conversion
from nvquant.plan.machines import DISKS, Disk, Machine
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe
from support import synthetic_gemma4 as gemma4
from support.measured_runs import APART, RUNS
from support.synthetic_dense import DENSE_1T, LLAMA_405B, MISTRAL_LARGE_123B, Dense, headers_only

PAGE = common.HERE.parent / "docs" / "scale-out.md"
RECIPE, SAMPLES, SEQUENCE_LENGTH = "nvfp4", 128, 2048
HUB_BYTES = 400e6  # a second; assumed
ARRAY = Disk("array", 12e9, 12e9)  # assumed: eight local NVMe drives as one
# USD an hour, assumed: round numbers near what such machines cost to rent by the hour.
PRICES = {
    Machine("H200", 1, DISKS["nvme"]): 3.5,
    Machine("RTX 4090", 1, DISKS["nvme"]): 0.5,
    Machine("RTX 5090", 1, DISKS["nvme"]): 0.8,
    Machine("H100 80 GB", 8, DISKS["nvme"]): 24.0,
    Machine("H100 80 GB", 8, ARRAY): 24.0,
}
DENSE = {"Mistral Large, 123B": MISTRAL_LARGE_123B, "Llama 3.1, 405B": LLAMA_405B, "dense, 1T": DENSE_1T}


def main() -> None:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.write and not options.check:
        print("\n".join([*models_table(), "", *forecast_table()] if options.table else comparison()))
        return
    text = PAGE.read_text(encoding="utf-8")
    wanted = text
    for name, lines in {"comparison": comparison, "models": models_table, "forecast": forecast_table}.items():
        wanted = with_section(wanted, name, lines())
    if options.check and text != wanted:
        sys.exit(f"{PAGE} does not say what the program says: run python benchmarks/forecast.py --write")
    if options.write:
        PAGE.write_text(wanted, encoding="utf-8")


def with_section(text: str, name: str, lines: Sequence[str]) -> str:
    """The page with these lines between the marks of a section."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{PAGE} has no section between {begin.strip()} and {end}")
    return head + begin + "\n".join(lines) + "\n" + end + tail


def comparison() -> list[str]:
    """Every measured conversion beside its forecast."""
    header = (
        "conversion",
        "forecast s",
        "measured s",
        "ratio",
        "process s",
        "measured s",
        "ratio",
        "host GB",
        "GPU GB",
    )
    rows = []
    for run in [*RUNS, *APART]:
        found, measured = run.forecast(), run.document()
        # A document has the memory of its own process; that of several was watched from outside.
        host = measured["peak_host_bytes" if run.machine.count == 1 else "peak_rss_bytes"]
        times, memory = found.times, found.memory
        rows.append(
            (
                run.words,
                *_pair(times.conversion_seconds, measured["seconds"]),
                *_pair(times.total_seconds, measured["wall_seconds"]),
                f"{memory.host_bytes / 1e9:.1f} / {host / 1e9:.1f}",
                f"{memory.gpu_bytes / 1e9:.1f} / {measured['peak_gpu_bytes'] / 1e9:.1f}" if memory.gpu_bytes else "",
            )
        )
    return markdown(header, rows)


def _pair(forecast: float, measured: float) -> tuple[str, str, str]:
    return f"{forecast:.1f}", f"{measured:.1f}", f"{forecast / measured:.2f}"


def sources() -> dict[str, Checkpoint]:
    """The models of the table, as headers."""
    found = {"Gemma 4 31B": headers_only(gemma4.tensor_shapes(), gemma4.config())}
    return found | {name: headers_only(dense.shapes(), dense.config()) for name, dense in DENSE.items()}


def models_table() -> list[str]:
    """The shapes that the forecast is made from."""
    header = ("model", "parameters", "layers", "hidden", "intermediate", "heads / KV", "source", "output, nvfp4")
    gemma = Dense(60, gemma4.HIDDEN, gemma4.INTERMEDIATE, gemma4.HEADS, 16, 256, gemma4.VOCAB)
    rows = []
    for name, source in sources().items():
        shape = DENSE.get(name, gemma)
        size = sum(info.nbytes for info in source.infos().values())
        rows.append(
            (
                *(name, f"{size / 2e9:,.1f} B", str(shape.layers), str(shape.hidden), str(shape.intermediate)),
                f"{shape.heads} / {shape.kv_heads}",
                *(f"{bytes_ / 1e9:,.0f} GB" for bytes_ in (size, plan_of(name, source).tensor_bytes)),
            )
        )
    return markdown(header, rows)


def plan_of(name: str, source: Checkpoint) -> Plan:
    """The conversion that the table forecasts."""
    return compute_plan(source, load_recipe(RECIPE), LAYOUTS["compressed-tensors"], name)


def forecast_table() -> list[str]:
    """Time, memory, disk and cost by model and machine."""
    header = ("model", "machine", "from the disk", "from the Hub", "longest", "host GB", "GPU GB", "disk GB")
    header += ("low-disk GB", "USD/h", "USD", "rests on")
    rows = []
    for name, source in sources().items():
        plan = plan_of(name, source)
        rows += [(name, *_row(plan, machine, price)) for machine, price in PRICES.items()]
    return markdown(header, rows)


def _row(plan: Plan, machine: Machine, price: float) -> tuple[str, ...]:
    here = forecast_conversion(plan, machine, SAMPLES, SEQUENCE_LENGTH, usd_per_hour=price)
    cached = forecast_conversion(plan, replace(machine, network_bytes=HUB_BYTES), SAMPLES, SEQUENCE_LENGTH, 1, price)
    remote = replace(machine, network_bytes=HUB_BYTES, low_disk=True)
    low = forecast_conversion(plan, remote, SAMPLES, SEQUENCE_LENGTH, 1, price) if machine.count == 1 else None
    hub = low or cached
    words = machine.words if machine.disk != ARRAY else f"{machine.words}, 12 GB/s disk"
    gpu = f"{here.memory.gpu_bytes / 1e9:.0f}"
    if not here.fits:
        return (words, f"does not fit: needs {gpu} GB on the GPU", *[""] * 8, _basis(plan, machine))
    return (
        words,
        duration(here.times.total_seconds),
        duration(hub.times.total_seconds),
        f"{here.times.bound_by}; {hub.times.bound_by}",
        *(f"{here.memory.host_bytes / 1e9:.0f}", gpu, f"{cached.disk_bytes / 1e9:,.0f}"),
        f"{low.disk_bytes / 1e9:,.0f}" if low else "one process only",
        f"{price:.2f}",
        f"{_usd(here)} / {_usd(hub)}",
        _basis(plan, machine),
    )


def _usd(conversion: Conversion) -> str:
    return f"{conversion.cost_usd:.2f}"


def _basis(plan: Plan, machine: Machine) -> str:
    """What of a row was measured."""
    if machine.count > 1:
        return "extrapolated: GPU, several processes"
    if not machine.is_measured:
        return "extrapolated: GPU"
    return "measured GPU and layers" if plan.model.startswith("Gemma") else "extrapolated: model"


def duration(seconds: float) -> str:
    """In the unit in which one would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


if __name__ == "__main__":
    main()
