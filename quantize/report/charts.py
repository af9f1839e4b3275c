"""Inline SVG charts: the layers' errors as lines, the bytes as stacked bars. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from .parts import Bar, Series
from .words import number, size

LOG_FROM = 8.0  # largest over smallest, from which a logarithmic axis shows more
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 24.0, 34.0
CHARACTER = 6.4  # an average character's width at the charts' font size


@dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value within the axis, or the middle where the axis has no extent."""
        low, high, value = (
            (math.log10(part) for part in (self.low, self.high, max(value, self.low)))
            if self.is_log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def line_chart(series: Sequence[Series], width: int, height: int, key: str, title: str) -> str:
    """Errors by layer, one line a series, as an SVG element.

    A value that is infinite or no number is a cross at the upper edge. The layer with the largest error of the first
    series carries its number. Every layer's values are shown on hovering.

    Args:
        key: unique on the page, for the ids that title and description need.
    """
    points = [point for line in series for point in line.points]
    layers = sorted({layer for layer, _ in points})
    x = Axis(layers[0], layers[-1], LEFT + 8, width - RIGHT)
    y = value_axis([value for _, value in points if math.isfinite(value)], height)
    root = _svg(width, height, key, title, _description(series, y.is_log))
    for tick in value_ticks(y):
        _grid(root, y.at(tick), width, number(tick, 1 if y.is_log else 2))
    for layer in layer_ticks(layers, width):
        _text(root, x.at(layer), height - BOTTOM + 16, str(layer), "middle")
    _text(root, (LEFT + width - RIGHT) / 2, height - 4, "layer", "middle")
    for at_place, line in enumerate(series):
        _line(root, line, at_place, x, y)
    _label_worst(root, series[0], x, y)
    _hover(root, series, layers, x, height)
    return ElementTree.tostring(root, encoding="unicode")


def bar_chart(bars: Sequence[Bar], width: int, key: str, title: str) -> str:
    """Bytes by group as stacked bars on one scale, so that a shorter bar is a smaller model."""
    most = max(sum(value for _, value, _ in bar.segments) for bar in bars)
    row, tall, left = 50, 28, 4.0
    words = "; ".join(
        f"{bar.name}: {', '.join(f'{name} {size(value)}' for name, value, _ in bar.segments if value)}" for bar in bars
    )
    root = _svg(width, row * len(bars), key, title, words)
    for at_place, bar in enumerate(bars):
        top, start = at_place * row + 16, left
        total = sum(value for _, value, _ in bar.segments)
        _text(root, left, top - 5, f"{bar.name}: {size(total)}", "start")
        for name, value, colour in bar.segments:
            length = value / most * (width - 2 * left) if most else 0.0
            if length <= 0:
                continue
            box = SubElement(
                root,
                "rect",
                {"x": _px(start), "y": _px(top), "width": _px(max(length - 1, 0.5)), "height": _px(tall), "rx": "2"},
            )
            box.set("class", f"fill c{colour}")
            SubElement(box, "title").text = f"{name}: {size(value)}"
            if length > CHARACTER * len(size(value)) + 12:
                _text(root, start + length / 2, top + tall / 2 + 4, size(value), "middle", "inside")
            start += length
    return ElementTree.tostring(root, encoding="unicode")


def value_axis(values: Sequence[float], height: int) -> Axis:
    """A logarithmic axis where all values are positive and far apart, else one that begins at 0."""
    bottom, top = height - BOTTOM, TOP
    if not values:
        return Axis(0.0, 1.0, bottom, top)
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM:
        return Axis(low / 1.15, high * 1.25, bottom, top, is_log=True)
    low = min(low, 0.0)
    return Axis(low, low + ((high - low) * 1.12 or 1.0), bottom, top)


def value_ticks(axis: Axis) -> list[float]:
    """Round values along an axis: 1, 2 and 5 in every decade, or four to six even steps."""
    if axis.is_log:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 5 else (1,)
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        inside = [tick for tick in ticks if axis.low <= tick <= axis.high]
        return inside[:: math.ceil(len(inside) / 8)] if inside else inside
    rough = (axis.high - axis.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(axis.low / step)
    return [count * step for count in range(first, math.floor(axis.high / step + 1e-9) + 1)]


def layer_ticks(layers: Sequence[int], width: int) -> list[int]:
    """Layers to be named under the axis: as many round ones as there is room for."""
    most = max(int((width - LEFT - RIGHT) / 44), 2)
    span = layers[-1] - layers[0]
    step = next((step for step in (1, 2, 5, 10, 20, 25, 50, 100) if span / step < most), max(span // most, 1))
    return list(range(-(-layers[0] // step) * step, layers[-1] + 1, step)) or [layers[0]]


def _svg(width: int, height: int, key: str, title: str, description: str) -> Element:
    root = Element(
        "svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "width": str(width), "height": str(height)}
    )
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    SubElement(root, "title", id=f"{key}-title").text = title
    SubElement(root, "desc", id=f"{key}-desc").text = description
    return root


def _description(series: Sequence[Series], is_log: bool) -> str:
    parts = []
    for line in series:
        finite = [(value, layer) for layer, value in line.points if math.isfinite(value)]
        if finite:
            low, high = min(finite), max(finite)
            parts.append(f"{line.name}: from {number(low[0])} (layer {low[1]}) to {number(high[0])} (layer {high[1]})")
        broken = [str(layer) for layer, value in line.points if not math.isfinite(value)]
        if broken:
            parts.append(f"{line.name}: not a number or infinite in layers {', '.join(broken)}")
    return "; ".join([*parts, "logarithmic axis" if is_log else "the axis begins at 0"])


def _line(root: Element, line: Series, colour: int, x: Axis, y: Axis) -> None:
    group = SubElement(root, "g", {"class": f"line l{colour}"})
    run: list[str] = []
    last: int | None = None
    for layer, value in [*line.points, (-1, math.nan)]:
        is_next = last is None or layer == last + 1
        if run and (not math.isfinite(value) or not is_next):
            if len(run) > 1:
                SubElement(group, "polyline", points=" ".join(run))
            run = []
        last = layer
        if math.isfinite(value):
            run.append(f"{_px(x.at(layer))},{_px(y.at(value))}")
        elif layer >= 0:
            left, top = x.at(layer), TOP - 4  # above every value
            path = f"M{_px(left - 4)} {_px(top - 4)}l8 8m0 -8l-8 8"
            SubElement(group, "path", {"d": path, "class": "cross"})
    radius = "3" if len(line.points) <= 70 else "2"
    for layer, value in line.points:
        if math.isfinite(value):
            SubElement(group, "circle", cx=_px(x.at(layer)), cy=_px(y.at(value)), r=radius)


def _label_worst(root: Element, line: Series, x: Axis, y: Axis) -> None:
    """Name the layer with the largest error, and the first one that has no error that could be drawn."""
    finite = [(value, layer) for layer, value in line.points if math.isfinite(value)]
    if len(finite) > 2:
        value, layer = max(finite)
        left = x.at(layer)
        anchor = "start" if left < x.start + 32 else "end" if left > x.end - 32 else "middle"
        _text(root, left, y.at(value) - 8, f"layer {layer}", anchor, "worst")
    broken = [layer for layer, value in line.points if not math.isfinite(value)]
    if broken:
        left = x.at(broken[0])
        is_right = left > x.end - 70
        words = f"layer {broken[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
        _text(root, left + (-9 if is_right else 9), TOP, words, "end" if is_right else "start", "worst")


def _hover(root: Element, series: Sequence[Series], layers: Sequence[int], x: Axis, height: int) -> None:
    wide = (x.end - x.start) / max(len(layers) - 1, 1)
    values = [dict(line.points) for line in series]
    for layer in layers:
        box = SubElement(
            root,
            "rect",
            {
                "x": _px(x.at(layer) - wide / 2),
                "y": _px(TOP - 8),
                "width": _px(wide),
                "height": _px(height - BOTTOM - TOP + 8),
            },
        )
        box.set("class", "hover")
        known = [f"{line.name} {number(own[layer])}" for line, own in zip(series, values, strict=True) if layer in own]
        SubElement(box, "title").text = f"layer {layer}: {', '.join(known)}"


def _grid(root: Element, top: float, width: int, label: str) -> None:
    line = {"x1": _px(LEFT), "x2": _px(width - RIGHT + 6), "y1": _px(top), "y2": _px(top), "class": "grid"}
    SubElement(root, "line", line)
    _text(root, LEFT - 8, top + 4, label, "end")


def _text(root: Element, left: float, top: float, text: str, anchor: str, kind: str = "") -> None:
    found = SubElement(root, "text", {"x": _px(left), "y": _px(top), "text-anchor": anchor})
    if kind:
        found.set("class", kind)
    found.text = text


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
