"""The parts of a report, as words and numbers. HTML and Markdown are written from the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["passed", "failed", "absent"]


@dataclass(frozen=True)
class Column:
    """A table's column. `code` is for names from files, `number` for right-aligned values."""

    title: str
    kind: Literal["text", "code", "number"] = "number"


@dataclass(frozen=True)
class Table:
    """A table of finished strings.

    Attributes:
        swatches: the colour's number for each row, where a chart beside the table uses colours.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    swatches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage's part of the verdict: `structure`, passed, `all 20 checks passed`."""

    name: str
    state: State
    words: str


@dataclass(frozen=True)
class Failure:
    """A failed check in the verdict: where, and the first fault."""

    stage: str
    name: str
    fault: str
    more: int


@dataclass(frozen=True)
class Verdict:
    """The first part of a report.

    Attributes:
        more: failed checks beyond the listed ones.
        missing: stages that did not run, such as `not served`.
    """

    state: State
    word: str
    words: str
    failures: tuple[Failure, ...]
    more: int
    stages: tuple[Stage, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """A line of a chart: (layer, value), NaN and infinities included."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Layers:
    """The errors of the decoder's layers."""

    own: tuple[Series, ...]
    accumulated: tuple[Series, ...]
    worst: tuple[str, ...]
    table: Table


@dataclass(frozen=True)
class Bar:
    """A stacked bar: (group, bytes, the colour's number)."""

    name: str
    segments: tuple[tuple[str, float, int], ...]


@dataclass(frozen=True)
class Sizes:
    """The bytes by group, before and after."""

    words: str
    bars: tuple[Bar, ...]
    table: Table


@dataclass(frozen=True)
class Answer:
    """The server's answer to a prompt."""

    prompt: str
    text: str
    words: str
    fault: str | None


@dataclass(frozen=True)
class CheckLine:
    """A check in the list of all. `state` is absent where it does not apply."""

    stage: str
    name: str
    state: State
    looked_at: str
    faults: tuple[str, ...]
    more: int


@dataclass(frozen=True)
class Served:
    """The results of the real server."""

    facts: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    verdict: Verdict
    tiles: tuple[Tile, ...] = ()
    accuracy: Table | None = None
    accuracy_notes: tuple[str, ...] = ()
    kinds: Table | None = None
    kind_warnings: tuple[str, ...] = ()
    layers: Layers | None = None
    sizes: Sizes | None = None
    served: Served | None = None
    speed: tuple[Table, ...] = ()
    speed_notes: tuple[str, ...] = ()
    checks: tuple[CheckLine, ...] = ()
    matrices: tuple[Table, ...] = ()
    command: str = ""
    reproduce: tuple[tuple[str, str], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()
