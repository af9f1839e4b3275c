"""The results of verification: one verdict a check, and the verdict over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN_FAULTS = 5
MOST_FAULTS = 1000  # in a document
NOT_READ = "not read from the Hub"


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        looked_at: the things that it read, in numbers, or why the check does not apply.
        faults: one phrase an offender, its name first, with the numbers. Empty where the check passed.
        notes: more lines for the terminal, which have no part in the verdict.
    """

    looked_at: str
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Check:
    """A check with its verdict."""

    stage: str
    name: str
    finding: Finding

    @property
    def passed(self) -> bool:
        """Whether there was no fault."""
        return not self.finding.faults

    @property
    def is_unread(self) -> bool:
        """Whether it passed only because its bytes stayed on the Hub."""
        return self.finding.looked_at.startswith(NOT_READ)

    @property
    def shown_faults(self) -> list[str]:
        """The first few faults, and how many more there are."""
        faults = self.finding.faults
        more = len(faults) - SHOWN_FAULTS
        return [*faults[:SHOWN_FAULTS], *([f"and {more:,} more"] if more > 0 else [])]

    @property
    def detail(self) -> str:
        """One line: the things that were read, and the first few faults."""
        return "; ".join([self.finding.looked_at, *self.shown_faults])

    def as_json(self) -> dict[str, Any]:
        """Returns the check in the document of `verify --json`."""
        return {
            "stage": self.stage,
            "name": self.name,
            "passed": self.passed,
            "detail": self.detail,
            "looked_at": self.finding.looked_at,
            "faults": list(self.finding.faults[:MOST_FAULTS]),
        }


@dataclass(frozen=True)
class Report:
    """The verdict over all checks, in the order in which they were done.

    Attributes:
        checkpoint: its name, layout, recipe and sizes by group.
        numerics: the numbers of the stage `numerics`. None where it did not run.
        serve: the results of the stage `serve`. None where it did not run.
    """

    checks: tuple[Check, ...]
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    numerics: Mapping[str, Any] | None = None
    serve: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Returns the document of `verify --json`. See `plain_json`."""
        document: dict[str, Any] = plain_json(
            {
                "passed": self.passed,
                "checks": [check.as_json() for check in self.checks],
                "checkpoint": self.checkpoint,
                "numerics": self.numerics,
                "serve": self.serve,
            }
        )
        return document


def plain_json(value: Any) -> Any:
    """Returns a value in JSON's own types.

    JSON has no NaN and no infinity. They become the strings "NaN", "Infinity" and "-Infinity", which no comparison with
    a limit mistakes for a small number. It could mistake null for one."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: `1 file`, `31 files`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def not_applicable(why: str) -> Finding:
    """A check that has nothing to look at, which is no fault."""
    return Finding(f"not applicable: {why}")


def not_read(what: str) -> Finding:
    """A check of bytes that are not read over the network, which is no fault and no proof."""
    return Finding(f"{NOT_READ}: {what} (run verify without --stage to download and read them)")
