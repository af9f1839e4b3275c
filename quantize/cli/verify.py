"""`nvquant verify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ..checkpoint.source import Checkpoint
from ..verify.report import Check, Report
from .options import debug_option, json_option, open_model
from .output import emit_json, progress_reporter

STAGES = ("structure",)
EXAMPLES = """
\b
Examples:
  nvquant verify ./gemma-4-31b-nvfp4
  nvquant verify ./gemma-4-31b-nvfp4 --against ./gemma-4-31b
  nvquant verify ./out --against ./model --json > verdict.json
"""


@click.command("verify", epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--against", "model", metavar="MODEL", help="The folder that it was converted from: compare with it too.")
@click.option(
    "--stage",
    "stages",
    type=click.Choice(STAGES),
    multiple=True,
    default=STAGES,
    show_default=True,
    help="What to prove.",
)
@json_option
@debug_option
def command(checkpoint: Path, model: str | None, stages: tuple[str, ...], as_json: bool) -> int:
    """Prove CHECKPOINT: its files, its configs under vLLM's rules, its scales, and its weights against MODEL.

    Tensors are read a piece at a time, so memory stays small. Exits with 1 where a check failed.
    """
    source = None if model is None else open_model(model)
    checks = []
    for check in _run(checkpoint, source, stages):
        checks.append(check)
        _clear_live_line()
        if not as_json:
            _print_check(check)
    report = Report(tuple(checks))
    if as_json:
        emit_json(report.as_json())
    else:
        _print_verdict(report)
    return 0 if report.passed else 1


def _run(folder: Path, source: Checkpoint | None, stages: tuple[str, ...]) -> Iterator[Check]:
    from ..verify.structure import structure_checks

    report = progress_reporter()
    if "structure" in stages:
        yield from structure_checks(
            folder, source, lambda done, total, phase: report(done, total, f"{phase}: {done} of {total}")
        )


def _clear_live_line() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def _print_check(check: Check) -> None:
    click.echo(f"{'ok' if check.passed else 'FAILED':<7} {check.name:<14} {check.finding.looked_at}")
    for fault in check.shown_faults:
        click.echo(f"{'':<10} {fault}")


def _print_verdict(report: Report) -> None:
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        click.echo(f"FAILED: {len(failed)} of {len(report.checks)} checks: {', '.join(failed)}.")
    else:
        click.echo(f"Passed: all {len(report.checks)} checks.")
