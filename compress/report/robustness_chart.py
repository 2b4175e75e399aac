"""Accuracy against severity, a panel per family of corruptions, and against ε, a panel per attack; a line per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from compress.measured import Accuracy
from compress.report import text
from compress.report.charts.canvas import add_axes, calm, draw
from compress.report.charts.plane import Charts, with_margin
from compress.report.compare_chart import STYLES, style_of
from compress.report.svg import QUIET
from compress.robustness_results import RobustnessResults

_HEIGHT = 200.0  # points, as are all lengths here
_LEFT, _RIGHT, _BOTTOM, _TOP = 54.0, 14.0, 38.0, 30.0
_MARKERS: Final = ("o", "s", "^", "D", "v", "*")
_SIZES: Final = (5.0, 4.5, 5.5, 4.5, 5.5, 7.0)
_APART = 0.05
"""Of the distance between two levels: models stand beside each other, so that equal ones are all seen."""


@dataclass(frozen=True)
class _Curve:
    """One model in one panel."""

    name: str
    style: int
    accuracies: tuple[Accuracy, ...]
    """By level."""


@dataclass(frozen=True)
class _Panel:
    """What one panel shows."""

    name: str
    title: str
    curves: tuple[_Curve, ...]


def draw_families(results: RobustnessResults) -> Charts:
    """A panel per family of corruptions; the first level is the clean samples."""
    panels = [
        _Panel(
            f"family-{position}",
            info.family,
            tuple(
                _Curve(
                    text.plain(target.name),
                    style_of(index),
                    (target.clean, *(level.accuracy for level in target.corruptions[position].levels)),
                )
                for index, target in enumerate(results.targets)
            ),
        )
        for position, info in enumerate(results.families)
    ]
    levels = ("clean", *map(str, results.severities))
    return Charts(
        _draw(panels, "Severity", levels),
        f"Accuracy on {results.split}, on one scale; vertical bars are 95 % intervals.",
    )


def draw_attacks(results: RobustnessResults) -> Charts:
    """A panel per attack; the first level is the clean samples."""
    attacks = dict.fromkeys(under.attack for target in results.targets for under in target.attacks)
    panels = [
        _Panel(
            f"attack-{attack}",
            attack,
            tuple(
                _Curve(
                    text.plain(target.name),
                    style_of(index),
                    (target.clean, *(level.accuracy for level in under.levels)),
                )
                for index, target in enumerate(results.targets)
                for under in target.attacks
                if under.attack == attack
            ),
        )
        for attack in attacks
    ]
    levels = ("clean", *(f"{epsilon:g}/255" for epsilon in results.epsilons))
    return Charts(
        _draw(panels, "Largest change of a pixel (ε)", levels),
        f"Accuracy on {results.split} under attack, on one scale; vertical bars are 95 % intervals.",
    )


def _draw(panels: Sequence[_Panel], x_title: str, levels: Sequence[str]) -> tuple[str, ...]:
    """All on one scale: panels stand side by side to be compared."""
    shown = [accuracy for panel in panels for curve in panel.curves for accuracy in curve.accuracies]
    if not shown:
        return ()
    low, high = with_margin(min(one.low for one in shown), max(one.high for one in shown))
    limits = max(-3.0, low), min(103.0, high)
    return tuple(_panel(panel, x_title, levels, limits) for panel in panels)


def _panel(panel: _Panel, x_title: str, levels: Sequence[str], limits: tuple[float, float]) -> str:
    name, title, curves = panel.name, panel.title, panel.curves

    def paint(figure: Figure) -> None:
        axes = add_axes(figure, _LEFT, _BOTTOM, _RIGHT, _TOP)
        for position, curve in enumerate(curves):
            _line(axes, curve, (position - (len(curves) - 1) / 2) * _APART)
        axes.set_xlim(-0.35, len(levels) - 0.65)
        axes.xaxis.set_major_locator(FixedLocator(list(range(len(levels)))))
        axes.xaxis.set_major_formatter(FixedFormatter(list(levels)))
        axes.set_ylim(*limits)
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(*limits)
        axes.yaxis.set_major_locator(FixedLocator([value for value in ticks if 0 <= value <= 100]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel(x_title, color=QUIET)
        calm(axes, title, _LEFT)

    told = "; ".join(
        f"{curve.name}: "
        + ", ".join(f"{level} {text.percent(one.percent)}" for level, one in zip(levels, curve.accuracies, strict=True))
        for curve in curves
    )
    svg = draw(name, _HEIGHT, paint, f"Accuracy under {title} against {x_title[0].lower()}{x_title[1:]}", told)
    for style in range(STYLES):
        svg = svg.replace(_placeholder(style), f"var(--run-{style + 1})")
    return svg


def _placeholder(style: int) -> str:
    """Stands for a model's colour while matplotlib draws, which knows no custom properties."""
    return f"#0202{style + 1:02d}"


def _line(axes: Axes, curve: _Curve, shift: float) -> None:
    colour = _placeholder(curve.style)
    _, _, (bars,) = axes.errorbar(
        [index + shift for index in range(len(curve.accuracies))],
        [one.percent for one in curve.accuracies],
        yerr=[
            [one.percent - one.low for one in curve.accuracies],
            [one.high - one.percent for one in curve.accuracies],
        ],
        color=colour,
        linewidth=1.4,
        elinewidth=0.8,
        marker=_MARKERS[curve.style],
        markersize=_SIZES[curve.style],
    )
    bars.set_alpha(0.6)
