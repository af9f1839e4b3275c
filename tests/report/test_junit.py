"""JUnit XML: well-formed, of the structure that CI systems read, and true to the checks."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from nvquant.report import write_junit
from nvquant.verify.report import Check, Finding, Report
from support import reports

# Element: attributes it must have, those it may have, its children; after the schema of Jenkins's xunit plugin
# (junit-10.xsd), which pytest's xunit2 family and GitLab's reader follow as well.
STRUCTURE = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url", "version"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "rerunFailure", "rerunError", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


def read(report: Report, folder: Path) -> ElementTree.Element:
    root = ElementTree.parse(write_junit(report, folder / "new" / "junit.xml")).getroot()
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional, children = STRUCTURE[element.tag]
        assert required <= set(element.attrib) <= required | optional
        assert {child.tag for child in element} <= children
        if element.tag == "testcase":
            assert len(element) <= 1
    for suite in root:
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped"))
    for name in ("tests", "failures", "errors"):
        assert int(root.attrib[name]) == sum(int(suite.attrib[name]) for suite in root)
    return root


def test_a_suite_for_each_stage_and_a_case_for_each_check(tmp_path: Path) -> None:
    report = reports.failing()
    root = read(report, tmp_path)
    assert [suite.attrib["name"] for suite in root] == ["structure", "numerics", "serve"]
    assert root.attrib["tests"] == str(len(report.checks)) and root.attrib["failures"] == "4"
    failures = {case.attrib["name"]: case.find("failure") for case in root.iter("testcase")}
    failure = failures["block_scales"]
    assert failure is not None and failure.attrib["message"].endswith(
        "layers.0.mlp.gate_proj.weight_scale: NaN in block 17"
    )
    assert (failure.text or "").splitlines()[0] == "1,071,644,672 block scales"
    assert len((failure.text or "").splitlines()) == 32
    assert failures["headers"] is None


def test_what_was_not_run_or_does_not_apply_is_skipped(tmp_path: Path) -> None:
    root = read(reports.bare(), tmp_path)
    skipped = {case.attrib["name"]: case.find("skipped") for case in root.iter("testcase")}
    told = {name: element.attrib["message"] for name, element in skipped.items() if element is not None}
    assert told == {
        "kv_cache": "not applicable: no KV cache scheme",
        "numerics": "numbers not measured",
        "serve": "not served",
    }


@pytest.mark.parametrize("text", ["\x00\x1b[31m", "]]><x/>", "<&\"'", "\ud800\ufffe", "日本語 🙂", "a\nb"])
def test_any_string_is_well_formed(tmp_path: Path, text: str) -> None:
    root = read(Report((Check("structure", text, Finding(text, [text])), Check("other", "x", Finding(text)))), tmp_path)
    assert root.attrib["failures"] == "1"


def test_no_checks_at_all(tmp_path: Path) -> None:
    assert read(Report(()), tmp_path).attrib["tests"] == "3"
