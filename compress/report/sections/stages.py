"""The staged table: every model of the run, what it answers, weighs and takes."""

from __future__ import annotations

from dataclasses import dataclass

from compress.measured import Accuracy, Latency, PairedDifference
from compress.report import figures, text
from compress.report.figures import Setting
from compress.report.sections.head import repeats
from compress.report.sections.parts import Cell, Line, Table
from compress.results import Results, Row

SETTINGS_IN_TABLE = 3
"""More settings than this get a table of their own."""
_MOSTLY = 0.99
"""Share of parameters that are not zero from which the others are not worth a word."""


@dataclass(frozen=True)
class Stages:
    """The rows of a run."""

    table: Table
    latency: Table | None
    """In every setting, where the staged table has not room for all."""
    start: Table | None
    """What loading takes, memory, and the tails of latency; None where latency was not measured."""
    repeats: Table | None
    """The reference against itself."""


def stages(results: Results) -> Stages:
    """Every row of `results`."""
    settings = figures.settings(results)
    shown = settings
    if len(settings) > SETTINGS_IN_TABLE:
        main = _start_setting(results)
        shown = () if main is None else (main,)
    return Stages(
        table=_table(results, shown),
        latency=_latencies(results, settings) if shown != settings else None,
        start=_start(results),
        repeats=repeats(results),
    )


def _table(results: Results, settings: tuple[Setting, ...]) -> Table:
    validation, test = results.rows[0].accuracy.validation.n, results.rows[0].accuracy.test.n
    columns = (
        "Stage",
        f"Validation accuracy, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{validation:,}",
        f"Test accuracy, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{test:,}",
        "Size",
        *_titles(settings),
        "Parameters, MACs",
        "Stage time",
    )
    lines = tuple(_line(results, index, settings) for index in range(len(results.rows)))
    caption = (
        "Every model, in the order of the pipeline. Ratios and points are against the reference. Below each figure stands its "
        "95 % interval, that of points being paired."
    )
    return Table(caption, columns, lines)


def _line(results: Results, index: int, settings: tuple[Setting, ...]) -> Line:
    row, reference = results.rows[index], results.reference_row()
    is_compared, compared = figures.is_compared(results, index), row.comparison
    validation, test, both = row.accuracy.validation, row.accuracy.test, row.quality
    smaller = (text.times(figures.smaller(row, reference), "smaller", "larger", "same size"),) if is_compared else ()
    nonzero = row.size.nonzero_parameters
    is_sparse = nonzero < _MOSTLY * row.size.parameters  # both of the file: the model holds more, before it is folded
    return Line(
        label=figures.labels(results)[index],
        tags=_tags(results, index),
        is_reference=index == figures.reference_index(results),
        cells=(
            _accuracy(validation, both.validation.top5, compared.validation if compared else None),
            _accuracy(test, both.test.top5, compared.test if compared else None),
            Cell(text.size(row.size_bytes), (*smaller, f"{text.size(row.size.gzip_bytes)} gzipped")),
            *(_latency(results, index, setting) for setting in settings),
            Cell(
                text.count(row.parameters),
                (
                    *((f"{text.share(nonzero, row.size.parameters)} not zero",) if is_sparse else ()),
                    f"{text.count(row.macs)} MACs",
                ),
            ),
            Cell(text.duration(row.seconds) if row.seconds > 0 else text.MISSING),
        ),
    )


def _tags(results: Results, index: int) -> tuple[str, ...]:
    is_reference = index == figures.reference_index(results)
    return results.rows[index].precision, *(("reference",) if is_reference else ())


def _accuracy(accuracy: Accuracy, top5: Accuracy | None, difference: PairedDifference | None) -> Cell:
    details = [text.span(accuracy.low, accuracy.high)]
    if difference is not None:
        details.append(f"{text.signed(difference.points)} points")
        details.append(text.signed_span(difference.low, difference.high))
    if top5 is not None:
        details.append(f"top-5 {text.percent(top5.percent)}")
    return Cell(text.percent(accuracy.percent), tuple(details))


def _titles(settings: tuple[Setting, ...]) -> tuple[str, ...]:
    """Column titles; the place is named only where there are several."""
    several = len({setting.place for setting in settings}) > 1
    return tuple(f"Latency, {setting.load}" + (f", {setting.place}" if several else "") for setting in settings)


def _latency(results: Results, index: int, setting: Setting) -> Cell:
    """Latency of a row in a setting, with its ratio where it is a result."""
    measured = figures.latencies(results.rows[index], setting)
    is_compared, repeat = figures.is_compared(results, index), figures.repeat_in(results, setting)
    if not measured:
        return Cell(text.MISSING)
    details: list[str] = []
    for latency in measured:
        if details:  # a further precision in the same setting
            details.append(f"{text.plain(latency.precision)} {text.milliseconds(latency.median_ms)}")
        details.append(text.span(latency.low_ms, latency.high_ms, text.decimals_of(latency.median_ms)))
        if is_compared and latency.ratio is not None:
            details += [figures.speed(latency.ratio, repeat), figures.speed_span(latency.ratio, repeat)]
    return Cell(text.milliseconds(measured[0].median_ms), tuple(details))


def _latencies(results: Results, settings: tuple[Setting, ...]) -> Table:
    """A line per setting, a column per row that was measured."""
    timed = [index for index, row in enumerate(results.rows) if row.latency]
    labels = figures.labels(results)
    several = len({setting.place for setting in settings}) > 1
    lines = tuple(
        Line(
            setting.load + (f", {setting.place}" if several else ""),
            tuple(_latency(results, index, setting) for index in timed),
        )
        for setting in settings
    )
    caption = "Median time of one call with its 95 % interval, and how many times faster than the reference that is."
    return Table(caption, ("Setting", *(labels[index] for index in timed)), lines)


def _start_setting(results: Results) -> Setting | None:
    """The main setting, or where the reference and the result share none, the first of all."""
    return figures.main_setting(results) or next(iter(figures.settings(results)), None)


def _start(results: Results) -> Table | None:
    setting = _start_setting(results)
    if setting is None:
        return None
    labels = figures.labels(results)
    lines = tuple(
        Line(
            labels[index],
            _start_cells(row, measured[0]),
            _tags(results, index),
            index == figures.reference_index(results),
        )
        for index, row in enumerate(results.rows)
        if (measured := figures.latencies(row, setting))
    )
    caption = (
        f"With {setting.load}. Cold start: loading the file and the first answer, once, in a fresh process. "
        "Memory: the most that process held, libraries included. Activations: the most alive at once."
    )
    columns = (
        "Stage",
        "Cold start",
        "Peak memory",
        "Activations",
        "90 % of calls",
        "99 % of calls",
        "Samples per second",
    )
    return Table(caption, columns, lines)


def _start_cells(row: Row, latency: Latency) -> tuple[Cell, ...]:
    activations, memory = row.size.activation_peak_bytes, latency.peak_memory_bytes
    return (
        Cell(f"{text.rough(latency.cold_start_ms)} ms"),
        Cell(text.MISSING if memory is None else text.size(memory)),
        Cell(text.MISSING if activations is None else text.size(activations)),
        Cell(f"≤ {text.milliseconds(latency.p90_ms)}"),
        Cell(f"≤ {text.milliseconds(latency.p99_ms)}"),
        Cell(text.rate(latency.samples_per_second)),
    )
