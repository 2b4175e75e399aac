"""Training curves: loss, and below it validation accuracy, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compress.report import text
from compress.report.charts.canvas import FONT_SIZE, WIDTH, add_axes, calm, draw
from compress.report.svg import INK, MARK, QUIET, SOFT
from compress.results import Epoch

HEIGHT = 250.0
_LEFT, _RIGHT = 46.0, 64.0  # points
_APART = 12.0
"""Least distance of two names at the ends of lines, points."""
LOG_FROM = 30.0
"""Span of the losses (largest over smallest) from which their axis is logarithmic."""


def draw_training(name: str, stage: str, epochs: Sequence[Epoch]) -> str:
    """The curves of one stage.

    Args:
        name: Distinct in the page.
        stage: What trained.
        epochs: At least one.
    """

    def paint(figure: Figure) -> None:
        upper = add_axes(figure, _LEFT, 128, _RIGHT, 28)
        lower = add_axes(figure, _LEFT, 34, _RIGHT, 158)
        _loss(upper, epochs)
        _accuracy(lower, epochs)

    last = epochs[-1]
    told = (
        f"After {text.plural(len(epochs), 'epoch')}: training loss {last.loss:.3g}, validation loss "
        f"{last.validation_loss:.3g}, validation accuracy {text.percent(last.validation_percent)}; "
        f"best {text.percent(max(epoch.validation_percent for epoch in epochs))}."
    )
    return draw(name, HEIGHT, paint, f"Training of {stage}", told)


def _loss(axes: Axes, epochs: Sequence[Epoch]) -> None:
    training = [epoch.loss for epoch in epochs]
    validation = [epoch.validation_loss for epoch in epochs]
    # Before the limits: an axis whose lower end is set takes no more notice of what is drawn later.
    _line(axes, epochs, training, SOFT, "--")
    _line(axes, epochs, validation, MARK, "-")
    positive = [value for value in (*training, *validation) if math.isfinite(value) and value > 0]
    every = sum(map(math.isfinite, (*training, *validation)))
    if positive and len(positive) == every and max(positive) / min(positive) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _frame(axes, epochs, "Loss")
    axes.set_xticklabels([])
    _ends(axes, [("training", training[-1], SOFT), ("validation", validation[-1], MARK)])


def _accuracy(axes: Axes, epochs: Sequence[Epoch]) -> None:
    percents = [epoch.validation_percent for epoch in epochs]
    _line(axes, epochs, percents, MARK, "-")
    low, high = min(percents), max(percents)
    margin = max(0.5, 0.08 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if value <= 100 else ""))
    axes.set_xlabel("Epoch", color=QUIET)
    _frame(axes, epochs, "Validation accuracy")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _ends(axes, [(text.percent(percents[-1]), percents[-1], MARK)])


def _line(axes: Axes, epochs: Sequence[Epoch], values: Sequence[float], colour: str, style: str) -> None:
    marker = "o" if len(epochs) < 3 else ""  # a line of one epoch would not be seen
    axes.plot(
        [epoch.epoch for epoch in epochs],
        values,
        color=colour,
        linewidth=1.8,
        linestyle=style,
        marker=marker,
        markersize=4,
        clip_on=False,
    )


def _frame(axes: Axes, epochs: Sequence[Epoch], title: str) -> None:
    first, last = epochs[0].epoch, epochs[-1].epoch
    room = 0.5 if first == last else 0.0
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    calm(axes, title, _LEFT)


def _ends(axes: Axes, names: Sequence[tuple[str, float, str]]) -> None:
    """Names of lines beside their last values, moved apart where they would touch."""
    placed: list[tuple[float, str]] = []
    for name, value, _ in names:
        if math.isfinite(value):
            placed.append((float(axes.transData.transform((axes.get_xlim()[1], value))[1]), name))
    placed.sort()
    if len(placed) == 2 and placed[1][0] - placed[0][0] < _APART:
        middle = (placed[0][0] + placed[1][0]) / 2
        placed = [(middle - _APART / 2, placed[0][1]), (middle + _APART / 2, placed[1][1])]
    for height, name in placed:
        axes.annotate(
            name,
            xy=(WIDTH - _RIGHT + 6, height),
            xycoords="figure pixels",
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            annotation_clip=False,
        )
