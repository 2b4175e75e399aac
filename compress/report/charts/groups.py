"""What each group of channels costs alone: accuracy against the share of its channels that is silenced."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compress.measured import GroupSensitivity, PruningSensitivity
from compress.report import text
from compress.report.charts.canvas import add_axes, calm, draw
from compress.report.svg import MARK, QUIET, SOFT

HEIGHT = 220.0
_LEFT, _RIGHT = 46.0, 20.0  # points
MARKED = 3
"""Groups that stand out: those at the head of the table below."""


def draw_groups(name: str, stage: str, found: PruningSensitivity) -> str:
    """A line for each group, those that lose most in front.

    Args:
        name: Distinct in the page.
        stage: What pruned.
        found: With at least one group.
    """
    ranked = sorted(found.groups, key=lowest)

    def paint(figure: Figure) -> None:
        axes = add_axes(figure, _LEFT, 34, _RIGHT, 28)
        for group in reversed(ranked):
            _line(axes, found.percent, group, is_marked=group in ranked[:MARKED])
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if 0 <= value <= 100 else ""))
        axes.set_xlabel("Channels silenced", color=QUIET)
        calm(axes, "Validation accuracy, one group at a time", _LEFT)

    worst = ", ".join(f"{text.plain(group.name)} {text.percent(lowest(group))}" for group in ranked[:MARKED])
    told = (
        f"{text.plural(len(ranked), 'group')}; {text.percent(found.percent)} with all channels, at the lowest {worst}."
    )
    return draw(name, HEIGHT, paint, f"What each group of channels costs, {stage}", told)


def lowest(group: GroupSensitivity) -> float:
    """The least accuracy that silencing some of its channels gave, percent."""
    return min((step.percent for step in group.steps), default=100.0)


def _line(axes: Axes, whole: float, group: GroupSensitivity, *, is_marked: bool) -> None:
    shares = [0.0, *(100.0 * step.silenced / group.channels for step in group.steps)]
    percents = [whole, *(step.percent for step in group.steps)]
    colour, width = (MARK, 1.6) if is_marked else (SOFT, 0.9)
    axes.plot(
        shares, percents, color=colour, linewidth=width, marker="o", markersize=3 if is_marked else 2, clip_on=False
    )
