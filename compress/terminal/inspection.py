"""What a checkpoint holds, for the terminal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from compress.checkpoint import load
from compress.edits import Attribute, Edit, Factor, Keep
from compress.manifest import HistoryEntry, InputRecord
from compress.measured import METRICS, Measurement
from compress.models.cost import parameters
from compress.report.text import plain

_SHOWN_EDITS = 12


def describe(folder: Path, *, trust_code: bool) -> RenderableType:
    """Architecture, edits, lineage, files and metrics of a checkpoint.

    Args:
        folder: the checkpoint; every file in it is checked first.
        trust_code: build the model to count its parameters even where that runs the checkpoint's own code.

    Raises:
        CheckpointError: where it is damaged.
    """
    checkpoint = load(folder)
    made_by_code = checkpoint.arch.is_code() and not trust_code
    count = (
        "not counted: the model is made by code, which --trust-code runs"
        if made_by_code
        else f"{parameters(checkpoint.build({checkpoint.arch.factory})):,}"
    )
    kwargs = json.dumps(dict(checkpoint.arch.kwargs))
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in (
        ("checkpoint", str(folder)),
        ("digest", checkpoint.digest),
        ("form", checkpoint.form),
        ("architecture", f"{checkpoint.arch.factory} {kwargs}"),
        *(("input", _input(each)) for each in checkpoint.inputs),
        ("classes", ", ".join(checkpoint.classes)),
        ("parameters", count),
    ):
        facts.add_row(name, _literal(value))
    return Group(
        facts,
        "",
        _lineage(checkpoint.history),
        "",
        _edits(checkpoint.edits),
        "",
        _files(checkpoint.path),
        *_metrics(folder),
    )


def _input(record: InputRecord) -> str:
    normalised = f", mean {record.mean}, std {record.std}" if record.mean else ", not normalised"
    return f"{record.name} {record.shape}, {record.dtype}{normalised}"


def _lineage(history: tuple[HistoryEntry, ...]) -> RenderableType:
    table = Table(title="lineage", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "made from", "seconds", "notes"):
        table.add_column(heading)
    for entry in history:
        notes = "; ".join((*entry.notes, *(f"warning: {text}" for text in entry.warnings)))
        table.add_row(_literal(entry.stage), (entry.parent or "—")[:12], f"{entry.seconds:.1f}", _literal(notes))
    return table


def _edits(edits: tuple[Edit, ...]) -> RenderableType:
    if not edits:
        return "edits: none"
    counts = Counter(edit.edit for edit in edits)
    title = "edits: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    shown = [edit for edit in edits if not isinstance(edit, Attribute)]  # attributes only follow the tensors
    for edit in shown[:_SHOWN_EDITS]:
        match edit:
            case Keep():
                names = sorted({name for name, _ in edit.axes})
                table.add_row("keep", f"{len(edit.kept)} of {edit.size}", _literal(", ".join(names)))
            case Factor():
                ranks = f"ranks {edit.rank_in}, {edit.rank}" if edit.rank_in else f"rank {edit.rank}"
                table.add_row("factor", f"{ranks}, {edit.split}", _literal(edit.module))
    if len(shown) > _SHOWN_EDITS:
        table.add_row("…", f"{len(shown) - _SHOWN_EDITS} more", "")
    return table


def _files(folder: Path) -> RenderableType:
    table = Table(title="files", title_justify="left", box=None, pad_edge=False, show_header=False)
    for path in sorted(folder.iterdir()):
        table.add_row(_literal(path.name), f"{path.stat().st_size:,} bytes")
    return table


def _metrics(folder: Path) -> list[RenderableType]:
    try:
        found = Measurement.model_validate_json((folder / METRICS).read_bytes())
    except (OSError, ValidationError):
        return ["", "metrics: not measured"]
    table = Table(title="metrics", title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, accuracy in (("validation", found.accuracy.validation), ("test", found.accuracy.test)):
        interval = f"95 % interval {accuracy.low:.2f} to {accuracy.high:.2f}"
        table.add_row(f"{name} accuracy", f"{accuracy.percent:.2f} % ({accuracy.correct} of {accuracy.n}, {interval})")
    for name, quality in (("validation", found.quality.validation), ("test", found.quality.test)):
        error = f"calibration error {quality.calibration_error:.2f} points"
        table.add_row(f"{name} F1, mean of classes", f"{quality.f1:.2f} %, {error}")
    table.add_row("MACs", f"{found.macs:,}")
    table.add_row(f"{found.precision} ONNX", f"{found.size.size_bytes:,} bytes, {found.size.gzip_bytes:,} gzipped")
    return ["", table]


def _literal(text: str) -> str:
    """Text of a checkpoint, which may come from a stranger: neither markup nor control codes count."""
    return escape(plain(text))
