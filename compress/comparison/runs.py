"""Runs against each other, from what is on disk of them: differences with intervals, ratios, the Pareto fronts. No torch."""

from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from compress.comparison.conditions import Figures, Unknown
from compress.comparison.records import Compared, Difference, ModelFigures, RunFigures, Setting, Time
from compress.distinct import distinct
from compress.errors import CompressError
from compress.measured import METRICS, Accuracy, Latency, Measurement, PairedDifference
from compress.methods.comparison import (
    Interval,
    independent_difference,
    paired_difference_at_most,
    pareto_front,
    tellable_ratio,
)
from compress.names import near_path
from compress.packed import unpack_answers
from compress.results import RESULTS, Results, Row, load_results

_NOT_TIMED = "its latency was not measured in a setting that the runs on this machine have in common"
_Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Answered:
    """What the model of a row answered, and all that could change the data it was asked."""

    data: Mapping[str, JsonValue]
    answers: Mapping[str, NDArray[np.int64]]
    """By split, shape (n,)."""


@dataclass(frozen=True)
class Run:
    """A run that was read."""

    name: str
    results: Results
    last: Answered | None = field(default=None, repr=False)
    """Of its last row; None where its checkpoint is not on disk beside the results."""


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read runs, folders or their `results.json`.

    Raises:
        CompressError: where one is not there or damaged, and where they tell different classes apart.
    """
    folders: list[Path] = []
    found: list[Results] = []
    for path in paths:
        if not path.exists():
            raise CompressError(f"{path}: no such run{near_path(path, ('.json',), folders=True)}")
        file = path / RESULTS if path.is_dir() else path
        _check_kind(file)
        found.append(load_results(file))
        folders.append(file.parent)
    for path, results in zip(paths[1:], found[1:], strict=True):
        if results.classes != found[0].classes:
            raise CompressError(
                f"{path}: its {len(results.classes)} classes are not the {len(found[0].classes)} of {paths[0]}: accuracy "
                "on different tasks cannot be compared"
            )
    # Only where runs share their name the folders they lie in are needed.
    names = distinct(
        [(*folder.resolve().parent.parts, results.name) for folder, results in zip(folders, found, strict=True)]
    )
    return tuple(
        Run(name, results, _answered(folder, results.rows[-1]))
        for name, folder, results in zip(names, folders, found, strict=True)
    )


def _check_kind(file: Path) -> None:
    """Tell what is no run's, such as a model or what another command wrote; what is damaged is told when it is loaded."""
    try:
        content = json.loads(file.read_bytes())
    except OSError:
        return
    except (ValueError, RecursionError):
        if file.name == RESULTS:
            return
        raise CompressError(f"{file}: is no {RESULTS}; `compress compare` takes runs") from None
    kind = content.get("kind", "run") if isinstance(content, dict) else None
    if kind in ("bench", "compare"):
        raise CompressError(f"{file}: is what `compress {kind}` wrote; `compress compare` takes runs")


def compare(runs: Sequence[Run]) -> Compared:
    """Compare runs of the same task.

    Args:
        runs: at least one, with different names.
    """
    first = runs[0].results
    settings = _common_settings(runs)
    figures = [_alone(runs[0], settings)] if len(runs) == 1 else [_against(runs[0], run, settings) for run in runs]
    baseline = first.reference_row() if len(runs) == 1 else first.rows[-1]
    return Compared(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        baseline=f"{runs[0].name}/{baseline.stage}",
        cpu=first.machine.cpu,
        setting=settings[0] if settings else None,
        runs=tuple(figures),
        models=_models(runs, settings[0] if settings else None, baseline),
    )


def figures_of(compared: Compared) -> dict[str, Figures]:
    """What conditions ask of each run but the baseline's, by name; of the run itself where it is alone."""
    subjects = compared.runs[1:] or compared.runs
    return {run.name: _figures(run) for run in subjects}


def _figures(run: RunFigures) -> Figures:
    nothing = Unknown("it is the reference itself, nothing came after it")
    untimed = Unknown(_NOT_TIMED if run.is_same_machine else "its latency was measured on another machine")
    time = run.times[0] if run.times else None

    def or_unknown(value: float | None, unknown: Unknown) -> float | Unknown:
        return unknown if value is None else value

    return {
        "accuracy_drop": nothing if run.validation is None else -run.validation.points,
        "test_accuracy_drop": nothing if run.test is None else -run.test.points,
        "accuracy": run.accuracy.validation.percent,
        "test_accuracy": run.accuracy.test.percent,
        "size_bytes": run.size_bytes,
        "gzip_bytes": run.gzip_bytes,
        "size_ratio": or_unknown(run.size_ratio, nothing),
        "latency_ms": untimed if time is None else time.median_ms,
        "speedup": untimed if time is None else or_unknown(time.speedup, nothing),
        "parameters": run.parameters,
        "macs": run.macs,
        "budget_missed": Unknown("it has no budget") if run.is_budget_met is None else float(not run.is_budget_met),
    }


