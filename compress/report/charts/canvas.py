"""What all drawings share: matplotlib's settings, the size of a panel, ticks and frames."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compress.report import text
from compress.report.svg import QUIET, RULE, inline_svg

FONT_SIZE = 10.0
WIDTH = 340.0
"""Of every panel, points: about a phone's width, so that its text is readable there."""


def draw(name: str, height: float, paint: Callable[[Figure], None], title: str, description: str) -> str:
    """A panel as an element of a page.

    Args:
        name: Distinct in the page.
        height: Points.
        paint: Draws on the empty figure, `WIDTH` × `height` points.
        title: What the drawing shows.
        description: Its content in words, for readers that do not see it.
    """
    # From the defaults, so that a user's own matplotlib settings change nothing.
    style: dict[Any, Any] = {key: mpl.rcParamsDefault[key] for key in mpl.rcParamsDefault if "backend" not in key}
    style |= {"svg.hashsalt": f"compress-{name}", "svg.fonttype": "none", "font.size": FONT_SIZE}
    buffer = io.StringIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        # Text stays text and the reader's fonts draw it, so what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return inline_svg(buffer.getvalue(), name, title, description)


def add_axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes that leave these margins, points."""
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height),
    )


def calm(axes: Axes, title: str, left: float) -> None:
    """Grid, quiet ticks, one line below, and a title that starts at the panel's edge, `left` points before the axes."""
    axes.set_title("")
    axes.annotate(
        title,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(8 - left, 9),
        textcoords="offset points",
        ha="left",
        va="bottom",
        color=QUIET,
        parse_math=False,
    )
    axes.grid(visible=True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=QUIET, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(QUIET)


def even_ticks(axes: Axes, words: Callable[[float], str], most: int = 5) -> None:
    """At most `most` intervals between round values along x, written by `words`."""
    axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(words(value))))


def tick(words: str) -> str:
    """A tick's figure without idle zeros: '0.200 ms' is '0.2 ms'."""
    figure, _, unit = words.partition(" ")
    if "." in figure:
        figure = figure.rstrip("0").rstrip(".")
    return f"{figure} {unit}".strip()


def bytes_words(value: float) -> str:
    """Bytes along an axis."""
    return text.size(round(value))
