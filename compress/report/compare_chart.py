"""All rows of several runs, accuracy against size and against latency, with the Pareto front as a step line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compress.compared import Compared, ModelFigures
from compress.report import text
from compress.report.charts.canvas import FONT_SIZE, add_axes, bytes_words, calm, draw, even_ticks, tick
from compress.report.labels import Box, place, width_of
from compress.report.svg import INK, QUIET

STYLES: Final = 6
"""Colours of runs in the page's stylesheet, `--run-1` to `--run-6`; a run more than that starts over."""
SIGNS: Final = "●■▲◆▼★"
"""The marks of the runs as text, in the order of the colours."""

_MARKERS = ("o", "s", "^", "D", "v", "*")
_SIZES = (6.5, 6.0, 7.0, 6.0, 7.0, 9.0)
_HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 290.0, 54.0, 40.0, 16.0, 30.0  # points
_LOG_FROM = 4.0
"""Span (largest over smallest) from which an axis is logarithmic."""
_LABEL_LENGTH = 30
_SAME_PLACE = 6.0
"""Points; marks of one run that are nearer share a name."""


@dataclass(frozen=True)
class _Point:
    """One row in one panel."""

    model: ModelFigures
    style: int
    cost: float
    is_on_front: bool
    is_named: bool

    @property
    def label(self) -> str:
        return text.plain(f"{self.model.run}/{self.model.stage}")

    @property
    def accuracy(self) -> float:
        return self.model.accuracy.validation.percent


@dataclass(frozen=True)
class Charts:
    """The drawings, as elements of a page, and what stands below them."""

    drawings: tuple[str, ...]
    caption: str


def style_of(run: int) -> int:
    """Number of a run's colour and mark, from 0."""
    return run % STYLES


def draw_fronts(compared: Compared) -> Charts:
    """The panel of size and, where latency can be compared, the panel of latency."""
    names = [run.name for run in compared.runs]
    last = {(run.name, run.stage) for run in compared.runs}

    def points(
        cost: Callable[[ModelFigures], float | None], is_on_front: Callable[[ModelFigures], bool]
    ) -> list[_Point]:
        return [
            _Point(
                model,
                style_of(names.index(model.run)),
                value,
                is_on_front(model),
                is_on_front(model) or model.is_baseline or (model.run, model.stage) in last,
            )
            for model in compared.models
            if (value := cost(model)) is not None
        ]

    sizes = points(lambda model: float(model.size_bytes), lambda model: model.is_on_size_front)
    times = points(
        lambda model: None if model.time is None else model.time.median_ms, lambda model: model.is_on_latency_front
    )
    panels = [_panel("front-size", "Size of the ONNX file", bytes_words, sizes)]
    if times and compared.setting is not None:
        setting = compared.setting
        load = f"batch {setting.batch_size}, {text.plural(setting.threads, 'thread')}"
        panels.append(_panel("front-latency", f"Latency, {load}", text.milliseconds, times))
    caption = (
        "Up and to the left is better. The line is the Pareto front over all rows of all runs: filled marks lie on it; for "
        "each hollow one there is another that costs no more and is as accurate or more so. Vertical bars are 95 % intervals "
        "of the rows that are named: those on a front, and the last of each run."
    )
    hidden = sum(point.accuracy < _limits(sizes)[0] for point in sizes)
    if hidden:
        caption += (
            f" {text.plural(hidden, 'row')} of lower accuracy, such as untrained sources, would lie below the axis."
        )
    return Charts(tuple(panels), caption)


def _limits(points: Sequence[_Point]) -> tuple[float, float]:
    """Range of the accuracy axis: every row that matters, with its interval."""
    shown = [point.model.accuracy.validation for point in points if point.is_named]
    low, high = min(one.low for one in shown), max(one.high for one in shown)
    margin = max(0.5, 0.08 * (high - low))
    return low - margin, high + margin


