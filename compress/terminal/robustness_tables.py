"""What `compress robustness` measured, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.report import text
from compress.report.robustness import (
    FIRST,
    attacked_name,
    attacks_of,
    crafted_words,
    difference_words,
    drop_words,
    epsilon_words,
    level_of,
    mean_points_words,
)
from compress.report.terminal import add_line, make_table
from compress.robustness_results import RobustnessResults
from compress.terminal.console import literal


def robustness_tables(results: RobustnessResults) -> RenderableType:
    """All in all, then every family of corruptions and every attack, a column per model; and what is missing."""
    parts: list[RenderableType] = [_overview(results)]
    if results.families:
        parts += ["", _families(results)]
    if any(target.attacks for target in results.targets):
        parts += ["", _attacks(results)]
    if results.missing:
        lines = (text.plain(f"{text.MISSING} no attacks on {each.name}: {each.reason}") for each in results.missing)
        parts += ["", *map(Text, lines)]
    return Group(*parts)


def _overview(results: RobustnessResults) -> Table:
    table = make_table(
        f"Robustness: accuracy, %, on {results.samples:,} samples of {results.split} [95 %]",
        "model",
        "type",
        "clean",
        "points",
        *(("corrupted", "points", "of clean lost") if results.families else ()),
        words=2,
        caption="corrupted: mean over all families and severities; points: against the first model, on the same samples",
    )
    for target in results.targets:
        is_first = target is results.targets[0]
        clean, mean = target.clean, target.mean
        cells = [
            f"{clean.percent:.2f} {text.span(clean.low, clean.high, 1)}",
            FIRST if is_first else difference_words(target.difference),
        ]
        if mean is not None:
            cells += [
                f"{mean.percent:.2f} {text.span(mean.low, mean.high, 1)}",
                FIRST if is_first else mean_points_words(mean),
                drop_words(mean),
            ]
        add_line(table, target.name, target.precision, *cells)
    return table


def _families(results: RobustnessResults) -> Table:
    severities = ", ".join(map(str, results.severities))
    table = make_table(
        f"Corruptions: mean accuracy over severities {severities}, %, and points against the first model",
        "family",
        *_columns([target.name for target in results.targets]),
    )
    for position, info in enumerate(results.families):
        cells: list[str] = []
        for target in results.targets:
            mean = target.corruptions[position].mean
            cells.append(f"{mean.percent:.2f}")
            if target is not results.targets[0]:
                cells.append(mean_points_words(mean))
        add_line(table, info.family, *cells)
    return table


def _attacks(results: RobustnessResults) -> Table:
    table = make_table(
        "Attacks: accuracy, %, and points against the first model",
        "attack",
        *_columns([attacked_name(target) for target in results.targets]),
        caption="; ".join(crafted_words(target) for target in results.targets if target.attacks),
    )
    for attack in attacks_of(results):
        for epsilon in results.epsilons:
            cells: list[str] = []
            for target in results.targets:
                level = level_of(target, attack, epsilon)
                cells.append(text.MISSING if level is None else f"{level.accuracy.percent:.2f}")
                if target is not results.targets[0]:
                    cells.append(text.MISSING if level is None else difference_words(level.difference))
            add_line(table, f"{attack}, ε = {epsilon_words(epsilon)}", *cells)
    return table


def _columns(names: Sequence[str]) -> list[str]:
    first, *others = (literal(text.plain(name)) for name in names)  # a heading is markup
    return [first, *(heading for name in others for heading in (name, "points [95 %]"))]
