"""The output of commands: results on stdout, messages on stderr, and progress in the form that fits the stream."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..quoting import json_text, lines, message

if TYPE_CHECKING:
    from ..convert.progress import ProgressSink

PLAIN_INTERVAL_SECONDS = 10.0
BAR_CELLS = 24
TABLE_CELLS = 300  # no column is cut, however narrow the terminal is
StageProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Output:
    """The one way from a command to its user. Only this object knows how the user wants the output.

    | method | human | with --json | with --quiet |
    |---|---|---|---|
    | `report` | the words | the document | the words |
    | `result` | stdout | nothing | stdout |
    | `tell`, `table` | stdout | nothing | nothing |
    | `say`, progress | stderr | stderr | nothing |

    Attributes:
        is_json: whether one JSON document is the whole of stdout.
        is_quiet: whether only the result and errors appear.
    """

    is_json: bool = False
    is_quiet: bool = False

    def __post_init__(self) -> None:
        """Silence the warnings of nvquant's loggers too, if necessary."""
        if self.is_quiet:
            logging.getLogger("nvquant").setLevel(logging.ERROR)

    def report(self, document: Callable[[], Mapping[str, Any]], words: Callable[[], None]) -> None:
        """Print the JSON document, or else call `words`, which prints the same for people."""
        if self.is_json:
            click.echo(json_text(document()))
        else:
            words()

    def result(self, text: str) -> None:
        """Print lines on stdout that are the result itself, without control characters, secrets and commands to a CI
        system."""
        if not self.is_json:
            click.echo(lines(text))

    def tell(self, text: str = "") -> None:
        """Print lines on stdout that explain the result, as `result` does."""
        if not self.is_quiet:
            self.result(text)

    def say(self, text: str) -> None:
        """Print a message on stderr, as `result` does on stdout."""
        if not self.is_quiet:
            _to_stderr(text)

    def fail(self, text: str) -> None:
        """Print an error on stderr, for a command that has printed its result and ends in a failure."""
        _to_stderr(f"Error: {message(text)}")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table on stdout, as plain text if stdout is not a terminal."""
        if self.is_json or self.is_quiet:
            return
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

    def stages(self) -> StageProgress:
        """A function (done, total, phase) that shows the progress of work that is counted in phases, as in verify."""
        if self.is_quiet:
            return lambda done, total, phase: None
        report = _stage_reporter()
        return lambda done, total, phase: report(done, total, f"{phase}: {done} of {total}" if total else phase)

    def conversion(self) -> AbstractContextManager[ProgressSink]:
        """A display of the progress of a conversion."""
        if self.is_quiet:
            return nullcontext(lambda state: None)
        from .progress import progress_display

        return progress_display()

    def clear_live_line(self) -> None:
        """Remove the live line that `stages` may have left on a terminal."""
        if not self.is_quiet:
            _clear_live_line()


class _Log(logging.Handler):
    """Shows nvquant's own warnings as `say` does if no other handler takes them. Python's last resort would print them
    unquoted."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            _to_stderr(message(record.getMessage()))


def send_warnings_to_stderr() -> None:
    """Let the warnings of nvquant's loggers appear on stderr, quoted. Further calls have no effect."""
    logger = logging.getLogger("nvquant")
    if not any(isinstance(handler, _Log) for handler in logger.handlers):
        logger.addHandler(_Log(logging.WARNING))


def gigabytes(size: int) -> str:
    """Bytes as GB (10^9), to meaningful digits."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def _to_stderr(text: str) -> None:
    click.echo(lines(text), err=True)


def _clear_live_line() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def _stage_reporter() -> StageProgress:
    """Shows the progress as a live line on a terminal, and as a plain line now and then elsewhere."""
    last = [0.0]
    is_terminal = sys.stderr.isatty()

    def report(done: int, total: int, phase: str) -> None:
        now = time.monotonic()
        line = message(phase)
        if is_terminal:
            click.echo(f"\r\x1b[K{_bar(done, total)}{line}", err=True, nl=False)
            if done == total:
                _clear_live_line()
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
