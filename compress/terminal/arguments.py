"""Options that several commands have, and what commands do with them at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from compress.terminal.console import literal, make_console

INTERRUPTED = 130
"""Exit code of what the keyboard stopped."""

Targets = Annotated[
    list[Path],
    typer.Argument(
        metavar="TARGET...",
        help="Checkpoint, run, folder of .onnx files such as a run's dist/, or any .onnx file. The first is what the others "
        "are compared with; of a run that is its reference row.",
        show_default=False,
    ),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  # typer reads this annotation at run time
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Lay a setting over the file, such as [bold]stages.prune.target.macs=0.4[/bold]; may be repeated.",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write everything that was found as JSON.", show_default=False),
]
HtmlFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--html", metavar="FILE", help="Write one self-contained page, charts included.", show_default=False),
]


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write what was found where an option says."""
    if path is None:
        return
    from compress.files import readable_json, write_file

    write_file(path, readable_json(content))


def print_place(what: str, path: Path | None) -> None:
    """Say where it was written."""
    if path is not None:
        make_console().print(f"{what}: {literal(str(path))}", soft_wrap=True)
