"""The head of the report: what was gained, what it cost, and whether the figures can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from compress.measured import PairedDifference
from compress.report import figures, text
from compress.report.figures import Setting
from compress.report.sections.parts import Cell, Line, Table
from compress.results import Budget, Results, Row


@dataclass(frozen=True)
class Verdict:
    """Whether the budget was met, and by what."""

    met: bool
    title: str
    explanation: str


@dataclass(frozen=True)
class Big:
    """One of the figures that people remember."""

    figure: str
    word: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """What stands above everything else."""

    name: str
    headline: str
    """All of it in one sentence."""
    bigs: tuple[Big, ...]
    """Size, time and accuracy."""
    subject: str
    created: str
    verdict: Verdict | None
    trust: str
    """What the reference against itself says; empty where latency was not measured."""
    caution: str
    """Why small differences of latency mean nothing here; empty where they do."""


def head(results: Results) -> Head:
    """The head of `results`."""
    return Head(
        name=text.plain(results.name),
        headline=headline(results),
        bigs=_bigs(results),
        subject=_subject(results),
        created=text.moment(results.created),
        verdict=None if results.budget is None else _verdict(results.budget),
        trust=_trust(results),
        caution=_caution(results),
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
    faster = "latency not compared"
    if setting is not None and (measured := figures.latencies(last, setting)[0].ratio) is not None:
        faster = f"{figures.speed(measured, figures.repeat_in(results, setting))} ({setting.load})"
    smaller = text.times(figures.smaller(last, reference), "smaller", "larger", "same size")
    interval = "" if results.difference is None else f" ({_interval(results.difference)})"
    lost = f"{text.change(figures.points(results, last))} on validation{interval}"
    achieved = f"{'size not compared' if smaller == text.MISSING else smaller}, {faster}, {lost}"
    return achieved if results.artifact else f"Not exported, up to {figures.labels(results)[-1]}: {achieved}"


def repeats(results: Results) -> Table | None:
    """The reference against itself in every setting; None where that was not measured."""
    if not results.repeats:
        return None
    places = {(one.device, one.backend) for one in results.repeats}
    lines = tuple(
        Line(
            figures.load_words(one.batch_size, one.threads)
            + (text.plain(f", {one.device}, {one.backend}") if len(places) > 1 else ""),
            (
                Cell(f"{one.ratio.value:.3f}×"),
                Cell(f"{one.ratio.low:.3f}× to {one.ratio.high:.3f}×"),
                Cell("too noisy for 5 %" if one.is_noisy else "quiet enough for 5 %"),
            ),
        )
        for one in results.repeats
    )
    caption = (
        f"{text.plain(results.reference)} measured against itself in a second process (A/A). Equal things: "
        "what differs from 1 is the machine's noise."
    )
    return Table(caption, ("Setting", "Ratio", "95 % interval", "Can differences be told?"), lines)


def _bigs(results: Results) -> tuple[Big, ...]:
    reference, last = results.reference_row(), results.rows[-1]
    setting = figures.main_setting(results)
    if last is reference:
        accuracy = last.accuracy.validation
        bigs = [Big(text.size(last.size_bytes), "ONNX file", (f"{text.size(last.size.gzip_bytes)} gzipped",))]
        if setting is not None:
            latency = figures.latencies(last, setting)[0]
            interval = text.span(latency.low_ms, latency.high_ms, text.decimals_of(latency.median_ms))
            bigs.append(Big(text.milliseconds(latency.median_ms), setting.load, (f"95 % interval {interval}",)))
        interval = text.span(accuracy.low, accuracy.high)
        bigs.append(
            Big(text.percent(accuracy.percent), "on validation", (f"95 % interval {interval}", f"n = {accuracy.n:,}"))
        )
        return tuple(bigs)
    return _size(last, reference), _time(results, setting), _accuracy(results, last)


def _size(last: Row, reference: Row) -> Big:
    smaller = figures.smaller(last, reference)
    details = (
        f"{text.size(reference.size_bytes)} → {text.size(last.size_bytes)}",
        f"gzipped {text.size(reference.size.gzip_bytes)} → {text.size(last.size.gzip_bytes)}",
    )
    if smaller is None:
        return Big(text.MISSING, "size not compared", details)
    words = text.times(smaller, "smaller", "larger", "same size").rpartition("× ")[2]
    return Big(text.factor(smaller), words, details)


def _time(results: Results, setting: Setting | None) -> Big:
    if setting is None:
        return Big(text.MISSING, "latency not compared", ("not measured of both models in one setting",))
    rows = results.reference_row(), results.rows[-1]
    before, after = (figures.latencies(row, setting)[0] for row in rows)
    times = f"{text.milliseconds(before.median_ms)} → {text.milliseconds(after.median_ms)}, {setting.load}"
    measured = after.ratio
    if measured is None:
        return Big(text.MISSING, "latency not compared", (times,))
    repeat = figures.repeat_in(results, setting)
    interval = f"95 % interval {figures.speed_span(measured, repeat)}"
    if not figures.is_clear(measured, repeat):
        why = "which includes 1" if measured.low <= 1 <= measured.high else "no more than the reference against itself"
        return Big("unclear", "whether faster or slower", (times, f"{interval}, {why}"))
    words = text.times(measured.value, "faster", "slower", "as fast").rpartition("× ")[2]
    return Big(text.factor(measured.value), words, (times, interval))


def _accuracy(results: Results, last: Row) -> Big:
    points, difference = figures.points(results, last), results.difference
    word = f"{'points gained' if points > 0 else 'points lost'} on validation"
    before, after = results.reference_row().accuracy.validation, last.accuracy.validation
    percents = f"{text.percent(before.percent)} → {text.percent(after.percent)}"
    if difference is None:
        return Big(f"{abs(points):.2f}", word, (percents,))
    interval = f"95 % interval {text.signed_span(difference.low, difference.high)}, n = {difference.n:,}"
    sure = () if figures.is_sure(difference) else ("within what chance explains",)
    return Big(f"{abs(points):.2f}", word, (percents, interval, *sure))


def _interval(difference: PairedDifference) -> str:
    return f"95 % interval {text.signed_span(difference.low, difference.high)}"


def _subject(results: Results) -> str:
    """Which two models the headline compares, and where."""
    labels, at, last = figures.labels(results), figures.reference_index(results), results.rows[-1]
    compared = f"{labels[-1]} ({last.precision})"
    if at != len(labels) - 1:
        compared += f" against {labels[at]} ({results.rows[at].precision})"
    machine = results.machine
    return text.plain(f"{compared}, measured on {machine.cpu}, {text.plural(machine.cores, 'core')}")


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


def _trust(results: Results) -> str:
    if not figures.settings(results):
        return ""
    setting = figures.main_setting(results)
    shown = None if setting is None else figures.repeat_in(results, setting)
    shown = shown or next(iter(results.repeats), None)
    if shown is None:
        return "Not checked: the reference was not measured against itself, so the machine's noise is not known."
    load = figures.load_words(shown.batch_size, shown.threads)
    return (
        f"The reference against itself: {shown.ratio.value:.2f}× "
        f"(95 % interval {text.factor_span(shown.ratio.low, shown.ratio.high)}, {load})."
    )


def _caution(results: Results) -> str:
    loads = [figures.load_words(one.batch_size, one.threads) for one in results.repeats if one.is_noisy]
    if not loads:
        return ""
    where = "in every setting" if len(loads) == len(results.repeats) and len(loads) > 1 else f"at {'; '.join(loads)}"
    return (
        f"The machine was too noisy {where}: two equal models did not measure equal closely enough there, "
        "so differences of latency as small as 5 % cannot be told."
    )
