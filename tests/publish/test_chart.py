"""The chart as a file of its own: whole XML that needs nothing else."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from nvquant.publish.chart import NAMESPACE, layers_svg
from nvquant.report.document import document
from nvquant.report.page import page_of
from support import reports


def svg(report: Any) -> bytes | None:
    return layers_svg(page_of(document(report)).layers)


def test_the_chart_shows_every_layer_of_both_arithmetics_with_a_legend() -> None:
    drawn = svg(reports.good(30))
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{{{NAMESPACE}}}svg"
    circles = root.findall(f".//{{{NAMESPACE}}}circle")
    assert len(circles) == 2 * 30 + 2  # and two in the legend
    words = [text.text for text in root.iter(f"{{{NAMESPACE}}}text")]
    assert {"W4A4", "weight-only", "layer", "layer 10"} <= set(words)


def test_the_chart_brings_its_colours_for_light_and_dark_pages_and_fetches_nothing() -> None:
    text = (svg(reports.good(3)) or b"").decode()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "--l0: #2f6fbd" in style and "prefers-color-scheme: dark" in style and ".line.l1" in style
    assert "width: 100%" not in style  # an image of no size of its own
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    assert used <= set(re.findall(r"(--[\w-]+):", style))
    assert not re.search(r"href|url\(|@import|<script|https?://(?!www\.w3\.org/2000/svg)", text)


def test_there_is_no_chart_without_numbers() -> None:
    assert svg(reports.bare()) is None


def test_numbers_that_are_none_are_drawn_as_crosses() -> None:
    drawn = (svg(reports.failing()) or b"").decode()
    assert 'class="cross"' in drawn and "nan" not in drawn.lower()
    ElementTree.fromstring(drawn)
