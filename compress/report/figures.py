"""Figures derived from the measured rows: what each row gained and lost against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.report import text
from compress.results import Latency, Results, Row


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
        return f"batch {self.batch_size}, {text.plural(self.threads, 'thread')}"

    @property
    def place(self) -> str:
        """What ran the model."""
        return text.plain(f"{self.device}, {self.backend}, {self.provider}")


@dataclass(frozen=True)
class Speed:
    """Latency of a row beside the reference's in the same setting."""

    ratio: float | None
    """Reference's median over the row's: above 1 is faster."""
    is_clear: bool
    """Whether the intervals of the two medians lie apart."""

    def __str__(self) -> str:
        """In words; an unclear ratio is not worth a figure."""
        if self.ratio is None or self.is_clear:
            return text.times(self.ratio, "faster", "slower", "as fast")
        return "no clear difference"


def ratio(numerator: float, denominator: float) -> float | None:
    """Quotient of two measured figures; None where one of them cannot be compared."""
    if not (math.isfinite(numerator) and math.isfinite(denominator)) or numerator <= 0 or denominator <= 0:
        return None
    return numerator / denominator


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
    """The setting that the headline and the chart show: smallest batch, then most threads.

    Fixed, so that it cannot be the most flattering one; measured for the last row and the reference, or else None.
    """
    reference = results.reference_row()
    both = {Setting.of(latency) for latency in reference.latency}
    both &= {Setting.of(latency) for latency in results.rows[-1].latency}
    return min(both, key=lambda setting: (setting.batch_size, -setting.threads, setting), default=None)


def smaller(row: Row, reference: Row) -> float | None:
    """Times that `row` is smaller on disk than the reference."""
    return ratio(reference.size_bytes, row.size_bytes)


def speed(latency: Latency, reference: Row) -> Speed:
    """How much faster than the reference, in the setting of `latency`."""
    measured = latencies(reference, Setting.of(latency))
    if not measured:
        return Speed(None, is_clear=False)
    base = measured[0]
    apart = latency.high_ms < base.low_ms or base.high_ms < latency.low_ms
    return Speed(ratio(base.median_ms, latency.median_ms), is_clear=apart)


def points(results: Results, row: Row) -> float:
    """Validation accuracy of `row` minus the reference's, points."""
    if row is results.rows[-1] and results.difference is not None:
        return results.difference.points
    return row.accuracy.validation.percent - results.reference_row().accuracy.validation.percent
