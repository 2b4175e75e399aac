"""Figures derived from the measured rows: what each row gained and lost against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.measured import Latency, PairedDifference, Ratio, Repeat, by_threads
from compress.methods.comparison import is_clear_ratio
from compress.report import text
from compress.results import Results, Row


@dataclass(frozen=True, order=True)
class Setting:
    """How latency was measured. Rows are compared within one setting only; their precision may differ."""

    batch_size: int
    threads: int
    device: str
    backend: str
    provider: str

    @classmethod
    def of(cls, latency: Latency) -> Setting:
        """Setting of a measurement."""
        return cls(latency.batch_size, latency.threads, latency.device, latency.backend, latency.provider)

    @property
    def load(self) -> str:
        """Batch and threads in words."""
        return load_words(self.batch_size, self.threads)

    @property
    def place(self) -> str:
        """What ran the model."""
        return text.plain(f"{self.device}, {self.backend}, {self.provider}")


def load_words(batch_size: int, threads: int) -> str:
    """Batch and threads in words."""
    return f"batch {batch_size}, {text.plural(threads, 'thread')}"


def ratio(numerator: float, denominator: float) -> float | None:
    """Quotient of two measured figures; None where one of them cannot be compared."""
    if not (math.isfinite(numerator) and math.isfinite(denominator)) or numerator <= 0 or denominator <= 0:
        return None
    return numerator / denominator


def is_clear(measured: Ratio, repeat: Repeat | None) -> bool:
    """Whether one of two models is faster.

    It is where the interval of their ratio leaves 1 out, and the ratio is further from 1 than the reference against itself
    reached in that setting, where that was measured.
    """
    repeats = () if repeat is None else ((repeat.ratio.low, repeat.ratio.high),)
    return is_clear_ratio((measured.value, measured.low, measured.high), repeats)


def speed(measured: Ratio | None, repeat: Repeat | None) -> str:
    """A ratio of times in words; one that is not clear is not worth a figure."""
    if measured is None:
        return text.MISSING
    if not is_clear(measured, repeat):
        return "no clear difference"
    return text.times(measured.value, "faster", "slower", "as fast")


def speed_span(measured: Ratio, repeat: Repeat | None) -> str:
    """The interval of a ratio of times, turned round where `speed` says 'slower'."""
    if is_clear(measured, repeat) and measured.value < 1 and measured.low > 0:
        return text.factor_span(1 / measured.high, 1 / measured.low)
    return text.factor_span(measured.low, measured.high)


def reference_index(results: Results) -> int:
    """Position of the reference row."""
    return results.rows.index(results.reference_row())


def labels(results: Results) -> tuple[str, ...]:
    """One name per row, safe to show."""
    return tuple(text.plain(row.stage) for row in results.rows)


def settings(results: Results) -> tuple[Setting, ...]:
    """Every setting in which some row was measured, in order of batch and threads."""
    return tuple(sorted({Setting.of(latency) for row in results.rows for latency in row.latency}))


def is_compared(results: Results, index: int) -> bool:
    """Whether a row stands after the reference; what came before it, such as an untrained source, is no result."""
    return index > reference_index(results)


def latencies(row: Row, setting: Setting) -> tuple[Latency, ...]:
    """Measurements of a row in a setting: one, or one per precision."""
    return tuple(latency for latency in row.latency if Setting.of(latency) == setting)


def main_setting(results: Results) -> Setting | None:
    """The setting that the headline and the charts show: smallest batch, then most threads that have a core each.

    Fixed, so that it cannot be the most flattering one; measured for the last row and the reference, or else None.
    """
    reference, cores = results.reference_row(), results.machine.cores
    both = {Setting.of(latency) for latency in reference.latency}
    both &= {Setting.of(latency) for latency in results.rows[-1].latency}
    return min(both, key=lambda one: (one.batch_size, *by_threads(one.threads, cores), one), default=None)


def repeat_in(results: Results, setting: Setting) -> Repeat | None:
    """The reference against itself (A/A) in a setting, where that was measured."""
    asked = (setting.device, setting.backend, setting.batch_size, setting.threads)
    found = (one for one in results.repeats if (one.device, one.backend, one.batch_size, one.threads) == asked)
    return next(found, None)


def smaller(row: Row, reference: Row) -> float | None:
    """Times that `row` is smaller on disk than the reference."""
    return ratio(reference.size_bytes, row.size_bytes)


def points(results: Results, row: Row) -> float:
    """Validation accuracy of `row` minus the reference's, points."""
    if row.comparison is not None:
        return row.comparison.validation.points
    return row.accuracy.validation.percent - results.reference_row().accuracy.validation.percent


def is_sure(difference: PairedDifference) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    return difference.low > 0 or difference.high < 0
