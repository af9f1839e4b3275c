"""The curve of KL divergence over bytes as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..report.charts import BOTTOM, LEFT, RIGHT, Axis, value_axis, value_ticks
from ..report.words import number
from .document import PointRecord, RecipeRecord

WIDTH, HEIGHT = 860, 340
TITLE = "Forecast of the mean KL divergence (nats) by the size of the tensors (GB)"
_STYLE = """
svg { font: 12px system-ui, sans-serif; }
.back { fill: #ffffff; } text { fill: #3d4451; } .grid { stroke: #d7dbe2; }
.curve { fill: none; stroke: #2f7d4f; stroke-width: 2; } .chosen { fill: #c46b2d; }
@media (prefers-color-scheme: dark) {
  .back { fill: #15181e; } text { fill: #c9cfd9; } .grid { stroke: #333a45; } .curve { stroke: #6cc08b; }
}
"""


def curve_svg(points: Sequence[PointRecord], recipes: Sequence[RecipeRecord]) -> bytes:
    """Draw the curve, with a mark for each recipe.

    Args:
        points: in the order of the steps. At least one.
        recipes: whose points are among them.
    """
    sizes = [point.tensor_bytes / 1e9 for point in points]
    x = Axis(min(sizes), max(sizes), LEFT + 8, WIDTH - RIGHT - 24)
    y = value_axis([point.kl for point in points], HEIGHT)
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"})
    root.set("width", str(WIDTH))
    root.set("height", str(HEIGHT))
    SubElement(root, "title").text = TITLE
    SubElement(root, "style").text = _STYLE
    SubElement(root, "rect", {"class": "back", "width": "100%", "height": "100%"})
    for tick in value_ticks(y):
        top = f"{y.at(tick):.1f}"
        SubElement(root, "line", {"class": "grid", "x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": top, "y2": top})
        _text(root, LEFT - 8, y.at(tick) + 4, number(tick, 2), "end")
    for tick in value_ticks(x) if x.high > x.low else [x.low]:
        _text(root, x.at(tick), HEIGHT - BOTTOM + 16, number(tick), "middle")
    _text(root, WIDTH / 2, HEIGHT - 4, "GB", "middle")
    _text(root, LEFT, 14, TITLE, "start")
    places = [f"{x.at(size):.1f},{y.at(point.kl):.1f}" for size, point in zip(sizes, points, strict=True)]
    SubElement(root, "polyline", {"class": "curve", "points": " ".join(places)})
    for recipe in recipes:
        at = next(at for at, point in enumerate(points) if (point.bits, point.kl) == (recipe.bits, recipe.kl))
        left, top = places[at].split(",")
        mark = SubElement(root, "circle", {"class": "chosen", "cx": left, "cy": top, "r": "5"})
        SubElement(mark, "title").text = f"{recipe.name}: {recipe.bits:.2f} bits, KL {recipe.kl:.4f}"
        _text(root, float(left) + 8, float(top) - 8, recipe.name, "start")
    return ElementTree.tostring(root, encoding="unicode").encode() + b"\n"


def _text(root: Element, left: float, top: float, text: str, anchor: str) -> None:
    SubElement(root, "text", {"x": f"{left:.1f}", "y": f"{top:.1f}", "text-anchor": anchor}).text = text
