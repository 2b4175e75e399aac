"""Where bytes and milliseconds went: each stage's change as a step from the reference to the last row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.report import figures, text
from compress.report.charts.canvas import FONT_SIZE, add_axes, bytes_words, draw, even_ticks
from compress.report.svg import INK, MARK, QUIET, RULE, SOFT, WARM
from compress.results import Results

LABEL_LENGTH = 14
_LEFT, _RIGHT, _TOP, _BOTTOM, _STEP = 96.0, 72.0, 12.0, 38.0, 26.0  # points


@dataclass(frozen=True)
class Step:
    """A bar: what a stage changed, or, where it starts at nothing, what a model measures."""

    label: str
    start: float
    end: float
    is_total: bool = False


def steps(measured: Sequence[tuple[str, float]], last: str) -> list[Step]:
    """Bars of a waterfall: the first figure whole, the change to each further one, and the last whole under its name."""
    (first, total), *further = measured
    bars = [Step(first, 0.0, total, is_total=True)]
    for label, value in further:
        bars.append(Step(label, total, value))
        total = value
    return [*bars, Step(last, 0.0, total, is_total=True)]


def draw_waterfalls(results: Results) -> tuple[str, ...]:
    """The panel of bytes and, where latency was measured, that of milliseconds; none where no row follows the reference."""
    at = figures.reference_index(results)
    labels, rows = figures.labels(results)[at:], results.rows[at:]
    if len(rows) < 2:
        return ()
    sizes = [(label, float(row.size_bytes)) for label, row in zip(labels, rows, strict=True)]
    panels = [_panel("bytes-steps", "Size of the ONNX file", sizes, bytes_words)]
    setting = figures.main_setting(results)
    if setting is not None:
        times = [
            (label, measured[0].median_ms)
            for label, row in zip(labels, rows, strict=True)
            if (measured := figures.latencies(row, setting))
        ]
        decimals = text.decimals_of(min(value for _, value in times))  # the same for all, so that they can be added

        def words(value: float) -> str:
            return f"{value:.{decimals}f} ms"

        panels.append(_panel("time-steps", f"Latency, {setting.load}", times, words))
    return tuple(panels)


def _panel(name: str, title: str, measured: Sequence[tuple[str, float]], words: Callable[[float], str]) -> str:
    bars = steps(measured, "result")

    def paint(figure: Figure) -> None:
        axes = add_axes(figure, _LEFT, _BOTTOM, _RIGHT, _TOP)
        _bars(axes, bars, words)
        axes.set_xlim(0, max(max(bar.start, bar.end) for bar in bars) or 1.0)
        even_ticks(axes, words, most=4)
        axes.set_xlabel(title, color=QUIET)

    told = "; ".join(f"{bar.label}: {_figure(bar, words)}" for bar in bars)
    return draw(name, _TOP + _BOTTOM + _STEP * len(bars), paint, f"{title}, stage by stage", told)


def _bars(axes: Axes, bars: Sequence[Step], words: Callable[[float], str]) -> None:
    for place, bar in enumerate(bars):
        low, high = min(bar.start, bar.end), max(bar.start, bar.end)
        colour = SOFT if bar.is_total else WARM if bar.end > bar.start else MARK
        axes.barh(place, high - low, left=low, height=0.6, color=colour, linewidth=1.0, edgecolor=colour)
        if place + 1 < len(bars):  # to the bar that goes on from here
            axes.plot([bar.end, bar.end], [place, place + 1], color=QUIET, linewidth=0.7, zorder=0.9)
        axes.annotate(
            _figure(bar, words),
            xy=(high, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            annotation_clip=False,
        )
        axes.annotate(
            text.short(bar.label, LABEL_LENGTH),
            xy=(0, place),
            xycoords=("axes fraction", "data"),
            xytext=(8 - _LEFT, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            parse_math=False,
            annotation_clip=False,
        )
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=QUIET, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(QUIET)


def _figure(bar: Step, words: Callable[[float], str]) -> str:
    return words(bar.end) if bar.is_total else text.signed_scaled(words, bar.end - bar.start)
