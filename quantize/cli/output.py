"""The output of commands: results on stdout, messages on stderr, and progress in the form that fits the stream."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from ..quoting import json_text, lines, message

PLAIN_INTERVAL_SECONDS = 10.0
BAR_CELLS = 24
TABLE_CELLS = 300  # no column is cut, however narrow the terminal is


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    click.echo(json_text(document))


def tell(text: str = "") -> None:
    """Print lines on stdout, without control characters, secrets and commands to a CI system."""
    click.echo(lines(text))


def say(text: str) -> None:
    """Print lines on stderr, as `tell` does on stdout."""
    click.echo(lines(text), err=True)


class _Log(logging.Handler):
    """Shows nvquant's own warnings as `say` does if no other handler takes them. Python's last resort would print them
    unquoted."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            say(message(record.getMessage()))


def send_warnings_to_stderr() -> None:
    """Let the warnings of nvquant's loggers appear on stderr, quoted. Further calls have no effect."""
    logger = logging.getLogger("nvquant")
    if not any(isinstance(handler, _Log) for handler in logger.handlers):
        logger.addHandler(_Log(logging.WARNING))


def gigabytes(size: int) -> str:
    """Bytes as GB (10^9), to meaningful digits."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout, as plain text if stdout is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(message(value)) for value in row))
    console = Console(soft_wrap=True, width=TABLE_CELLS)
    with console.capture() as text:
        console.print(table)
    click.echo(text.get(), nl=False)  # where the reader has gone, rich would end the program with a code of its own


def stage_reporter() -> Callable[[int, int, str], None]:
    """A `progress_reporter` for work that is counted in phases, as in verify."""
    report = progress_reporter()
    return lambda done, total, phase: report(done, total, f"{phase}: {done} of {total}" if total else phase)


def clear_live_line() -> None:
    """Remove the live line that `progress_reporter` may have left on a terminal."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def progress_reporter() -> Callable[[int, int, str], None]:
    """A function (done, total, phase) that keeps the user informed: a live line on a terminal, a plain line now
    and then elsewhere."""
    started = time.monotonic()
    last = [0.0]
    is_terminal = sys.stderr.isatty()

    def report(done: int, total: int, phase: str) -> None:
        now = time.monotonic()
        remaining = (now - started) * (total - done) / done if done else 0.0
        line = (
            f"{phase}: layer {done}/{total}, {now - started:.0f} s, about {remaining:.0f} s left"
            if phase == "layers"
            else phase
        )
        line = message(line)
        if is_terminal:
            click.echo(f"\r\x1b[K{_bar(done, total)}{line}", err=True, nl=False)
            if done == total:
                clear_live_line()
        elif now - last[0] >= PLAIN_INTERVAL_SECONDS or done == total == 0:
            last[0] = now
            click.echo(line, err=True)

    return report


def _bar(done: int, total: int) -> str:
    """A progress bar for a terminal, empty if the total is unknown."""
    if total <= 0:
        return ""
    filled = round(BAR_CELLS * min(done, total) / total)
    return f"{'━' * filled}{'╺' * (BAR_CELLS - filled)} "
