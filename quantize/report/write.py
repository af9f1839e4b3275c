"""Write a report: one HTML page, Markdown, JSON and JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.places import write_whole
from ..errors import InputError
from ..verify.report import Report
from .document import document
from .html import render_html
from .junit import write_junit
from .markdown import render_markdown
from .page import page_of

_WRONG_FORM = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)


def refuse_unreadable(whole: Mapping[str, Any], path: Path, written_by: str) -> None:
    """Refuse, before any work, a document from a file that no report can be made of.

    Args:
        path: the file.
        written_by: the command that writes such files.
    Raises:
        InputError: a value is missing, or has another type.
    """
    try:
        page = page_of(whole)
        render_markdown(page)
        render_html(page)
    except _WRONG_FORM as error:
        raise InputError(
            f"{path} does not have the form that `{written_by}` writes ({type(error).__name__})",
            where=path,
            hint="write it again",
        ) from error


def refuse_unreadable_bench(bench: Mapping[str, Any], path: Path) -> None:
    """`refuse_unreadable` for the document of `nvquant bench --json`.

    Raises:
        InputError: see there.
    """
    try:
        whole = document(Report(()), bench)
    except _WRONG_FORM as error:
        raise InputError(
            f"{path} does not have the form that `nvquant bench` writes", where=path, hint="write it again"
        ) from error
    refuse_unreadable(whole, path, "nvquant bench")


def write_report(report: Report, folder: Path, bench: Mapping[str, Any] | None = None) -> list[Path]:
    """Write `report.html`, `report.md`, `report.json` and `junit.xml`, and create the folder where it is missing.

    The same report gives the same bytes. It contains no time, host or absolute path except the measured ones.

    Args:
        bench: the document of `nvquant bench --json`, for the table of speeds.
    Returns:
        the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = document(report, bench)
    page = page_of(whole)
    texts = {
        "report.html": render_html(page),
        "report.md": render_markdown(page),
        "report.json": json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
        write_whole(folder / name, text.encode("utf-8", errors="replace"))
    return [*(folder / name for name in texts), write_junit(report, folder / "junit.xml")]