def _alone(run: Run, settings: Sequence[Setting]) -> RunFigures:
    """A run against its own reference, as it was measured: on the same samples, in turns."""
    results = run.results
    row, reference = results.rows[-1], results.reference_row()
    compared = row.comparison
    is_reference = row is reference

    def ratio(latency: Latency) -> Interval | None:
        return _own_ratio(latency, _repeats(run, _setting(latency)))

    return _run_figures(
        run,
        is_same_machine=True,
        validation=None if compared is None else _exact(compared.validation),
        test=None if compared is None else _exact(compared.test),
        size_ratio=None if is_reference else reference.size_bytes / row.size_bytes,
        times=_times(row, settings, ratio),
    )


def _against(first: Run, run: Run, settings: Sequence[Setting]) -> RunFigures:
    """A run's last row against the first run's."""
    base, row = first.results.rows[-1], run.results.rows[-1]
    is_base, is_same_machine = run is first, run.results.machine == first.results.machine
    why_unpaired = None if is_base else _why_unpaired(first, run)
    differences: dict[str, Difference | None] = {"validation": None, "test": None}
    if not is_base:
        is_paired = why_unpaired is None
        differences = {split: _difference(first, run, split, is_paired=is_paired) for split in ("validation", "test")}

    def against(latency: Latency) -> Interval | None:
        setting = _setting(latency)
        repeats = (*_repeats(first, setting), *_repeats(run, setting))
        return None if is_base else _ratio(_latency(base, setting), latency, repeats)

    return _run_figures(
        run,
        is_same_machine=is_same_machine,
        validation=differences["validation"],
        test=differences["test"],
        why_unpaired=why_unpaired,
        size_ratio=None if is_base else base.size_bytes / row.size_bytes,
        times=_times(row, settings if is_same_machine and row.latency else (), against),
    )


def _run_figures(
    run: Run,
    *,
    is_same_machine: bool,
    validation: Difference | None,
    test: Difference | None,
    size_ratio: float | None,
    times: tuple[Time, ...],
    why_unpaired: str | None = None,
) -> RunFigures:
    results, row = run.results, run.results.rows[-1]
    return RunFigures(
        name=run.name,
        stage=row.stage,
        precision=row.precision,
        created=results.created,
        git_revision=results.git_revision,
        cpu=results.machine.cpu,
        is_same_machine=is_same_machine,
        accuracy=row.accuracy,
        validation=validation,
        test=test,
        why_unpaired=why_unpaired,
        size_bytes=row.size_bytes,
        gzip_bytes=row.size.gzip_bytes,
        size_ratio=size_ratio,
        parameters=row.parameters,
        macs=row.macs,
        times=times,
        is_budget_met=None if results.budget is None else results.budget.met,
    )


# --- accuracy --------------------------------------------------------------------------------------------------------


def _exact(difference: PairedDifference) -> Difference:
    return Difference(points=difference.points, low=difference.low, high=difference.high, is_paired=True)


def _difference(first: Run, run: Run, split: _Split, *, is_paired: bool) -> Difference:
    a, b = (_accuracy(one.results.rows[-1], split) for one in (first, run))
    if is_paired:
        assert first.last is not None
        assert run.last is not None
        differ = int((first.last.answers[split] != run.last.answers[split]).sum())
        found = paired_difference_at_most(a.correct, b.correct, differ, a.n)
    else:
        found = independent_difference(a.correct, a.n, b.correct, b.n)
    _, low, high = found
    # From the counts, in one division: a loss of exactly one point is not more than one.
    points = 100 * (b.correct * a.n - a.correct * b.n) / (a.n * b.n)
    return Difference(points=points, low=100 * low, high=100 * high, is_paired=is_paired)


def _accuracy(row: Row, split: _Split) -> Accuracy:
    return row.accuracy.validation if split == "validation" else row.accuracy.test


def _why_unpaired(first: Run, run: Run) -> str | None:
    """Why answers cannot be compared one by one, None where they can."""
    for one in (first, run):
        if one.last is None:
            return f"the answers of '{one.name}' are not on disk beside its results"
    assert first.last is not None
    assert run.last is not None
    if first.last.data != run.last.data:
        return "the data, its split or what reads it is not the same"
    for split in ("validation", "test"):
        a, b = first.last.answers[split], run.last.answers[split]
        counts = [_accuracy(one.results.rows[-1], split) for one in (first, run)]
        if not len(a) == len(b) == counts[0].n == counts[1].n:
            return "the numbers of samples differ"
        if int((a != b).sum()) < abs(counts[0].correct - counts[1].correct):
            return "the answers contradict the accuracy in the results"
    return None


