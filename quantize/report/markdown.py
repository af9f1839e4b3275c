"""The report as Markdown that GitHub and the Hub both render, for a model card or a step's summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..quoting import cell, code, fenced
from ..quoting import markdown as escaped
from .parts import Answer, CheckLine, Page, Served, Table, Verdict

MARKS = {"passed": "✅", "failed": "❌", "absent": "⚪"}


def render_markdown(page: Page, *, with_details: bool = True) -> str:
    """Render a page as Markdown. Headings begin at the second level, so that it fits into a card.

    Args:
        with_details: whether to add the tables of all layers, of matrices and of passed checks.
    """
    return "\n\n".join(_blocks(page, with_details)) + "\n"


def table(found: Table) -> str:
    """A pipe table with its caption above."""
    marks = ["---:" if column.kind == "number" else "---" for column in found.columns]
    lines = [
        f"**{escaped(found.caption)}**",
        "",
        _row([escaped(column.title) for column in found.columns]),
        _row(marks),
    ]
    for row in found.rows:
        lines.append(
            _row(
                [
                    cell(code(value)) if column.kind == "code" else escaped(value)
                    for value, column in zip(row, found.columns, strict=True)
                ]
            )
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _blocks(page: Page, with_details: bool) -> Iterator[str]:
    yield f"## {MARKS[page.verdict.state]} {page.verdict.word}: {escaped(page.title)}"
    if page.subtitle:
        yield escaped(page.subtitle)
    yield from _verdict(page.verdict)
    if page.tiles:
        yield "### In short"
        yield "\n".join(
            f"- {escaped(tile.label)}: **{escaped(tile.value)}** ({escaped('; '.join(tile.notes))})"
            if tile.notes
            else f"- {escaped(tile.label)}: **{escaped(tile.value)}**"
            for tile in page.tiles
        )
    if page.accuracy:
        yield "### Accuracy"
        yield table(page.accuracy)
        yield from (escaped(note) for note in page.accuracy_notes)
    if page.kinds:
        yield table(page.kinds)
        yield from (f"⚠️ {escaped(warning)}" for warning in page.kind_warnings)
    if page.layers:
        yield "### Layers"
        if page.layers.worst:
            yield "Largest error of a layer's output, by itself: " + escaped(", ".join(page.layers.worst)) + "."
        if with_details:
            yield _details("Every layer", table(page.layers.table))
    if page.sizes:
        yield "### Size"
        yield escaped(page.sizes.words)
        yield table(page.sizes.table)
    if page.served:
        yield from _served(page.served)
    if page.speed:
        yield "### Speed"
        yield from (table(found) for found in page.speed)
        yield from (escaped(note) for note in page.speed_notes)
    yield from _checks(page.checks, with_details)
    if page.matrices and with_details:
        yield "### Matrices and inputs"
        yield from (_details(escaped(found.caption), table(found)) for found in page.matrices)
    yield from _reproduce(page)


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield f"**{escaped(verdict.words)}**"
    if verdict.failures:
        yield "\n".join(
            f"- ❌ **{escaped(failure.name)}** ({escaped(failure.stage)}): {code(failure.fault)}"
            + (f" and {failure.more:,} more" if failure.more else "")
            for failure in verdict.failures
        ) + (f"\n- and {verdict.more} more failed checks, below" if verdict.more else "")
    yield "\n".join(f"- {MARKS[stage.state]} {escaped(stage.name)}: {escaped(stage.words)}" for stage in verdict.stages)


def _served(served: Served) -> Iterator[str]:
    yield "### Served"
    if served.facts:
        yield "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in served.facts)
    yield from (_answer(answer) for answer in served.answers)
    if served.hints:
        yield "\n".join(f"- Hint: {escaped(hint)}" for hint in served.hints)


def _answer(answer: Answer) -> str:
    head = f"{'❌' if answer.fault else '💬'} {code(answer.prompt)} ({escaped(answer.words)})"
    fault = f"\n\nFault: {code(answer.fault)}" if answer.fault else ""
    return f"{head}{fault}\n\n{fenced(answer.text)}" if answer.text else f"{head}{fault}\n\n(empty)"


def _checks(checks: Sequence[CheckLine], with_details: bool) -> Iterator[str]:
    failed = [check for check in checks if check.state == "failed"]
    others = [check for check in checks if check.state != "failed"]
    if failed or (others and with_details):
        yield "### Checks"
    for check in failed:
        lines = [f"- ❌ **{escaped(check.name)}** ({escaped(check.stage)}): {escaped(check.looked_at)}"]
        lines += [f"  - {code(fault)}" for fault in check.faults]
        lines += [f"  - and {check.more:,} more, in report.json"] if check.more else []
        yield "\n".join(lines)
    if others and with_details:
        yield _details(
            f"{len(others):,} checks that passed or do not apply",
            "\n".join(
                f"- {MARKS[check.state]} **{escaped(check.name)}** ({escaped(check.stage)}): {escaped(check.looked_at)}"
                for check in others
            ),
        )


def _reproduce(page: Page) -> Iterator[str]:
    yield "### How to reproduce"
    yield fenced(page.command, "sh")
    facts = [*page.reproduce, *page.machine]
    yield "\n".join(f"- {escaped(name)}: {code(value)}" for name, value in facts)


def _details(summary: str, body: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
