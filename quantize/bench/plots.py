"""The figures as pictures: decoding and prefill, by users and by context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentLack

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = {"decode": "decode_tokens_per_second", "prefill": "prefill_tokens_per_second", "ttft": "ttft_p50_ms"}
TITLES = {
    "decode": "Decoding, tokens a second of all users (dashed: the memory's ceiling)",
    "prefill": "Prefill, prompt tokens a second of all users",
    "ttft": "Time to the first token, median, ms",
}
COLOURS = ("#2f7d4f", "#8a8f98", "#c46b2d", "#4063a8", "#9b4f96", "#b59a2b")
ROW_INCHES = 0.2
Row = Mapping[str, Any]


def need_matplotlib() -> None:
    """Check before hours of work that plots can be drawn.

    Raises:
        EnvironmentLack: matplotlib is missing.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise EnvironmentLack(
            "Plots require matplotlib", hint="run `pip install 'nvquant[plot]'`, or skip them with --no-plots"
        )


def draw(points: Sequence[Row], folder: Path) -> list[Path]:
    """Write decode.svg, prefill.svg and ttft.svg.

    Each has a panel for each context, with users along its axis. With one number of users, it has one panel with
    contexts along its axis. Measurements are lines, and the ceiling is dashed.
    """
    good = [point for point in points if not point.get("failed") and point.get("context")]
    if not good:
        return []
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "nvquant"  # the same results give the same file
    along, panel_key = ("users", "context") if len({point["users"] for point in good}) > 1 else ("context", "users")
    panels, served = sorted({point[panel_key] for point in good}), served_in(good)
    written = []
    for name, key in PLOTS.items():
        size = (1.5 + 3.6 * len(panels), 3.6 + ROW_INCHES * len(served))
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
        for axis, value in zip(axes[0], panels, strict=True):
            _panel(axis, [point for point in good if point[panel_key] == value], key, along, served)
            axis.set_title(f"{panel_key} {value:,}", fontsize=10, loc="left")
        lines, labels = axes[0][0].get_legend_handles_labels()
        figure.suptitle(TITLES[name], fontsize=11, x=0.01, ha="left")
        room = ROW_INCHES * len(labels) / figure.get_figheight()  # the names stand below, where no line runs
        figure.legend(lines, labels, loc="lower left", bbox_to_anchor=(0.01, 0), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, room, 1, 1))
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def served_in(points: Sequence[Row]) -> list[tuple[str, str]]:
    """Name and KV cache of each server, in the order of the points."""
    return list(dict.fromkeys((point["name"], point["kv_cache"]) for point in points))


def _panel(axis: Axes, points: Sequence[Row], key: str, along: str, served: Sequence[tuple[str, str]]) -> None:
    for at, (name, dtype) in enumerate(served):  # one colour each in all panels, measured there or not
        own = sorted((p for p in points if (p["name"], p["kv_cache"]) == (name, dtype)), key=lambda p: int(p[along]))
        colour = COLOURS[at % len(COLOURS)]
        label = name if dtype in ("auto", "as served") else f"{name}, {dtype} KV"
        drawn = [(p[along], p[key]) for p in own if p.get(key) is not None]
        axis.plot([x for x, _ in drawn], [y for _, y in drawn], "o-", color=colour, label=label, markersize=4)
        if key == PLOTS["decode"]:
            most = [(p[along], p["ceiling_tokens_per_second"]) for p in own if p.get("ceiling_tokens_per_second")]
            axis.plot([x for x, _ in most], [y for _, y in most], "--", color=colour, linewidth=1)
    ticks = sorted({point[along] for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    if key == PLOTS["decode"]:
        axis.set_yscale("log")  # the ceiling grows with the users, far above what arithmetic allows
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(along, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
