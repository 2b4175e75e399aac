"""Accuracy against latency and against size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.report import figures, text
from compress.report.charts.canvas import bytes_words, draw
from compress.report.charts.plane import HEIGHT, Charts, add_plane, between, near, pixels, with_margin, write_names
from compress.report.labels import Box
from compress.report.svg import MARK
from compress.results import Results

_ROOM = 52.0
"""Points left of the smallest figure, so that the name of the result can stand above its mark."""
LABEL_LENGTH = 24
_SAME = 6.0
"""Points below which two marks are one to the eye, and share a name: beside one of them it would name the other."""
_NEAR_POINTS, _NEAR_LOSSES = 5.0, 3.0
"""How far below reference and result a row may lie to be drawn to scale: points, and times what was lost."""


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
    """Range of the accuracy axis: the reference, the result, and the rows between them that come near, with intervals.

    An untrained source, or a pruned network before its recovery, would otherwise squeeze the rows that matter into one line.
    """
    ends = results.reference_row(), results.rows[-1]
    accuracies = [row.accuracy.validation.percent for row in ends]
    floor = min(accuracies) - max(_NEAR_POINTS, _NEAR_LOSSES * (max(accuracies) - min(accuracies)))
    rows = results.rows[figures.reference_index(results) :]
    shown = [row.accuracy for row in rows if row in ends or row.accuracy.validation.percent >= floor]
    low = min(min(both.validation.low, both.test.percent) for both in shown)
    high = max(max(both.validation.high, both.test.percent) for both in shown)
    return with_margin(low, high)


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
        is_off_scale=validation.high < limits[0],
    )


def _panel(
    name: str, x_title: str, x_text: Callable[[float], str], points: Sequence[Point], limits: tuple[float, float]
) -> str:
    def paint(figure: Figure) -> None:
        costs = min(point.x_low for point in points), max(point.x_high for point in points)
        axes = add_plane(figure, x_title, "Accuracy on validation and test", x_text, costs, limits, _ROOM)
        _marks(axes, points)
        _labels(axes, points)

    told = "; ".join(f"{point.label}: {text.percent(point.y)} at {x_text(point.x)}" for point in points)
    return draw(name, HEIGHT, paint, f"Validation accuracy against {x_title.lower()}", told)


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
    at = functools.partial(pixels, axes)
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
        same = next(iter(near(anchors, anchor, _SAME)), None)
        if same is not None and len(names[same]) + len(name) <= LABEL_LENGTH:
            names[same] = f"{name}, {names[same]}"
            anchors[same] = between(anchors[same], anchor)
        else:
            names.append(name)
            anchors.append(anchor)
    write_names(axes, names, anchors, taken)
