"""What each group of channels costs alone, and how much of it was removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.measured import GroupSensitivity, PruningSensitivity
from compress.report import figures, text
from compress.report.charts.groups import lowest
from compress.report.sections.parts import Cell, Line, Table
from compress.results import Results

TOP = 10
"""Groups that are named before the rest is left to the whole table."""


@dataclass(frozen=True)
class Groups:
    """One stage that decided by what its groups cost."""

    label: str
    found: PruningSensitivity
    table: Table
    """The groups that lose most."""
    all: Table | None
    """All of them in the order of the model, where `table` does not have room."""


def groups(results: Results) -> tuple[Groups, ...]:
    """A record per stage that measured its groups."""
    labelled = zip(figures.labels(results), results.rows, strict=True)
    return tuple(
        _groups(label, row.pruning) for label, row in labelled if row.pruning is not None and row.pruning.groups
    )


def _groups(label: str, found: PruningSensitivity) -> Groups:
    ranked = sorted(found.groups, key=lowest)
    some = f"Groups of channels of {label} that lose most, each alone"
    rest = f"{text.plural(len(ranked) - TOP, 'further group')} lose less." if len(ranked) > TOP else ""
    whole = _table(f"All groups of {label}", found, found.groups, "") if rest else None
    return Groups(label, found, _table(some, found, ranked[:TOP], rest), whole)


def _table(title: str, found: PruningSensitivity, chosen: Sequence[GroupSensitivity], rest: str) -> Table:
    ratios = [step.ratio for step in found.groups[0].steps]
    caption = (
        f"{title}: points of accuracy lost with that share of its channels silenced, on {text.plural(found.n, 'sample')} of "
        f"validation, just before the cut ({text.percent(found.percent)} with all channels)."
    )
    lines = tuple(_line(found, group) for group in chosen)
    columns = ("Group", "Channels", *(f"{100 * ratio:g} % silenced" for ratio in ratios), "Removed")
    return Table(caption, columns, lines, rest=rest)


def _line(found: PruningSensitivity, group: GroupSensitivity) -> Line:
    lost = (Cell(text.signed(step.percent - found.percent, 2)) for step in group.steps)
    share = group.removed / group.channels
    return Line(
        text.plain(group.name),
        (Cell(f"{group.channels:,}"), *lost, Cell(f"{group.removed:,}", (text.share(share, 1),), part=share)),
    )
