"""The forms of a report for GitHub: annotations on the run, and the summary of the step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..quoting import workflow_command
from ..verify.report import Check, Report
from .document import document
from .markdown import render_markdown
from .page import page_of

MOST_ANNOTATIONS = 10  # GitHub shows ten of a kind and a step
MOST_SUMMARY_BYTES = 900_000  # GitHub drops a step's whole summary over 1 MiB
_FILE = re.compile(r"[\w.-]+\.(?:safetensors|json|jinja|model|txt)\b")


def github_annotations(report: Report, folder: Path) -> list[str]:
    """Workflow commands that name the failing checks, one a line.

    Args:
        folder: the checkpoint. A file of it that a check names is linked if it lies in the workspace.
    """
    failed = [check for check in report.checks if not check.passed]
    shown = failed if len(failed) <= MOST_ANNOTATIONS else failed[: MOST_ANNOTATIONS - 1]
    lines = [_annotation(check, folder) for check in shown]
    if len(failed) > len(shown):
        names = ", ".join(f"{check.name} ({check.stage})" for check in failed[len(shown) :])
        lines.append(
            workflow_command("error", {"title": f"nvquant: {len(failed) - len(shown)} more checks failed"}, names)
        )
    return lines


def write_step_summary(report: Report, path: Path, bench: Mapping[str, Any] | None = None) -> None:
    """Append the report to the file that $GITHUB_STEP_SUMMARY names, without details where it would grow too large."""
    page = page_of(document(report, bench))
    written = path.stat().st_size if path.exists() else 0
    for with_details in (True, False):
        text = render_markdown(page, with_details=with_details) + "\n"
        if written + len(text.encode()) <= MOST_SUMMARY_BYTES:
            break
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _annotation(check: Check, folder: Path) -> str:
    properties: dict[str, Any] = {}
    file = _named_file(check, folder)
    if file is not None:
        properties["file"] = file
    properties["title"] = f"nvquant: {check.name} failed ({check.stage})"
    return workflow_command("error", properties, "\n".join([*check.shown_faults, check.finding.looked_at]))


def _named_file(check: Check, folder: Path) -> str | None:
    """The first file of the checkpoint that a fault names, relative to the workspace."""
    for fault in check.finding.faults:
        for found in _FILE.finditer(fault):
            path = (folder / found[0]).resolve()
            if path.is_file() and path.is_relative_to(Path.cwd()):
                return path.relative_to(Path.cwd()).as_posix()
    return None
