"""The files of a finished sweep beside its document: the curve as a table and as a plot, and the recipes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.writer import write_bytes
from ..report.words import number, size
from .candidates import UNQUANTIZED, WIDER
from .chart import curve_svg
from .document import SweepDocument
from .recipes import as_yaml
from .run import Chosen

MOST_ROWS = 21
COLUMNS = ("bits", "tensors", "KL forecast", "FP8 groups", "BF16 groups")


def write_results(folder: Path, document: SweepDocument, recipes: Sequence[Chosen]) -> None:
    """Write curve.csv, curve.md, curve.svg, and a YAML file for each recipe.

    Raises:
        InputError: a file cannot be written.
    """
    write_bytes(folder / "curve.csv", _csv(document).encode())
    write_bytes(folder / "curve.md", _markdown(document).encode())
    write_bytes(folder / "curve.svg", curve_svg(document.curve, document.recipes))
    for one in recipes:
        write_bytes(folder / one.record.file, as_yaml(one.recipe).encode())


def curve_rows(document: SweepDocument, most: int = MOST_ROWS) -> list[list[str]]:
    """The curve as rows for `COLUMNS`, evenly spaced points if there are many, with the first and the last one."""
    counts = _counts(document)
    last = len(counts) - 1
    places = range(last + 1) if last < most else sorted({round(at * last / (most - 1)) for at in range(most)})
    rows = []
    for at in places:
        point, (fp8, bf16) = document.curve[at], counts[at]
        rows.append([f"{point.bits:.2f}", size(point.tensor_bytes), number(point.kl), str(fp8), str(bf16)])
    return rows


def loss_rows(document: SweepDocument, most: int = 10) -> list[list[str]]:
    """Name, scheme and KL alone of the groups that lose most, the largest loss first."""
    first = [(next(iter(group.forms.items())), group.name) for group in document.groups]
    worst = sorted(first, key=lambda one: -one[0][1].kl)[:most]
    return [[name, scheme, number(form.kl)] for (scheme, form), name in worst]


def _counts(document: SweepDocument) -> list[tuple[int, int]]:
    """Numbers of groups in FP8 and of unquantized ones at each point of the curve."""
    schemes = {group.name: next(iter(group.forms)) for group in document.groups}
    counts = []
    for point in document.curve:
        if point.group is not None and point.scheme is not None:
            schemes[point.group] = point.scheme
        values = list(schemes.values())
        counts.append((values.count(WIDER), values.count(UNQUANTIZED)))
    return counts


def _csv(document: SweepDocument) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "scheme", "tensor_bytes", "bits", "kl", "fp8_groups", "bf16_groups"])
    for point, (fp8, bf16) in zip(document.curve, _counts(document), strict=True):
        facts = [point.group or "", point.scheme or "", point.tensor_bytes, f"{point.bits:.6f}", f"{point.kl:.6g}"]
        writer.writerow([*facts, fp8, bf16])
    return text.getvalue()


def _markdown(document: SweepDocument) -> str:
    def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *lines, ""]

    ends = ", ".join(f"{value:.4f}" for value in document.ends)
    lines = [f"# Mixed precision from recipe {document.recipe.name}", ""]
    lines += [f"Measured with all groups in the recipe's schemes, then in FP8: KL {ends} nats.", ""]
    lines += ["![The curve](curve.svg)", "", *table(COLUMNS, curve_rows(document))]
    lines += ["The groups that lose most, each quantized alone:", ""]
    lines += table(("group", "scheme", "KL alone"), loss_rows(document))
    if document.recipes:
        rows = [
            [one.target, one.file, f"{one.bits:.2f}", f"{one.file_bytes:,}", number(one.kl)] for one in document.recipes
        ]
        lines += table(("budget", "recipe", "bits", "bytes", "KL forecast"), rows)
    return "\n".join(lines)
