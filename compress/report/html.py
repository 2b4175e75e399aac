"""The report as one self-contained page: no script, no external request."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report.chart import draw_charts
from compress.report.summary import Summary
from compress.results import Results


def render_html(summary: Summary, results: Results) -> str:
    """The whole page. Everything but our own stylesheet and drawings is escaped."""
    environment = Environment(
        loader=PackageLoader("compress", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = resources.files("compress.report").joinpath("report.css").read_text(encoding="utf-8")
    charts = draw_charts(results)
    return environment.get_template("report.html.j2").render(
        summary=summary,
        style=Markup(style),  # noqa: S704 (our own file)
        charts=[Markup(svg) for svg in charts.drawings],  # noqa: S704 (serialized, so escaped, by ElementTree)
        caption=charts.caption,
    )
