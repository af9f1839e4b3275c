"""The errors of the layers as an SVG file of its own: the report's chart, with the report's colours inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from .. import report
from ..report.charts import CHARACTER, LEFT, line_chart
from ..report.parts import Layers, Series

WIDTH, HEIGHT, LEGEND_HEIGHT = 940, 280, 26
TITLE = "Relative output error of each layer by itself"
NAMESPACE = "http://www.w3.org/2000/svg"
_RULE = re.compile(r"[^{}]+\{(?:[^{}]|\{[^{}]*\})*\}")
_SIZE_ON_PAGE = "display: block; width: 100%; height: auto; "  # an image has its own size
_OF_CHARTS = (":root", "@media (prefers-color-scheme", "svg", ".grid", ".line", ".cross", ".hover")


def layers_svg(layers: Layers | None) -> bytes | None:
    """Draw the chart as a file. Returns None where no layer was measured."""
    if layers is None or not layers.own:
        return None
    root = ElementTree.fromstring(line_chart(layers.own, WIDTH, HEIGHT, "layers", TITLE))
    root.set("xmlns", NAMESPACE)
    root.set("viewBox", f"0 {-LEGEND_HEIGHT} {WIDTH} {HEIGHT + LEGEND_HEIGHT}")
    root.set("height", str(HEIGHT + LEGEND_HEIGHT))
    style, back = Element("style"), Element("rect", {"y": str(-LEGEND_HEIGHT), "width": "100%", "height": "100%"})
    style.text = _style()
    back.set("class", "back")
    root.insert(2, style)  # behind title and desc, before everything that is drawn
    root.insert(3, back)
    _legend(root, layers.own)
    return ElementTree.tostring(root, encoding="unicode").encode() + b"\n"


def _legend(root: Element, series: Sequence[Series]) -> None:
    left = LEFT
    for at, line in enumerate(series):
        mark = SubElement(root, "g", {"class": f"line l{at}"})
        SubElement(mark, "circle", cx=f"{left + 5:.0f}", cy="-10", r="5")
        SubElement(root, "text", {"x": f"{left + 15:.0f}", "y": "-6"}).text = line.name
        left += 40 + CHARACTER * len(line.name)


def _style() -> str:
    """The rules of the report's style sheet that concern charts, and a background: a page's own may be any."""
    sheet = resources.files(report.__name__).joinpath("style.css").read_text(encoding="utf-8")
    rules = [rule.strip() for rule in _RULE.findall(sheet)]
    chosen = [rule.replace(_SIZE_ON_PAGE, "") for rule in rules if rule.startswith(_OF_CHARTS)]
    return "\n".join(["", *chosen, ".back { fill: var(--card); }", ""])
