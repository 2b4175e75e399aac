"""From stages that are on disk and measured to the rows of a run's results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.bench.accuracy import compare
from compress.checkpoint import Checkpoint
from compress.data.base import Dataset, Split
from compress.measured import Measurement, PairedDifference, Sensitivity
from compress.packed import unpack_answers
from compress.plan import Planned
from compress.results import Comparison, Epoch, Row


@dataclass(frozen=True)
class Done:
    """A stage that is on disk and measured."""

    planned: Planned
    checkpoint: Checkpoint
    measurement: Measurement


def rows_of(done: Sequence[Done], reference: Done, data: Dataset) -> Iterator[Row]:
    """A row per stage, without times: those after the reference compared with it.

    Args:
        done: the stages in their order.
        reference: one of them.
        data: what they were measured on.
    """
    is_compared = False
    parent: Done | None = None
    for one in done:
        comparison = _comparison(reference.measurement, one.measurement, data) if is_compared else None
        yield _row(one, comparison, _sensitivity(one, parent))
        is_compared = is_compared or one is reference
        parent = one


def _sensitivity(done: Done, parent: Done | None) -> Sensitivity | None:
    """What was measured of the checkpoint, or of the one that it exports: the graph in its int8 file is the same."""
    if done.checkpoint.form == "exported" and parent is not None:
        return parent.measurement.sensitivity
    return done.measurement.sensitivity


def _row(done: Done, comparison: Comparison | None, sensitivity: Sensitivity | None) -> Row:
    measured, entry = done.measurement, done.checkpoint.history[-1]
    # Not those of the parent: they stand at its row.
    unknown = () if measured.sensitivity is None else measured.sensitivity.notes
    return Row(
        stage=done.planned.label,
        accuracy=measured.accuracy,
        quality=measured.quality,
        comparison=comparison,
        parameters=measured.parameters,
        macs=measured.macs,
        size=measured.size,
        sha256=measured.sha256,
        seconds=entry.seconds,
        training=tuple(_epoch(told) for told in entry.training),
        sensitivity=sensitivity,
        pruning=entry.sensitivity,
        checkpoint=done.checkpoint.path.name,
        digest=done.checkpoint.digest,
        precision=measured.precision,
        notes=(*entry.notes, *unknown),
        warnings=entry.warnings,
    )


def _epoch(told: dict[str, float | int]) -> Epoch:
    return Epoch.model_validate({name: told[name] for name in Epoch.model_fields})


def _comparison(reference: Measurement, other: Measurement, data: Dataset) -> Comparison:
    def on(name: str, split: Split) -> PairedDifference:
        first, second = (unpack_answers(one.answers[name]) for one in (reference, other))
        return compare(split.labels.numpy(), first, second)

    return Comparison(validation=on("validation", data.validation), test=on("test", data.test))
