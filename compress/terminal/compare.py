"""What `compress compare` found, as tables for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.comparison.records import Compared, RunFigures, Time
from compress.report import text
from compress.report.compare import (
    BASELINE,
    OTHER_MACHINE,
    about_times,
    front_words,
    points_words,
    why_unpaired,
)
from compress.report.figures import load_words
from compress.report.terminal import add_line, make_table


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


def _accuracies(compared: Compared) -> Table:
    table = make_table(
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
        add_line(
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
    table = make_table("Size", "run", "type", "bytes", "× smaller", "gzipped", "model's parameters", "MACs", words=2)
    for run in compared.runs:
        add_line(
            table,
            run.name,
            run.precision,
            f"{run.size_bytes:,}",
            BASELINE if run.size_ratio is None else text.ratio(run.size_ratio),
            f"{run.gzip_bytes:,}",
            f"{run.parameters:,}",
            text.count(run.macs),
        )
    return table


def _latencies(compared: Compared) -> Table:
    table = make_table(
        "Latency, ms per call (medians, 95 % intervals)",
        "run",
        "setting",
        "ms",
        "× faster",
        words=2,
        caption=about_times(compared),
    )
    for setting in dict.fromkeys(time.setting for run in compared.runs for time in run.times):
        for run in compared.runs:
            time = next((time for time in run.times if time.setting == setting), None)
            where = f"{setting.device}, {setting.backend}, {load_words(setting.batch_size, setting.threads)}"
            add_line(table, run.name, where, *_time(run, time))
    return table


def _time(run: RunFigures, time: Time | None) -> tuple[str, str]:
    if time is None:
        return text.MISSING if run.is_same_machine else OTHER_MACHINE, text.MISSING
    decimals = text.decimals_of(time.median_ms)
    shown = f"{time.median_ms:.{decimals}f} {text.span(time.low_ms, time.high_ms, decimals)}"
    if time.speedup is None or time.speedup_low is None or time.speedup_high is None:
        return shown, BASELINE
    return shown, text.ratio_with_span(time.speedup, time.speedup_low, time.speedup_high)


def _rows(compared: Compared) -> Table:
    setting = compared.setting
    table = make_table(
        "All rows, and which lie on the Pareto front of accuracy against size or latency",
        "row",
        "type",
        "validation %",
        "bytes",
        *(() if setting is None else (f"ms, {load_words(setting.batch_size, setting.threads)}",)),
        "front",
        words=2,
    )
    table.columns[-1].justify = "left"
    for model in compared.models:
        time = model.time
        is_on_front = model.is_on_size_front or model.is_on_latency_front
        add_line(
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
