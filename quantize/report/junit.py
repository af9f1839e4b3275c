"""JUnit XML: a suite for every stage, a case for every check, in the form that CI systems read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..checkpoint.places import write_whole
from ..quoting import visible
from ..verify.report import NOT_READ, Report
from .document import STAGES, document, stages_run

NOT_APPLICABLE = "not applicable"
NOT_RUN = {"structure": "files not checked", "numerics": "numbers not measured", "serve": "not served"}


def write_junit(report: Report, path: Path) -> Path:
    """Write `path`, and create its folder where it is missing.

    A stage that was not run is one skipped case, so that a green list never hides it. A check that does not apply to
    this checkpoint is a skipped case too.
    """
    whole = document(report)
    root = ElementTree.Element("testsuites", name="nvquant verify")
    for stage in [*stages_run(whole), *(name for name in STAGES if name not in stages_run(whole))]:
        _add_suite(root, stage, [check for check in whole["checks"] if check["stage"] == stage], stages_run(whole))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    return path


def _add_suite(
    root: ElementTree.Element, stage: str, checks: Sequence[Mapping[str, Any]], stages: Sequence[str]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=visible(stage))
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"nvquant.verify.{visible(stage)}", name=visible(check["name"])
        )
        if not check["passed"]:
            faults = check["faults"] or [check["detail"]]
            failure = ElementTree.SubElement(case, "failure", type="CheckFailed", message=visible(faults[0]))
            failure.text = visible("\n".join([check["looked_at"], *faults]))
        elif check["looked_at"].startswith((NOT_APPLICABLE, NOT_READ)):
            ElementTree.SubElement(case, "skipped", message=visible(check["looked_at"]))
        else:
            ElementTree.SubElement(case, "system-out").text = visible(check["looked_at"])
    if stage not in stages:
        case = ElementTree.SubElement(suite, "testcase", classname=f"nvquant.verify.{stage}", name=stage)
        ElementTree.SubElement(case, "skipped", message=NOT_RUN[stage])
    cases = list(suite)
    counts = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "skipped")}
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", "0")
    suite.set("skipped", str(counts["skipped"]))