def _panel(name: str, x_title: str, x_text: Callable[[float], str], points: Sequence[_Point]) -> str:
    limits = _limits(points)
    shown = [point for point in points if point.accuracy >= limits[0]]

    def paint(figure: Figure) -> None:
        axes = add_axes(figure, _LEFT, _BOTTOM, _RIGHT, _TOP)
        _frame(axes, x_title, x_text, shown, limits)
        front = _front(axes, shown)
        for point in shown:
            _mark(axes, point)
        _labels(axes, shown, front)

    told = "; ".join(
        f"{point.label}: {text.percent(point.accuracy)} at {x_text(point.cost)}{', on the front' if point.is_on_front else ''}"
        for point in points
    )
    title = f"Validation accuracy against {x_title[0].lower()}{x_title[1:]}, all rows of all runs"
    svg = draw(name, _HEIGHT, paint, title, told)
    for style in range(STYLES):
        svg = svg.replace(_placeholder(style), f"var(--run-{style + 1})")
    return svg


def _placeholder(style: int) -> str:
    """Stands for a run's colour while matplotlib draws, which knows no custom properties."""
    return f"#0202{style + 1:02d}"


def _frame(
    axes: Axes,
    x_title: str,
    x_text: Callable[[float], str],
    points: Sequence[_Point],
    limits: tuple[float, float],
) -> None:
    low, high = min(point.cost for point in points), max(point.cost for point in points)
    if low > 0 and high / low > _LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.35, high * 1.35)
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
    calm(axes, "Accuracy on validation", _LEFT)


def _front(axes: Axes, points: Sequence[_Point]) -> list[tuple[float, float]]:
    """The most accurate that a cost buys, from the cheapest to the right edge; its corners."""
    front = sorted({(point.cost, point.accuracy) for point in points if point.is_on_front})
    if not front:
        return []
    corners = [*front, (axes.get_xlim()[1], front[-1][1])]
    axes.step(
        [x for x, _ in corners],
        [y for _, y in corners],
        where="post",
        color=INK,
        linewidth=1.1,
        linestyle="--",
    )
    return corners


def _mark(axes: Axes, point: _Point) -> None:
    colour, validation = _placeholder(point.style), point.model.accuracy.validation
    if point.is_named:
        bars: dict[str, Any] = {"color": colour, "elinewidth": 0.8, "linestyle": "none", "alpha": 0.6}
        spread = [[point.accuracy - validation.low], [validation.high - point.accuracy]]
        axes.errorbar(point.cost, point.accuracy, yerr=spread, capsize=2.0, capthick=0.8, **bars)
    axes.plot(
        point.cost,
        point.accuracy,
        marker=_MARKERS[point.style],
        markersize=_SIZES[point.style],
        fillstyle="full" if point.is_on_front else "none",
        color=colour,
        linestyle="none",
        clip_on=False,
    )


def _labels(axes: Axes, points: Sequence[_Point], corners: Sequence[tuple[float, float]]) -> None:
    """Name the rows that matter, where the names cover nothing; colour and mark tell the run."""

    def at(x: float, y: float) -> tuple[float, float]:
        left, up = axes.transData.transform((x, y))
        return float(left), float(up)

    taken: list[Box] = []
    for point in points:
        x, y = at(point.cost, point.accuracy)
        validation = point.model.accuracy.validation
        taken.append(Box(x - 5, y - 5, x + 5, y + 5))
        if point.is_named:
            taken.append(Box(x - 1.5, at(point.cost, validation.low)[1], x + 1.5, at(point.cost, validation.high)[1]))
    for (x_low, y_low), (x_high, y_high) in itertools.pairwise(corners):
        (left, level), (right, upper) = at(x_low, y_low), at(x_high, y_high)
        taken += [Box(left, level - 1, right, level + 1), Box(right - 1, level, right + 1, upper)]
    anchors: list[tuple[float, float]] = []
    runs: list[str] = []
    names: list[str] = []
    for point in reversed(points):  # the result is named first, so it gets the best place
        if not point.is_named:
            continue
        anchor, name = at(point.cost, point.accuracy), text.plain(point.model.stage)
        name += " (baseline)" if point.model.is_baseline else ""
        for index, other in enumerate(anchors):
            if runs[index] == point.model.run and math.dist(anchor, other) < _SAME_PLACE:
                names[index] = f"{name}, {names[index]}"
                break
        else:
            anchors.append(anchor)
            runs.append(point.model.run)
            names.append(name)
    names = [text.short(name, _LABEL_LENGTH) for name in names]
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
