"""The character that separates the columns of a CSV file. Spreadsheets in many languages write semicolons."""

from __future__ import annotations

import csv
import io
import re

_DELIMITERS = (",", ";", "\t", "|")
_MOST_HEADER = 10_000  # characters of a header line
_STATED = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's own first line


def delimiter_of(text: str) -> tuple[str, str]:
    """A CSV's delimiter, and its text from the header line on.

    A first line `sep=;` states the delimiter. Otherwise it is the one that divides the header line into the most
    columns, or the comma where several do.
    """
    stated = _STATED.match(text)
    if stated:
        return stated[1], text[stated.end() :]
    header = text[:_MOST_HEADER].lstrip("\r\n")
    return max(_DELIMITERS, key=lambda delimiter: _columns(header, delimiter)), text


def _columns(header: str, delimiter: str) -> int:
    """Number of columns in the first line, 0 where it cannot be read with this delimiter."""
    try:
        return len(next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), []))
    except csv.Error:
        return 0
