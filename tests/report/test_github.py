"""What GitHub is told: commands that it parses back into the same words, and a summary that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvquant.report import github_annotations, write_step_summary
from nvquant.report.github import MOST_SUMMARY_BYTES
from nvquant.verify.report import Check, Finding, Report
from support import reports


def parsed(line: str) -> tuple[dict[str, str], str]:
    """A command as GitHub's runner reads it: percent escapes taken back, `%25` last."""
    assert "\n" not in line and "\r" not in line and line.startswith("::error ")
    properties, message = line.removeprefix("::error ").split("::", 1)

    def plain(text: str) -> str:
        for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            text = text.replace(escape, character)
        return text

    return {key: plain(value) for key, value in (pair.split("=", 1) for pair in properties.split(","))}, plain(message)


def failed(*faults: str, name: str = "hashes", looked_at: str = "12 files, 32.6 GB") -> Report:
    return Report(
        (Check("structure", "headers", Finding("fine")), Check("structure", name, Finding(looked_at, faults)))
    )


def test_each_failing_check_is_named() -> None:
    lines = [parsed(line) for line in github_annotations(reports.failing(), Path("model"))]
    assert [properties["title"] for properties, _ in lines] == [
        "nvquant: block_scales failed (structure)",
        "nvquant: shards failed (structure)",
        "nvquant: kl failed (numerics)",
        "nvquant: answers failed (serve)",
    ]
    assert lines[0][1].splitlines()[-2:] == ["and 26 more", "1,071,644,672 block scales"]
    assert github_annotations(reports.good(), Path("model")) == []


@pytest.mark.parametrize(
    "text", ["100 % of a,b: c", "two\nlines", "%0A::warning::x", "::set-output name=a::b", "a\r\n::x::"]
)
def test_words_survive_the_escaping(text: str) -> None:
    properties, message = parsed(github_annotations(failed(text, name=text), Path("m"))[0])
    assert message == f"{text}\n12 files, 32.6 GB"
    assert properties == {"title": f"nvquant: {text} failed (structure)"}


def test_a_file_of_the_workspace_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    fault = "config.json has another sha256 than recorded"
    for folder in (Path("out"), tmp_path / "out"):
        properties, _ = parsed(github_annotations(failed(fault), folder)[0])
        assert properties["file"] == "out/config.json"
    assert "file" not in parsed(github_annotations(failed("model.safetensors is gone"), Path("out"))[0])[0]
    monkeypatch.chdir(tmp_path / "out")
    assert "file" not in parsed(github_annotations(failed("../../etc/passwd.json"), tmp_path)[0])[0]


def test_more_than_github_shows_are_summed_up() -> None:
    checks = [Check("structure", f"check_{at}", Finding("x", ["y"])) for at in range(14)]
    lines = github_annotations(Report(tuple(checks)), Path("m"))
    assert len(lines) == 10
    properties, message = parsed(lines[-1])
    assert properties["title"] == "nvquant: 5 more checks failed"
    assert message.startswith("check_9 (structure), ") and message.endswith("check_13 (structure)")


def test_the_summary_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("# before\n")
    write_step_summary(reports.good(), path)
    text = path.read_text("utf-8")
    assert text.startswith("# before\n") and "Passed: gemma-4-31b-nvfp4" in text and "Every layer" in text


def test_a_summary_near_the_limit_leaves_the_details_out(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("x" * (MOST_SUMMARY_BYTES - 9000))
    write_step_summary(reports.good(), path)
    text = path.read_text("utf-8")
    assert "Passed: gemma-4-31b-nvfp4" in text and "Every layer" not in text
    assert len(text.encode()) <= MOST_SUMMARY_BYTES
