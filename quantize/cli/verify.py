"""`nvquant verify`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..api.verification import STAGES, VerifyRequest, open_verification
from ..checkpoint.places import refuse_link
from ..checkpoint.source import read_json
from ..errors import InputError
from .annotations import AnnotatedCommand, write_annotations
from .options import debug_option, device_option, output_options
from .output import Output, gigabytes
from .serving_options import serving_options, take_serve_options

if TYPE_CHECKING:
    from ..verify.report import Check, Report

REPORT_NAMES = ("report.html", "report.md", "report.json", "junit.xml")
EXAMPLES = """
\b
Examples:
  nvquant verify ./gemma-4-31b-nvfp4
  nvquant verify me/gemma-4-31b-NVFP4
  nvquant verify me/gemma-4-31b-NVFP4 --stage structure
  nvquant verify ./gemma-4-31b-nvfp4 --against ./gemma-4-31b --report ./proof
  nvquant verify ./out --against ./model --stage numerics --max-kl 0.2 --min-top1 0.8
  nvquant verify ./out --against ./model --stage structure --stage numerics --stage serve --report ./proof
  nvquant verify ./out --stage serve --vllm "uvx vllm@0.33.0"
"""


@click.command("verify", cls=AnnotatedCommand, epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option(
    "--against",
    "model",
    metavar="MODEL",
    help="Compare with this source of the checkpoint, a folder or a model on the Hub.",
)
@click.option(
    "--stage",
    "stages",
    type=click.Choice(STAGES),
    multiple=True,
    help="Run this stage. You can repeat this option.",
    show_default="structure, and numerics with --against",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure on this text, conversations or token ids instead of the shipped held-out text.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=18, show_default=True, help="Measure on this many sequences."
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Use at most this many tokens of a sequence.",
)
@click.option(
    "--max-kl", type=click.FloatRange(min=0), metavar="NATS", help="Fail if the mean KL divergence is above this limit."
)
@click.option(
    "--min-top1",
    type=click.FloatRange(min=0, max=1),
    metavar="SHARE",
    help="Fail if the top-1 agreement is below this limit.",
    show_default="the recipe's, or 0.5",
)
@device_option
@serving_options
@click.option(
    "--bench",
    "bench_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Add the speeds of this bench.json from `nvquant bench` to the report.",
)
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write report.html, report.md, report.json and junit.xml to this folder.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the checks as JUnit XML."
)
@output_options
@debug_option
def command(
    checkpoint: str,
    model: str | None,
    stages: tuple[str, ...],
    bench_file: Path | None,
    report_folder: Path | None,
    junit: Path | None,
    out: Output,
    **measured: Any,
) -> int:
    """Prove CHECKPOINT, stage by stage.

    \b
    structure  checks its files, its configs under vLLM's rules, its scales, and its weights against MODEL
    numerics   measures KL divergence, perplexity, top-1 agreement and each layer's error against MODEL
    serve      loads it in a real server and checks the answers

    CHECKPOINT is a folder, or a model on the Hub as org/name[@revision], which is downloaded and verified completely.
    With `--stage structure` alone, only its headers and scales are read, by ranges, and the report lists the rest.

    Tensors are read in pieces and layers one after the other, so memory stays small. The exit code is 1 if a check
    failed.
    """
    for folder in (report_folder, None if junit is None else junit.parent):
        _check_writable(folder)
    _refuse_links(report_folder, junit)
    bench = None if bench_file is None else _read_bench(bench_file)
    request = VerifyRequest(
        checkpoint,
        model,
        stages or (("structure",) if model is None else ("structure", "numerics")),
        by_ranges=bool(stages),
        server=take_serve_options(measured),
        log_folder=report_folder,
        **measured,
    )
    verification = open_verification(request, out.stages())
    for check in verification.run():
        out.clear_live_line()
        _print_check(check, out)
    report = verification.report()
    _write(report, Path(checkpoint), report_folder, junit, bench, out)
    out.report(report.as_json, lambda: _print_verdict(report, out))
    return 0 if report.passed else 1


def _read_bench(path: Path) -> Mapping[str, Any]:
    from ..report.write import refuse_unreadable_bench

    bench = read_json(path, "nvquant bench writes it", is_named=True, way_out="write it again")
    refuse_unreadable_bench(bench, path)
    return bench


def _refuse_links(report_folder: Path | None, junit: Path | None) -> None:
    """Refuse a report that would be written through a link, before hours of work."""
    if report_folder is not None:
        for name in REPORT_NAMES:
            refuse_link(report_folder / name)
    if junit is not None:
        refuse_link(junit, "--junit")


def _check_writable(folder: Path | None) -> None:
    """Refuse a folder that is not writable, before hours of work."""
    if folder is None:
        return
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{folder} is not writable", where=folder, hint="Name another folder for the report")


def _write(
    report: Report,
    checkpoint: Path,
    folder: Path | None,
    junit: Path | None,
    bench: Mapping[str, Any] | None,
    out: Output,
) -> None:
    from ..report import github_annotations, write_junit, write_report, write_step_summary

    if folder is not None:
        write_report(report, folder, bench)
        out.say(f"Report: {folder / 'report.html'}")
    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        write_junit(report, junit)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        commands = github_annotations(report, checkpoint)
        if not write_annotations(commands):
            click.echo("\n".join(commands), err=True, nl=bool(commands))
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            write_step_summary(report, Path(summary))


def _print_check(check: Check, out: Output) -> None:
    verdict = "FAILED" if not check.passed else "unread" if check.is_unread else "ok"
    out.tell(f"{verdict:<7} {check.name:<14} {check.finding.looked_at}")
    for line in [*check.shown_faults, *check.finding.notes]:
        out.tell(f"{'':<10} {line}")


def _tell_unread(report: Report, out: Output) -> None:
    unread = report.checkpoint.get("unread_bytes")
    if unread:
        out.tell(
            f"Not read: {gigabytes(unread)} of {gigabytes(report.checkpoint['bytes'])} of tensors, which stayed on the "
            f"Hub. To download and check all of them, run the same command without --stage."
        )


def _print_verdict(report: Report, out: Output) -> None:
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        out.result(f"FAILED: {len(failed)} of {len(report.checks)} checks: {', '.join(failed)}.")
    else:
        unread = [check.name for check in report.checks if check.is_unread]
        rest = f". Not read: {', '.join(unread)}" if unread else ""
        out.result(f"Passed: all {len(report.checks) - len(unread)} checks{rest}.")
    _tell_unread(report, out)
