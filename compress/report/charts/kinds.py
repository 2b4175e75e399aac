"""Time of int8, float and converting nodes, a bar per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.report import text
from compress.report.charts.canvas import FONT_SIZE, add_axes, draw, even_ticks
from compress.report.svg import INK, MARK, PAPER, QUIET, RULE, SOFT, WARM

COLOURS = {"int8": MARK, "float": SOFT, "convert": WARM}
_LEFT, _RIGHT, _TOP, _BOTTOM, _STEP = 20.0, 20.0, 8.0, 38.0, 60.0  # points


@dataclass(frozen=True)
class Bar:
    """A model and the milliseconds of its nodes by kind, in the order drawn."""

    label: str
    milliseconds: dict[str, float]

    @property
    def total(self) -> float:
        """Of all kinds."""
        return sum(self.milliseconds.values())


def draw_kinds(bars: Sequence[Bar]) -> str:
    """One panel, its bars to one scale."""

    def paint(figure: Figure) -> None:
        axes = add_axes(figure, _LEFT, _BOTTOM, _RIGHT, _TOP)
        axes.set_xlim(0, max(bar.total for bar in bars) or 1.0)
        axes.set_ylim(len(bars) - 0.7, -0.7)
        for place, bar in enumerate(bars):
            _bar(axes, place, bar)
        even_ticks(axes, text.milliseconds, most=4)
        axes.set_yticks([])
        axes.grid(visible=True, axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelcolor=QUIET, pad=5)
        axes.set_xlabel("Sum of the nodes' times, profiled", color=QUIET)
        for spine in axes.spines.values():
            spine.set_visible(False)

    told = "; ".join(f"{bar.label}: {words(bar)}" for bar in bars)
    return draw("kinds", _TOP + _BOTTOM + _STEP * len(bars), paint, "Time of int8, float and converting nodes", told)


def words(bar: Bar) -> str:
    """The parts of a bar as text."""
    parts = (
        f"{kind} {text.profiled(value)} ({text.share(value, bar.total)})" for kind, value in bar.milliseconds.items()
    )
    return ", ".join(parts)


def _shares(bar: Bar) -> str:
    """The parts of a bar as short text: a panel has no room for more."""
    return ", ".join(f"{kind} {text.share(value, bar.total)}" for kind, value in bar.milliseconds.items())


def _bar(axes: Axes, place: int, bar: Bar) -> None:
    left = 0.0
    for kind, value in bar.milliseconds.items():
        axes.barh(place, value, left=left, height=0.34, color=COLOURS[kind], linewidth=1.0, edgecolor=PAPER)
        left += value
    for line, (shown, colour) in enumerate(
        ((f"{text.short(bar.label, 30)}: {text.profiled(bar.total)}", INK), (_shares(bar), QUIET))
    ):
        axes.annotate(
            shown,
            xy=(0, place),
            xytext=(0, 31 - 13 * line),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=FONT_SIZE if line == 0 else FONT_SIZE - 0.5,
            parse_math=False,
            annotation_clip=False,
        )