def _answered(folder: Path, row: Row) -> Answered | None:
    """What the model of a row answered, None where it is not on disk, or is another's."""
    path = folder / Path(row.checkpoint).name / METRICS
    try:
        measured = Measurement.model_validate_json(path.read_bytes())
        answers = {name: unpack_answers(packed) for name, packed in measured.answers.items()}
    except (OSError, ValidationError, ValueError, zlib.error):
        return None
    if measured.sha256 != row.sha256 or not {"validation", "test"} <= set(answers):
        return None
    if not {"data", "seed"} <= set(measured.key):
        return None
    return Answered({"data": measured.key["data"], "seed": measured.key["seed"]}, answers)


# --- latency ---------------------------------------------------------------------------------------------------------


def _common_settings(runs: Sequence[Run]) -> tuple[Setting, ...]:
    """Settings in which the first run's last row was measured and so was that of every other run on its machine.

    A run whose latency was not measured at all takes no setting from the others. Of a run alone: those of its last row.
    """
    first = runs[0].results
    rows = [run.results.rows[-1] for run in runs if run.results.machine == first.machine]
    rows = [first.rows[-1], *(row for row in rows[1:] if row.latency)]
    common = set.intersection(*(set(map(_setting, row.latency)) for row in rows))
    return tuple(sorted(common, key=lambda s: (s.batch_size, -s.threads, s.device, s.backend, s.provider)))


def _setting(latency: Latency) -> Setting:
    return Setting(
        device=latency.device,
        backend=latency.backend,
        provider=latency.provider,
        batch_size=latency.batch_size,
        threads=latency.threads,
    )


def _latency(row: Row, setting: Setting) -> Latency:
    return next(one for one in row.latency if _setting(one) == setting)


def _times(row: Row, settings: Sequence[Setting], ratio_of: Callable[[Latency], Interval | None]) -> tuple[Time, ...]:
    latencies = [(setting, _latency(row, setting)) for setting in settings]
    return tuple(_time(setting, latency, ratio_of(latency)) for setting, latency in latencies)


def _time(setting: Setting, latency: Latency, ratio: Interval | None) -> Time:
    value, low, high = (None, None, None) if ratio is None else ratio
    return Time(
        setting=setting,
        median_ms=latency.median_ms,
        low_ms=latency.low_ms,
        high_ms=latency.high_ms,
        speedup=value,
        speedup_low=low,
        speedup_high=high,
    )


def _repeats(run: Run, setting: Setting) -> tuple[tuple[float, float], ...]:
    """Intervals of what a run measured of its reference against itself in a setting."""
    asked = (setting.device, setting.backend, setting.batch_size, setting.threads)
    return tuple(
        (one.ratio.low, one.ratio.high)
        for one in run.results.repeats
        if (one.device, one.backend, one.batch_size, one.threads) == asked
    )


def _own_ratio(latency: Latency, repeats: Sequence[tuple[float, float]]) -> Interval | None:
    """Against the reference of its own run, as it was measured: in turns, round by round."""
    ratio = latency.ratio
    return None if ratio is None else tellable_ratio((ratio.value, ratio.low, ratio.high), repeats)


def _ratio(base: Latency, latency: Latency, repeats: Sequence[tuple[float, float]]) -> Interval:
    """Of two runs, which were not measured in turns: whatever the two medians may be within their intervals."""
    ratio = base.median_ms / latency.median_ms, base.low_ms / latency.high_ms, base.high_ms / latency.low_ms
    return tellable_ratio(ratio, repeats)


# --- Pareto fronts ---------------------------------------------------------------------------------------------------


def _models(runs: Sequence[Run], setting: Setting | None, baseline: Row) -> tuple[ModelFigures, ...]:
    machine = runs[0].results.machine
    rows = [(run, row) for run in runs for row in run.results.rows]
    times = [
        next((_time(setting, one, None) for one in row.latency if _setting(one) == setting), None)
        if setting is not None and run.results.machine == machine
        else None
        for run, row in rows
    ]
    values = [row.accuracy.validation.percent for _, row in rows]
    on_size = pareto_front([float(row.size_bytes) for _, row in rows], values)
    on_latency = _front_of_timed([None if time is None else time.median_ms for time in times], values)
    return tuple(
        ModelFigures(
            run=run.name,
            stage=row.stage,
            precision=row.precision,
            is_baseline=row is baseline,
            accuracy=row.accuracy,
            size_bytes=row.size_bytes,
            time=time,
            is_on_size_front=small,
            is_on_latency_front=fast,
        )
        for (run, row), time, small, fast in zip(rows, times, on_size, on_latency, strict=True)
    )


def _front_of_timed(costs: Iterable[float | None], values: Sequence[float]) -> list[bool]:
    """`pareto_front` of those that have a cost; the others are not on it."""
    timed = [(cost, value) for cost, value in zip(costs, values, strict=True) if cost is not None]
    front = iter(pareto_front([cost for cost, _ in timed], [value for _, value in timed]))
    return [cost is not None and next(front) for cost in costs]
