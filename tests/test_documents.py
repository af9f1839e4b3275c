"""The documentation says what the repository holds: links lead somewhere, and numbers are those of the kept results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"python (benchmarks/\w+\.py)", page.read_text(encoding="utf-8"))
    assert not [program for program in named if not (ROOT / program).exists()]


def test_the_page_of_benchmarks_says_what_the_results_say() -> None:
    program = [sys.executable, ROOT / "benchmarks" / "plot.py", "--check"]
    checked = subprocess.run(program, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
