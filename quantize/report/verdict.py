"""The verdict in words, and the list of checks behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..quoting import one_line
from ..verify.report import NOT_READ, counted
from .document import STAGES, stages_run
from .junit import NOT_APPLICABLE, NOT_RUN
from .parts import CheckLine, Failure, Stage, State, Verdict

SHOWN_FAILURES = 5
SHOWN_FAULTS = 8


def verdict_of(whole: Mapping[str, Any]) -> Verdict:
    """The verdict of a document: passed, or failed and why, and the stages that did not run."""
    checks = whole["checks"]
    failed = [check for check in checks if not check["passed"]]
    ran = stages_run(whole)
    state: State = "failed" if failed else "passed" if checks else "absent"
    return Verdict(
        state,
        {"failed": "Failed", "passed": "Passed", "absent": "Nothing was checked"}[state],
        _words(len(checks), len(failed)),
        tuple(_failure(check) for check in failed[:SHOWN_FAILURES]),
        max(len(failed) - SHOWN_FAILURES, 0),
        tuple(_stage(name, checks, ran) for name in [*ran, *(name for name in STAGES if name not in ran)]),
        tuple(words for name, words in NOT_RUN.items() if name not in ran),
    )


def check_lines(checks: Sequence[Mapping[str, Any]]) -> tuple[CheckLine, ...]:
    """All checks in their order, the failed ones first, those that do not apply last."""
    lines = [_line(check) for check in checks]
    return tuple(line for state in ("failed", "passed", "absent") for line in lines if line.state == state)


def _words(checks: int, failed: int) -> str:
    if not checks:
        return "No check was run, so nothing is known about this checkpoint."
    if failed:
        return f"{failed:,} of {counted(checks, 'check')} failed."
    return "The only check passed." if checks == 1 else f"All {checks:,} checks passed."


def _failure(check: Mapping[str, Any]) -> Failure:
    faults = check["faults"] or [check["detail"]]
    return Failure(check["stage"], one_line(check["name"]), one_line(faults[0]), len(faults) - 1)


def _stage(name: str, checks: Sequence[Mapping[str, Any]], ran: Sequence[str]) -> Stage:
    own = [check for check in checks if check["stage"] == name]
    failed = sum(not check["passed"] for check in own)
    if name not in ran or not own:
        return Stage(name, "absent", NOT_RUN.get(name, "not run"))
    if failed:
        return Stage(name, "failed", f"{failed:,} of {counted(len(own), 'check')} failed")
    return Stage(name, "passed", "the only check passed" if len(own) == 1 else f"all {len(own):,} checks passed")


def _line(check: Mapping[str, Any]) -> CheckLine:
    looked_at = one_line(check["looked_at"])
    is_absent = looked_at.startswith((NOT_APPLICABLE, NOT_READ))
    faults = [one_line(fault) for fault in check["faults"]]
    return CheckLine(
        one_line(check["stage"]),
        one_line(check["name"]),
        "failed" if not check["passed"] else "absent" if is_absent else "passed",
        looked_at,
        tuple(faults[:SHOWN_FAULTS]),
        max(len(faults) - SHOWN_FAULTS, 0),
    )
