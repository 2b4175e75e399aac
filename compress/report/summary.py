"""What the report says, as text and in order. The Markdown and the HTML page only lay it out."""

from __future__ import annotations

import json
from dataclasses import dataclass

from compress.errors import listed
from compress.report import figures, text
from compress.report.figures import Setting
from compress.results import Accuracy, Budget, PairedDifference, Results, Row

Facts = tuple[tuple[str, str], ...]

DEFINITIONS: Facts = (
    (
        "Accuracy",
        (
            "Share of samples whose most likely class is the right one. Stages decide on validation; test is only "
            "reported. The interval is Wilson's 95 % interval for a share of n samples. A quantized model is measured "
            "as the ONNX file that is deployed, never as a simulation."
        ),
    ),
    (
        "Points lost or gained",
        (
            "Accuracy minus the reference's in percentage points, so a loss has a minus sign. The 95 % interval is "
            "paired: it comes from the samples that only one of the two models gets right, and is mostly narrower than two "
            "separate intervals would suggest."
        ),
    ),
    ("Size", "The ONNX file's bytes: fp32, or int8 once quantized. 1 KB is 1000 bytes."),
    (
        "Latency",
        (
            "ONNX Runtime, own process per model, alternating rounds: the time of one call, as the median with its "
            "95 % interval from order statistics over the rounds, which assumes no distribution. Where the intervals of two "
            "medians overlap, no ratio is claimed. It belongs to the machine named above."
        ),
    ),
    ("MACs", "Multiply-accumulate operations of one sample's forward pass."),
    ("Reference", "The row that the others are compared with: the model before compression."),
)


@dataclass(frozen=True)
class Cell:
    """A figure, and what qualifies it."""

    figure: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One measured row of the table."""

    label: str
    tags: tuple[str, ...]
    is_reference: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether the budget was met, and by what."""

    met: bool
    title: str
    explanation: str


@dataclass(frozen=True)
class File:
    """A file to deploy."""

    name: str
    size: str
    sha256: str
    is_model: bool


@dataclass(frozen=True)
class Summary:
    """The whole report as text."""

    name: str
    headline: str
    subject: str
    created: str
    verdict: Verdict | None
    columns: tuple[str, ...]
    """Titles of the cells, without the first column: the stage."""
    lines: tuple[Line, ...]
    files: tuple[File, ...]
    checks: Facts
    warnings: Facts
    """Where it arose, and what."""
    notes: Facts
    command: str
    conditions: Facts
    """Seed and classes."""
    settings_json: str
    checkpoints: tuple[tuple[str, str, str], ...]
    """Row, folder and digest."""
    machine: Facts
    definitions: Facts = DEFINITIONS


def summarize(results: Results) -> Summary:
    """Everything the report says about `results`."""
    labels = figures.labels(results)
    settings = figures.settings(results)
    return Summary(
        name=text.plain(results.name),
        headline=headline(results),
        subject=_subject(results, labels),
        created=text.plain(results.created),
        verdict=None if results.budget is None else _verdict(results.budget),
        columns=(
            "Validation accuracy",
            "Test accuracy",
            "Parameters",
            "MACs",
            "Size",
            *_latency_titles(settings),
            "Stage time",
        ),
        lines=tuple(_line(results, index, label, settings) for index, label in enumerate(labels)),
        files=_files(results),
        checks=_checks(results),
        warnings=_remarks(labels, [row.warnings for row in results.rows], results.warnings),
        notes=_remarks(labels, [row.notes for row in results.rows]),
        command=results.command,
        conditions=_conditions(results),
        settings_json=json.dumps(results.settings, indent=2, ensure_ascii=False),
        checkpoints=tuple(
            (label, text.plain(row.checkpoint), text.plain(row.digest))
            for label, row in zip(labels, results.rows, strict=True)
        ),
        machine=_machine(results),
    )


def headline(results: Results) -> str:
    """What the run achieved, in one sentence."""
    reference, last = results.reference_row(), results.rows[-1]
    setting = figures.main_setting(results)
    if last is reference:
        parts = [text.size(last.size_bytes), f"{text.percent(last.accuracy.validation.percent)} on validation"]
        if setting is not None:
            parts.append(f"{text.milliseconds(figures.latencies(last, setting)[0].median_ms)} ({setting.load})")
        return f"Nothing compressed yet: {figures.labels(results)[-1]} measures {', '.join(parts)}"
    if setting is None:
        faster = "latency not compared"
    else:
        faster = f"{figures.speed(figures.latencies(last, setting)[0], reference)} ({setting.load})"
    smaller = text.times(figures.smaller(last, reference), "smaller", "larger", "same size")
    interval = "paired interval not known" if results.difference is None else _interval(results.difference)
    lost = f"{text.change(figures.points(results, last))} on validation ({interval})"
    achieved = f"{'size not compared' if smaller == text.MISSING else smaller}, {faster}, {lost}"
    return achieved if results.artifact else f"Not exported, up to {figures.labels(results)[-1]}: {achieved}"


def _interval(difference: PairedDifference) -> str:
    return f"95 % interval {text.signed(difference.low)} to {text.signed(difference.high)}"


def _subject(results: Results, labels: tuple[str, ...]) -> str:
    """Which two models the headline compares, and where."""
    at, last = figures.reference_index(results), results.rows[-1]
    compared = f"{labels[-1]} ({last.precision})"
    if at != len(labels) - 1:
        compared += f" against {labels[at]} ({results.rows[at].precision})"
    return f"{compared}, measured on {text.plain(results.machine.cpu)}"


