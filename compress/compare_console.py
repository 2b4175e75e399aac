"""What `compress compare` found, as tables for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.compared import Compared, RunFigures, Time
from compress.report import text
from compress.report.compare import (
    BASELINE,
    NOT_IN_TURNS,
    OTHER_MACHINE,
    front_words,
    load_words,
    points_words,
    why_unpaired,
)


def compare_tables(compared: Compared) -> RenderableType:
    """Last rows with their differences from the baseline, their latency, and all rows with the Pareto fronts."""
    parts: list[RenderableType] = [_accuracies(compared), "", _costs(compared)]
    if any(run.times for run in compared.runs):
        parts += ["", _latencies(compared)]
    notes = [why for run in compared.runs if (why := why_unpaired(run))]
    notes += [
        f"{text.plain(run.name)}: {OTHER_MACHINE} or other libraries, its times are not compared"
        for run in compared.runs
        if not run.is_same_machine
    ]
    if notes:
        parts += ["", *(Text(note, style="dim") for note in notes)]
    return Group(*parts, "", _rows(compared))


def _table(title: str, *headings: str, words: int = 1) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
    for position, heading in enumerate(headings):
        # Where room is short the name in front folds; a figure that is cut would be another one.
        table.add_column(
            heading, justify="left" if position < words else "right", no_wrap=position > 0, overflow="fold"
        )
    return table


def _add(table: Table, *cells: str, style: str = "") -> None:
    table.add_row(*(Text(text.plain(cell)) for cell in cells), style=style)


def _accuracies(compared: Compared) -> Table:
    table = _table(
        f"Accuracy, % (points against {text.plain(compared.baseline)}, 95 % intervals)",
        "run",
        "row",
        "validation",
        "points",
        "test",
        "points",
        words=2,
    )
    for run in compared.runs:
        validation, test = run.accuracy.validation, run.accuracy.test
        _add(
            table,
            run.name,
            run.stage,
            f"{validation.percent:.2f} {text.span(validation.low, validation.high, 1)}",
            points_words(run.validation),
            f"{test.percent:.2f} {text.span(test.low, test.high, 1)}",
            points_words(run.test),
        )
    return table


def _costs(compared: Compared) -> Table:
    table = _table("Size", "run", "type", "bytes", "× smaller", "gzipped", "parameters", "MACs", words=2)
    for run in compared.runs:
        _add(
            table,
            run.name,
            run.precision,
            f"{run.size_bytes:,}",
            BASELINE if run.size_ratio is None else f"{run.size_ratio:.2f}",
            f"{run.gzip_bytes:,}",
            f"{run.parameters:,}",
            text.count(run.macs),
        )
    return table


def _latencies(compared: Compared) -> Table:
    table = _table("Latency, ms per call (medians, 95 % intervals)", "run", "setting", "ms", "× faster", words=2)
    for setting in dict.fromkeys(time.setting for run in compared.runs for time in run.times):
        for run in compared.runs:
            time = next((time for time in run.times if time.setting == setting), None)
            where = f"{setting.device}, {setting.backend}, {load_words(setting)}"
            _add(table, run.name, where, *_time(run, time))
    if len(compared.runs) > 1:
        table.caption = Text(NOT_IN_TURNS, style="dim")
        table.caption_justify = "left"
    return table


def _time(run: RunFigures, time: Time | None) -> tuple[str, str]:
    if time is None:
        return text.MISSING if run.is_same_machine else OTHER_MACHINE, text.MISSING
    decimals = text.decimals_of(time.median_ms)
    shown = f"{time.median_ms:.{decimals}f} {text.span(time.low_ms, time.high_ms, decimals)}"
    if time.speedup is None or time.speedup_low is None or time.speedup_high is None:
        return shown, BASELINE
    return shown, f"{time.speedup:.2f} [{time.speedup_low:.2f}, {time.speedup_high:.2f}]"


def _rows(compared: Compared) -> Table:
    setting = compared.setting
    table = _table(
        "All rows, and which lie on the Pareto front of accuracy against size or latency",
        "row",
        "type",
        "validation %",
        "bytes",
        *(() if setting is None else (f"ms, {load_words(setting)}",)),
        "front",
        words=2,
    )
    table.columns[-1].justify = "left"
    for model in compared.models:
        time = model.time
        is_on_front = model.is_on_size_front or model.is_on_latency_front
        _add(
            table,
            f"{model.run}/{model.stage}" + (f" ({BASELINE})" if model.is_baseline else ""),
            model.precision,
            f"{model.accuracy.validation.percent:.2f}",
            f"{model.size_bytes:,}",
            *(
                ()
                if setting is None
                else (text.MISSING if time is None else f"{time.median_ms:.{text.decimals_of(time.median_ms)}f}",)
            ),
            front_words(model),
            style="bold" if is_on_front else "",
        )
    return table
