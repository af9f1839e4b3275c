"""A verdict for people and machines: one HTML page, Markdown, JUnit XML, annotations."""

from __future__ import annotations

from .github import github_annotations, write_step_summary
from .junit import write_junit
from .write import write_report

__all__ = ["github_annotations", "write_junit", "write_report", "write_step_summary"]