def _verdict(budget: Budget) -> Verdict:
    difference, limit = budget.difference, -budget.accuracy_drop
    explanation = (
        f"Allowed: at most {budget.accuracy_drop:.2f} points lost on validation. "
        f"Measured: {text.signed(difference.points)} points (paired {_interval(difference)}, n = {difference.n:,}; "
        f"{text.plural(difference.only_reference_correct, 'sample')} right only in the reference, "
        f"{difference.only_artifact_correct:,} only in the result)."
    )
    if difference.low < limit <= difference.high:
        explanation += " The interval includes the limit: these samples are too few to be sure."
    title = "Budget met" if budget.met else "Budget missed"
    return Verdict(budget.met, title, explanation)


def _latency_titles(settings: tuple[Setting, ...]) -> list[str]:
    """Column titles; the place is named only where there are several."""
    several = len({setting.place for setting in settings}) > 1
    return [f"Latency, {setting.load}" + (f", {setting.place}" if several else "") for setting in settings]


def _line(results: Results, index: int, label: str, settings: tuple[Setting, ...]) -> Line:
    row, reference = results.rows[index], results.reference_row()
    is_reference = index == figures.reference_index(results)
    is_compared = figures.is_compared(results, index)
    validation, test = _accuracy(row.accuracy.validation), _accuracy(row.accuracy.test)
    smaller: tuple[str, ...] = ()
    if is_compared:
        validation = Cell(validation.figure, (*validation.details, *_points(results, row)))
        smaller = (text.times(figures.smaller(row, reference), "smaller", "larger", "same size"),)
    return Line(
        label=label,
        tags=(row.precision, *(("reference",) if is_reference else ())),
        is_reference=is_reference,
        cells=(
            validation,
            test,
            Cell(text.count(row.parameters)),
            Cell(text.count(row.macs)),
            Cell(text.size(row.size_bytes), smaller),
            *(_latency(row, reference if is_compared else None, setting) for setting in settings),
            Cell(text.duration(row.seconds) if row.seconds > 0 else text.MISSING),
        ),
    )


def _accuracy(accuracy: Accuracy) -> Cell:
    interval = text.span(accuracy.low, accuracy.high)
    return Cell(text.percent(accuracy.percent), (interval, f"{accuracy.correct:,} of {accuracy.n:,}"))


def _points(results: Results, row: Row) -> tuple[str, ...]:
    """Change of validation accuracy; the paired interval is known for the last row alone."""
    words = f"{text.signed(figures.points(results, row))} points"
    if row is not results.rows[-1] or results.difference is None:
        return (words,)
    return words, f"paired {text.signed(results.difference.low)} to {text.signed(results.difference.high)}"


def _latency(row: Row, reference: Row | None, setting: Setting) -> Cell:
    """Latency of a row in a setting, compared with the reference where there is one to compare with."""
    measured = figures.latencies(row, setting)
    if not measured:
        return Cell(text.MISSING)
    details: list[str] = []
    for latency in measured:
        if details:  # a further precision in the same setting
            details.append(f"{text.plain(latency.precision)} {text.milliseconds(latency.median_ms)}")
        details.append(text.span(latency.low_ms, latency.high_ms, text.decimals_of(latency.median_ms)))
        if reference is not None:
            details.append(str(figures.speed(latency, reference)))
    return Cell(text.milliseconds(measured[0].median_ms), tuple(details))


def _files(results: Results) -> tuple[File, ...]:
    artifact = results.artifact
    if artifact is None:
        return ()
    return tuple(
        File(
            text.plain(name),
            f"{text.size(size)} ({size:,} bytes)" if size >= 1000 else text.size(size),
            text.plain(artifact.sha256.get(name, text.MISSING)),
            name == artifact.model,
        )
        for name, size in artifact.files.items()
    )


def _checks(results: Results) -> Facts:
    artifact = results.artifact
    checks: list[tuple[str, str]] = []
    if artifact is not None and artifact.max_error is not None:
        error = f"{artifact.max_error:.1e} of the outputs' magnitude, at most"
        checks.append(("fp32 file against the checkpoint", error))
    if artifact is not None and artifact.agreement is not None:
        agreement = f"same answer on {text.percent(100 * artifact.agreement)} of the validation samples"
        checks.append(("int8 file against its float weights", agreement))
    return tuple(checks)


def _remarks(labels: tuple[str, ...], per_row: list[tuple[str, ...]], of_run: tuple[str, ...] = ()) -> Facts:
    remarks = [("run", remark) for remark in of_run]
    for label, of_row in zip(labels, per_row, strict=True):
        remarks += [(label, remark) for remark in of_row]
    return tuple((where, text.plain(remark)) for where, remark in remarks)


def _conditions(results: Results) -> Facts:
    classes = f"{len(results.classes)}: {listed(results.classes)}" if results.classes else text.MISSING
    return ("Seed", str(results.seed)), ("Classes", text.plain(classes))


def _machine(results: Results) -> Facts:
    machine = results.machine
    places = sorted({setting.place for setting in figures.settings(results)})
    facts = (
        ("CPU", f"{machine.cpu} ({text.plural(machine.cores, 'core')}, {machine.architecture})"),
        ("Instruction sets", ", ".join(machine.instruction_sets) or text.MISSING),
        ("GPU", machine.cuda_device or "none"),
        ("Latency measured on", "; ".join(places) or text.MISSING),
        ("System", machine.system),
        ("Python", machine.python),
        ("Versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items()) or text.MISSING),
    )
    return tuple((term, text.plain(value)) for term, value in facts)
