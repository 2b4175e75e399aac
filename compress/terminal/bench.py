"""What `compress bench` measured, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.errors import listed
from compress.measured import Latency, NotMeasured, PairedDifference, Repeat
from compress.methods.comparison import is_clear_ratio
from compress.operators import KINDS, by_kind, by_operator
from compress.report import text
from compress.report.figures import load_words
from compress.report.terminal import add_line, make_table
from compress.results import BenchResults

_OPERATORS = 4
"""Operators named of each model."""
_FIRST = "first"
_UNCLEAR = "~"
_ABOUT_TIMES = (
    f"{_UNCLEAR} no clear difference: 1 is in the interval, or that of the first model against itself reaches as far; "
    "cold: loading and the first answer, once"
)


@dataclass(frozen=True)
class _Load:
    """What is asked of every backend; each has a table."""

    device: str
    batch_size: int
    threads: int

    @classmethod
    def of(cls, record: Latency | NotMeasured | Repeat) -> _Load:
        return cls(record.device, record.batch_size, record.threads)

    def __str__(self) -> str:
        return f"{self.device}, {load_words(self.batch_size, self.threads)}"


def bench_tables(results: BenchResults) -> RenderableType:
    """Latency per setting, what is missing and why, sizes, accuracy where there is any, and time by operator."""
    parts: list[RenderableType] = []
    for load in _loads(results):
        parts += [_latency(results, load), *_repeats(results, load), ""]
    if any(target.latency for target in results.targets):
        parts += [Text(_ABOUT_TIMES, style="dim"), ""]
    if results.missing:
        parts += [*map(Text, _why_missing(results)), ""]
    parts.append(_sizes(results))
    if any(target.accuracy is not None for target in results.targets):
        parts += ["", _accuracies(results)]
    if any(target.profile is not None for target in results.targets):
        parts += ["", _operators(results)]
    return Group(*parts)


def _loads(results: BenchResults) -> list[_Load]:
    """In the order in which they were measured, or would have been."""
    found = dict.fromkeys(map(_Load.of, _records(results)))
    return sorted(found, key=lambda load: (load.device, load.batch_size, load.threads))


def _records(results: BenchResults) -> Iterator[Latency | NotMeasured]:
    """What was asked for, measured or not."""
    for target in results.targets:
        yield from target.latency
    yield from results.missing


def _latency(results: BenchResults, load: _Load) -> Table:
    backends = dict.fromkeys(record.backend for record in _records(results))
    several = len(backends) > 1
    table = make_table(
        f"Latency: {load}" + ("" if several else f", {next(iter(backends))}"),
        "model",
        "type",
        *(("backend",) if several else ()),
        "median ms [95 %]",
        "p90",
        "p99",
        "per s",
        f"× faster than {_FIRST}",
        "cold ms",
        "MB",
        words=3 if several else 2,
        is_tight=several,
    )
    for backend in backends:
        repeats = [
            (one.ratio.low, one.ratio.high)
            for one in results.repeats
            if _Load.of(one) == load and one.backend == backend
        ]
        for target in results.targets:
            for one in target.latency:
                if _Load.of(one) == load and one.backend == backend:
                    shown = (one.precision, *((backend,) if several else ()))
                    add_line(table, target.name, *shown, *_times(one, repeats, is_first=target is results.targets[0]))
            for missing in results.missing:
                if (missing.name, missing.backend, _Load.of(missing)) == (target.name, backend, load):
                    shown = (missing.precision, *((backend,) if several else ()))
                    add_line(table, target.name, *shown, *(text.MISSING,) * 7)
    return table


def _times(one: Latency, repeats: Sequence[tuple[float, float]], *, is_first: bool) -> tuple[str, ...]:
    decimals = text.decimals_of(one.median_ms)
    ratio = one.ratio
    faster = _FIRST if is_first and ratio is None else text.MISSING
    if ratio is not None:
        is_clear = is_clear_ratio((ratio.value, ratio.low, ratio.high), repeats)
        faster = ("" if is_clear else _UNCLEAR) + text.ratio_with_span(ratio.value, ratio.low, ratio.high)
    return (
        f"{one.median_ms:.{decimals}f} {text.span(one.low_ms, one.high_ms, decimals)}",
        f"{one.p90_ms:.{text.decimals_of(one.p90_ms)}f}",
        f"{one.p99_ms:.{text.decimals_of(one.p99_ms)}f}",
        text.rate(one.samples_per_second),
        faster,
        text.rough(one.cold_start_ms),
        text.MISSING if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 1e6:,.0f}",
    )


def _repeats(results: BenchResults, load: _Load) -> Iterator[Text]:
    """The first model against itself, per backend, and a caution where that says that little can be told."""
    for repeat in results.repeats:
        if _Load.of(repeat) != load:
            continue
        ratio = repeat.ratio
        yield Text(
            f"{text.plain(repeat.name)} {repeat.precision} against itself in {repeat.backend}: "
            f"{ratio.value:.3f}× ({ratio.low:.3f} to {ratio.high:.3f})",
            style="dim",
        )
        if repeat.is_noisy:
            yield Text(
                "caution: this machine was too noisy to tell differences of 5 %; close other programs and measure again, "
                "or ask for more --rounds",
                style="yellow",
            )


def _why_missing(results: BenchResults) -> Iterator[str]:
    """A line per backend and reason: whom it concerns, and in which settings where not in all that were asked for."""
    found: dict[tuple[str, str, str], list[NotMeasured]] = {}
    for each in results.missing:
        found.setdefault((each.backend, each.device, each.reason), []).append(each)
    loads = _loads(results)
    for (backend, device, reason), records in found.items():
        names = dict.fromkeys(record.name for record in records)
        whom = "all models" if len(names) == len(results.targets) else listed(names)
        concerned = set(map(_Load.of, records))
        where = "" if concerned == set(loads) else f" ({'; '.join(str(load) for load in loads if load in concerned)})"
        yield text.plain(f"{text.MISSING} {backend} on {device}, {whom}{where}: {reason}")


def _sizes(results: BenchResults) -> Table:
    table = make_table(
        "Size",
        "model",
        "type",
        "bytes",
        "× smaller",
        "gzipped",
        "parameters",
        "not zero",
        "MACs",
        "activations",
        words=2,
        caption="parameters, not zero and MACs are of the file, into which batch normalisation is folded",
    )
    first = results.targets[0]
    for target in results.targets:
        size = target.size
        smaller = _FIRST if target is first else text.ratio(first.size.size_bytes / size.size_bytes)
        peak = size.activation_peak_bytes
        add_line(
            table,
            target.name,
            target.precision,
            f"{size.size_bytes:,}",
            smaller,
            f"{size.gzip_bytes:,}",
            f"{size.parameters:,}",
            text.share(size.nonzero_parameters, size.parameters),
            text.count(size.macs),
            text.MISSING if peak is None else text.size(peak),
        )
    return table


def _accuracies(results: BenchResults) -> Table:
    table = make_table(
        "Accuracy, %",
        "model",
        "validation [95 %]",
        "test [95 %]",
        "points [95 %]",
        "same answers",
        "F1",
        "ECE",
        "per s",
        caption="points: validation accuracy against the first model, on the same samples; F1, ECE (calibration error) and "
        "per s (samples evaluated) are of validation",
    )
    for target in results.targets:
        if target.accuracy is None or target.quality is None:
            add_line(table, target.name, *(text.MISSING,) * 7)
            continue
        validation, test, quality = target.accuracy.validation, target.accuracy.test, target.quality.validation
        compared = None if target.comparison is None else target.comparison.validation
        is_first = target is results.targets[0]
        add_line(
            table,
            target.name,
            f"{validation.percent:.2f} {text.span(validation.low, validation.high, 1)}",
            f"{test.percent:.2f} {text.span(test.low, test.high, 1)}",
            _FIRST if is_first else _points(compared),
            _FIRST if is_first else text.MISSING if compared is None else f"{compared.agreement:.1f}",
            f"{quality.f1:.1f}",
            f"{quality.calibration_error:.1f}",
            text.rate(quality.samples_per_second),
        )
    return table


def _points(compared: PairedDifference | None) -> str:
    if compared is None:
        return text.MISSING
    return f"{text.signed(compared.points)} [{text.signed(compared.low)}, {text.signed(compared.high)}]"


def _operators(results: BenchResults) -> Table:
    profiles = [target.profile for target in results.targets if target.profile is not None]
    one = profiles[0]
    table = make_table(
        f"Time by operator: ONNX Runtime's profile, {load_words(one.batch_size, one.threads)}",
        "model",
        *KINDS,
        "most of it",
    )
    table.columns[-1].justify = "left"
    for target in results.targets:
        if target.profile is None:
            add_line(table, target.name, *(text.MISSING,) * (len(KINDS) + 1))
            continue
        most = by_operator(target.profile)[:_OPERATORS]
        kinds = by_kind(target.profile)
        add_line(
            table,
            target.name,
            *(text.share(kind.share, 1.0) for kind in kinds),
            ", ".join(f"{each.count} {each.operator} {text.share(each.share, 1.0)}" for each in most),
        )
    return table
