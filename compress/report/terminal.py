"""Tables of figures for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from compress.report import text


def make_table(title: str, *headings: str, words: int = 1, caption: str = "", is_tight: bool = False) -> Table:
    """An empty table.

    Args:
        title: Above it.
        headings: Of its columns.
        words: How many of them, from the left, hold words; the others hold figures.
        caption: Below it.
        is_tight: Whether columns stand closer, where there are many.
    """
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(caption, style="dim") if caption else None,
        caption_justify="left",
        box=None,
        pad_edge=False,
        collapse_padding=is_tight,
        header_style="dim",
    )
    for position, heading in enumerate(headings):
        # Where room is short the name in front folds; a figure that is cut would be another one.
        table.add_column(
            heading, justify="left" if position < words else "right", no_wrap=position > 0, overflow="fold"
        )
    return table


def add_line(table: Table, *cells: str, style: str = "") -> None:
    """A line of text from outside, in which no markup counts."""
    table.add_row(*(Text(text.plain(cell)) for cell in cells), style=style)
