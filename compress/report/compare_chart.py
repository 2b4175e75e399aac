"""All rows of several runs, accuracy against size and against latency, with the Pareto front as a step line."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.comparison.records import Compared, ModelFigures
from compress.report import text
from compress.report.charts.canvas import bytes_words, draw
from compress.report.charts.plane import HEIGHT, Charts, add_plane, between, near, pixels, with_margin, write_names
from compress.report.figures import load_words
from compress.report.labels import Box
from compress.report.svg import INK

STYLES: Final = 6
"""Colours of runs in the page's stylesheet, `--run-1` to `--run-6`; a run more than that starts over."""
SIGNS: Final = "●■▲◆▼★"
"""The marks of the runs as text, in the order of the colours."""

_MARKERS = ("o", "s", "^", "D", "v", "*")
_SIZES = (6.5, 6.0, 7.0, 6.0, 7.0, 9.0)
_ROOM = 22.0
"""Points left of the smallest figure."""
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
        load = load_words(setting.batch_size, setting.threads)
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
    return with_margin(low, high)


def _panel(name: str, x_title: str, x_text: Callable[[float], str], points: Sequence[_Point]) -> str:
    limits = _limits(points)
    shown = [point for point in points if point.accuracy >= limits[0]]

    def paint(figure: Figure) -> None:
        costs = min(point.cost for point in shown), max(point.cost for point in shown)
        axes = add_plane(figure, x_title, "Accuracy on validation", x_text, costs, limits, _ROOM)
        front = _front(axes, shown)
        for point in shown:
            _mark(axes, point)
        _labels(axes, shown, front)

    told = "; ".join(
        f"{point.label}: {text.percent(point.accuracy)} at {x_text(point.cost)}{', on the front' if point.is_on_front else ''}"
        for point in points
    )
    title = f"Validation accuracy against {x_title[0].lower()}{x_title[1:]}, all rows of all runs"
    svg = draw(name, HEIGHT, paint, title, told)
    for style in range(STYLES):
        svg = svg.replace(_placeholder(style), f"var(--run-{style + 1})")
    return svg


def _placeholder(style: int) -> str:
    """Stands for a run's colour while matplotlib draws, which knows no custom properties."""
    return f"#0202{style + 1:02d}"


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
    at = functools.partial(pixels, axes)
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
        same = (index for index in near(anchors, anchor, _SAME_PLACE) if runs[index] == point.model.run)
        if (index := next(same, None)) is not None:
            names[index] = f"{name}, {names[index]}"
            anchors[index] = between(anchors[index], anchor)
        else:
            anchors.append(anchor)
            runs.append(point.model.run)
            names.append(name)
    write_names(axes, [text.short(name, _LABEL_LENGTH) for name in names], anchors, taken)
