"""The report as one HTML page that needs nothing but itself: no request, no script."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from .charts import bar_chart, line_chart
from .parts import Page

if TYPE_CHECKING:
    from markupsafe import Markup

# Each chart is drawn for two widths, since text in a scaled drawing would be too small on a telephone.
WIDTHS = {"wide": 940, "narrow": 340}
MOST_OPEN = 700  # characters of an answer that are shown at once


def render_html(page: Page) -> str:
    """Render a page as HTML. Everything except our own markup is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(_resource("page.html.j2"))
    return template.render(page=page, style=_markup(_resource("style.css")), charts=_charts(page), most_open=MOST_OPEN)


def _charts(page: Page) -> dict[str, dict[str, Markup]]:
    charts: dict[str, dict[str, Markup]] = {}
    for kind, width in WIDTHS.items():
        drawn = charts.setdefault(kind, {})
        height = 280 if kind == "wide" else 240
        if page.layers and page.layers.own:
            title = "Relative output error of each layer by itself"
            drawn["own"] = _markup(line_chart(page.layers.own, width, height, f"own-{kind}", title))
        if page.layers and page.layers.accumulated:
            title = "Relative error accumulated up to each layer"
            drawn["accumulated"] = _markup(line_chart(page.layers.accumulated, width, height, f"sum-{kind}", title))
        if page.sizes:
            title = "Bytes by group, before and after"
            drawn["sizes"] = _markup(bar_chart(page.sizes.bars, width, f"sizes-{kind}", title))
    return charts


def _markup(text: str) -> Markup:
    """Our own markup, which must not be escaped again. Never called with anything from a checkpoint."""
    from markupsafe import Markup

    return Markup(text)


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
