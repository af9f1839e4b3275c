"""The benchmark's figures as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import numeric, rows
from .parts import Column, Table
from .words import as_float, number, one_line


def speed_tables(bench: Any) -> tuple[Table, ...]:
    """The benchmark's points, one a row; empty without a benchmark."""
    points = rows(bench.get("points")) if isinstance(bench, Mapping) else []
    keys = list(dict.fromkeys(key for point in points for key, value in point.items() if _is_plain(value)))
    if not points or not keys:
        return ()
    columns = tuple(Column(_title(key), "number" if _is_numeric(points, key) else "text") for key in keys)
    lines = tuple(tuple(_cell(point.get(key)) for key in keys) for point in points)
    return (Table("Speed of serving", columns, lines),)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping | list)


def _is_numeric(points: list[Mapping[str, Any]], key: str) -> bool:
    return any(as_float(numeric(point.get(key))) is not None for point in points)


def _cell(value: Any) -> str:
    value = numeric(value)
    return one_line(value) if isinstance(value, str | bool) else number(value)


def _title(key: str) -> str:
    return one_line(key).replace("_per_second", "/s").replace("_", " ")
