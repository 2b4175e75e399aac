"""Accuracy against latency and against size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compress.report import figures, text
from compress.report.charts.canvas import FONT_SIZE, WIDTH, add_axes, bytes_words, calm, draw, even_ticks, tick
from compress.report.labels import Box, place, width_of
from compress.report.svg import INK, MARK, QUIET
from compress.results import Results

HEIGHT = 290.0  # points
LEFT, RIGHT = 54.0, 16.0
_ROOM = 52.0
"""Points left of the smallest figure, so that the name of the result can stand above its mark."""
LOG_FROM = 4.0
"""Span (largest over smallest) from which an axis is logarithmic."""
LABEL_LENGTH = 24
_SAME = 4.0
"""Points below which two marks are one to the eye, and share a name."""


@dataclass(frozen=True)
class Charts:
    """The drawings, and what stands below them."""

    drawings: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Point:
    """One row in one panel."""

    label: str
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float
    test: float
    is_reference: bool
    is_off_scale: bool


def draw_costs(results: Results) -> Charts:
    """The panel of latency, where it was measured, and the panel of size."""
    limits = _accuracy_limits(results)
    setting = figures.main_setting(results)
    panels: list[str] = []
    if setting is not None:
        measured = [(index, figures.latencies(row, setting)) for index, row in enumerate(results.rows)]
        points = [
            _point(results, index, (here[0].median_ms, here[0].low_ms, here[0].high_ms), limits)
            for index, here in measured
            if here
        ]
        panels.append(_panel("latency", f"Latency, {setting.load}", text.milliseconds, points, limits))
    sizes = [_point(results, index, (float(row.size_bytes),) * 3, limits) for index, row in enumerate(results.rows)]
    panels.append(_panel("size", "Size of the ONNX file", bytes_words, sizes, limits))
    caption = (
        "Up and to the left is better. Filled: validation accuracy with its 95 % interval; hollow: test accuracy. "
        "The diamond is the reference."
    )
    if setting is not None:
        caption += " Horizontal bars are the 95 % interval of the median latency."
    if any(point.is_off_scale for point in sizes):
        caption += " A triangle at the lower edge stands for accuracy below the axis."
    return Charts(tuple(panels), caption)


def _accuracy_limits(results: Results) -> tuple[float, float]:
    """Range of the accuracy axis: every row from the reference on, with its interval.

    An untrained source at 10 % would otherwise squeeze the rows that matter into one line.
    """
    shown = [row.accuracy for row in results.rows[figures.reference_index(results) :]]
    low = min(min(both.validation.low, both.test.percent) for both in shown)
    high = max(max(both.validation.high, both.test.percent) for both in shown)
    margin = max(0.5, 0.08 * (high - low))
    return low - margin, high + margin


def _point(results: Results, index: int, x: tuple[float, float, float], limits: tuple[float, float]) -> Point:
    accuracy, at = results.rows[index].accuracy, figures.reference_index(results)
    validation = accuracy.validation
    return Point(
        figures.labels(results)[index],
        *x,
        validation.percent,
        validation.low,
        validation.high,
        accuracy.test.percent,
        is_reference=index == at,
        is_off_scale=index < at and validation.high < limits[0],
    )


def _panel(
    name: str, x_title: str, x_text: Callable[[float], str], points: Sequence[Point], limits: tuple[float, float]
) -> str:
    def paint(figure: Figure) -> None:
        axes = add_axes(figure, LEFT, 40, RIGHT, 30)
        _frame(axes, x_title, x_text, points, limits)
        _marks(axes, points)
        _labels(axes, points)

    told = "; ".join(f"{point.label}: {text.percent(point.y)} at {x_text(point.x)}" for point in points)
    return draw(name, HEIGHT, paint, f"Validation accuracy against {x_title.lower()}", told)


def _frame(
    axes: Axes,
    x_title: str,
    x_text: Callable[[float], str],
    points: Sequence[Point],
    limits: tuple[float, float],
) -> None:
    low, high = min(point.x_low for point in points), max(point.x_high for point in points)
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale("log")
        right = high * 1.35
        axes.set_xlim(low / (right / low) ** (_ROOM / (WIDTH - LEFT - RIGHT - _ROOM)), right)
        subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(x_text(value))))
    else:
        axes.set_xlim(0, (high * 1.15) or 1.0)
        even_ticks(axes, x_text)
    axes.set_ylim(*limits)
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*limits)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= 100]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(x_title, color=QUIET)
    calm(axes, "Accuracy on validation and test", LEFT)


def _marks(axes: Axes, points: Sequence[Point]) -> None:
    for point in points:
        if point.is_off_scale:
            axes.plot(point.x, _edge(axes), marker="v", markersize=6, color=MARK, linestyle="none")
            continue
        x_error = [[point.x - point.x_low], [point.x_high - point.x]]
        y_error = [[point.y - point.y_low], [point.y_high - point.y]]
        bars: dict[str, Any] = {"color": MARK, "elinewidth": 1.0, "linestyle": "none"}
        axes.errorbar(point.x, point.y, yerr=y_error, capsize=2.5, capthick=1.0, **bars)
        if point.x_low < point.x_high:
            axes.errorbar(point.x, point.y, xerr=x_error, **bars)
        axes.plot(
            point.x, point.test, marker="o", markersize=5, fillstyle="none", color=MARK, linestyle="none", clip_on=False
        )
        marker, size = ("D", 7.0) if point.is_reference else ("o", 6.5)
        axes.plot(point.x, point.y, marker=marker, markersize=size, color=MARK, linestyle="none", clip_on=False)


def _edge(axes: Axes) -> float:
    """Accuracy at which an off-scale mark is drawn: just inside the lower edge."""
    low, high = axes.get_ylim()
    return float(low + 0.035 * (high - low))


def _labels(axes: Axes, points: Sequence[Point]) -> None:
    """Name every mark where its name covers nothing, with a thin line to it where that is not beside it."""

    def at(x: float, y: float) -> tuple[float, float]:
        left, up = axes.transData.transform((x, y))
        return float(left), float(up)

    names: list[str] = []
    anchors: list[tuple[float, float]] = []
    taken: list[Box] = []
    for point in reversed(points):  # the result is named first, so it gets the best place
        name = text.short(point.label, LABEL_LENGTH)
        if point.is_off_scale:
            name += f", {text.percent(point.y)}"
        x, y = anchor = at(point.x, _edge(axes) if point.is_off_scale else point.y)
        taken.append(Box(x - 5, y - 5, x + 5, y + 5))
        if not point.is_off_scale:
            taken.append(Box(x - 1.5, at(point.x, point.y_low)[1], x + 1.5, at(point.x, point.y_high)[1]))
            taken.append(Box(at(point.x_low, point.y)[0], y - 1, at(point.x_high, point.y)[0], y + 1))
            test = at(point.x, point.test)[1]
            taken.append(Box(x - 4, test - 4, x + 4, test + 4))
        same = next((index for index, other in enumerate(anchors) if math.dist(anchor, other) < _SAME), None)
        if same is not None and len(names[same]) + len(name) <= LABEL_LENGTH:
            names[same] = f"{name}, {names[same]}"
        else:
            names.append(name)
            anchors.append(anchor)
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
