"""Accuracy against a cost: the frame of such a panel and the names of its marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compress.report.charts.canvas import FONT_SIZE, WIDTH, add_axes, calm, even_ticks, tick
from compress.report.labels import Box, place, width_of
from compress.report.svg import INK, QUIET

HEIGHT = 290.0  # points, as are all lengths here
LEFT, RIGHT, BOTTOM, TOP = 54.0, 16.0, 40.0, 30.0
LOG_FROM = 4.0
"""Span (largest over smallest) from which the axis of cost is logarithmic."""


@dataclass(frozen=True)
class Charts:
    """Drawings, as elements of a page, and what stands below them."""

    drawings: tuple[str, ...]
    caption: str


def with_margin(low: float, high: float) -> tuple[float, float]:
    """Range of the axis of accuracy, percent, where the marks and their intervals reach from `low` to `high`."""
    margin = max(0.5, 0.08 * (high - low))
    return low - margin, high + margin


def add_plane(
    figure: Figure,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    costs: tuple[float, float],
    limits: tuple[float, float],
    room: float,
) -> Axes:
    """Axes of cost and accuracy that fill the figure.

    Args:
        figure: `WIDTH` x `HEIGHT` points.
        x_title: Below.
        y_title: Above.
        x_text: Writes a cost.
        costs: The smallest and the largest.
        limits: Range of accuracy, percent.
        room: Points left of the smallest cost on a logarithmic axis, for names.
    """
    axes = add_axes(figure, LEFT, BOTTOM, RIGHT, TOP)
    low, high = costs
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale("log")
        right = high * 1.35
        axes.set_xlim(low / (right / low) ** (room / (WIDTH - LEFT - RIGHT - room)), right)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(x_text(value))))
    else:
        axes.set_xlim(0, (high * 1.15) or 1.0)
        even_ticks(axes, x_text)
    axes.set_ylim(*limits)
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*limits)
    axes.yaxis.set_major_locator(FixedLocator([value for value in ticks if 0 <= value <= 100]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(x_title, color=QUIET)
    calm(axes, y_title, LEFT)
    return axes


def pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a cost and an accuracy lie in the figure; a pixel is a point."""
    left, up = axes.transData.transform((x, y))
    return float(left), float(up)


def near(anchors: Sequence[tuple[float, float]], anchor: tuple[float, float], distance: float) -> list[int]:
    """Which anchors lie nearer to one than a distance."""
    return [index for index, other in enumerate(anchors) if math.dist(anchor, other) < distance]


def between(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Where the name that two marks share belongs."""
    return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2


def write_names(axes: Axes, names: Sequence[str], anchors: Sequence[tuple[float, float]], taken: Sequence[Box]) -> None:
    """Write names where they cover nothing, with a thin line to their mark where that is not beside it.

    Args:
        axes: Of `add_plane`.
        names: In the order in which they choose their place.
        anchors: Centre of the mark of each, pixels.
        taken: What no name should cover, pixels.
    """
    frame = axes.get_window_extent()
    inside = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    sizes = [(width_of(name, FONT_SIZE), 1.15 * FONT_SIZE) for name in names]
    for name, anchor, offset in zip(names, anchors, place(anchors, sizes, taken, inside), strict=True):
        line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            name,
            xy=anchor,
            xycoords="figure pixels",
            xytext=(offset.dx, offset.dy),
            textcoords="offset points",
            ha=offset.horizontal,
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            parse_math=False,
            annotation_clip=False,
            arrowprops=line if offset.is_far else None,
        )
