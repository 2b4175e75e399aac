"""The parts that sections are made of."""

from __future__ import annotations

from dataclasses import dataclass

Facts = tuple[tuple[str, str], ...]
"""Terms and what they are."""


@dataclass(frozen=True)
class Cell:
    """A figure, and what qualifies it."""

    figure: str
    details: tuple[str, ...] = ()
    part: float | None = None
    """Of a whole, 0 to 1, where a bar is to show it."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    label: str
    cells: tuple[Cell, ...]
    tags: tuple[str, ...] = ()
    is_reference: bool = False


@dataclass(frozen=True)
class Table:
    """Lines under titles."""

    caption: str
    columns: tuple[str, ...]
    """Titles, the first that of the labels."""
    lines: tuple[Line, ...]
    words: tuple[str, ...] = ()
    """Columns that hold no figures, so that they start at the left."""
    rest: str = ""
    """What the table leaves out, in words."""


def cells(*figures: str) -> tuple[Cell, ...]:
    """Cells of figures that nothing qualifies."""
    return tuple(Cell(figure) for figure in figures)
