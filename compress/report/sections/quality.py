"""What the answers are worth beyond top-1 accuracy: means, classes, confusions; the reference beside the last row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.measured import ClassScore, PairedDifference, Quality
from compress.report import figures, text
from compress.report.sections.parts import Cell, Line, Table, cells
from compress.results import Results, Row

DRAWN = 20
"""Most classes whose confusions are drawn as a matrix; of more, the commonest are listed."""
LISTED = 12
"""Confusions, and classes of many, that are named."""
MOST = 1000
"""Lines of a table of all classes."""
NAME_LENGTH = 40
HEAD_LENGTH = 14
"""Of a name above a column of the matrix."""
NARROW = 3
"""Length of names up to which they need not be turned."""


@dataclass(frozen=True)
class Heat:
    """A cell of a confusion matrix."""

    count: int
    strength: int
    """Percent of colour."""
    is_right: bool


@dataclass(frozen=True)
class Matrix:
    """How often each class (a line) gets each answer (a column)."""

    caption: str
    heads: tuple[str, ...]
    """Classes as columns: short."""
    is_narrow: bool
    """Whether they fit above their columns as they are."""
    lines: tuple[tuple[str, tuple[Heat, ...]], ...]


@dataclass(frozen=True)
class Answers:
    """The quality of the answers."""

    sentence: str
    """The most telling figures."""
    overall: Table
    classes: Table
    """All, or of many those that lost most."""
    all_classes: Table | None
    matrices: tuple[Matrix, ...]
    confusions: Table | None
    """The commonest, where a matrix would be too large."""


def answers(results: Results) -> Answers:
    """Quality of the reference and of the last row; of one where they are the same."""
    compared = _compared(results)
    count = len(compared[-1][1].quality.validation.classes)
    is_large = count > DRAWN
    return Answers(
        sentence=_sentence(results),
        overall=_overall(results, compared),
        classes=_classes(results, compared, LISTED if is_large else MOST),
        all_classes=_classes(results, compared, MOST) if is_large else None,
        matrices=() if is_large else tuple(_matrices(results, compared)),
        confusions=_confusions(results, compared) if is_large else None,
    )


def class_name(results: Results, index: int) -> str:
    """Name of a class, safe to show."""
    if 0 <= index < len(results.classes):
        return text.short(text.plain(results.classes[index]), NAME_LENGTH) or f"class {index}"
    return f"class {index}"


def _compared(results: Results) -> list[tuple[str, Row]]:
    labels, at = figures.labels(results), figures.reference_index(results)
    return [(labels[index], results.rows[index]) for index in sorted({at, len(labels) - 1})]


def _sentence(results: Results) -> str:
    quality, difference = results.rows[-1].quality.validation, results.difference
    parts = [f"macro F1 {text.percent(quality.f1)}", f"calibration error {quality.calibration_error:.2f} points"]
    if quality.top5 is not None:
        parts.insert(0, f"top-5 {text.percent(quality.top5.percent)}")
    if difference is not None:
        parts.append(f"same answer as the reference on {text.percent(difference.agreement)}")
    return f"On validation: {', '.join(parts)}."


def _overall(results: Results, compared: list[tuple[str, Row]]) -> Table:
    splits: tuple[tuple[str, Callable[[Row], Quality]], ...] = (
        ("validation", lambda row: row.quality.validation),
        ("test", lambda row: row.quality.test),
    )
    measured = [(f"{label}, {split}", of(row)) for split, of in splits for label, row in compared]
    metrics: tuple[tuple[str, Callable[[Quality], str]], ...] = (
        (
            "Top-5 accuracy",
            lambda quality: text.MISSING if quality.top5 is None else text.percent(quality.top5.percent),
        ),
        ("F1, mean of the classes", lambda quality: text.percent(quality.f1)),
        ("Precision, mean of the classes", lambda quality: text.percent(quality.precision)),
        ("Recall, mean of the classes", lambda quality: text.percent(quality.recall)),
        ("Calibration error, points", lambda quality: f"{quality.calibration_error:.2f}"),
        ("Evaluation, samples per second", lambda quality: text.rate(quality.samples_per_second)),
    )
    lines = [Line(title, cells(*(words(quality) for _, quality in measured))) for title, words in metrics]
    if all(quality.top5 is None for _, quality in measured):
        lines = lines[1:]
    comparison = results.rows[-1].comparison
    if comparison is not None:
        both = (comparison.validation, comparison.test)
        compare: tuple[tuple[str, Callable[[PairedDifference], str]], ...] = (
            ("Same answer as the reference", lambda difference: text.percent(difference.agreement)),
            ("Right only in the reference", lambda difference: f"{difference.only_reference_correct:,}"),
            ("Right only in the result", lambda difference: f"{difference.only_artifact_correct:,}"),
            ("Chance of such a split (McNemar)", lambda difference: text.p_value(difference.p_value)),
        )
        for title, told in compare:
            shown = [words for difference in both for words in (text.MISSING, told(difference))]
            lines.append(Line(title, cells(*shown)))
    caption = "Quality of the answers" + (", the reference before, the result after." if comparison else ".")
    return Table(caption, ("Measure", *(title for title, _ in measured)), tuple(lines))


def _classes(results: Results, compared: list[tuple[str, Row]], most: int) -> Table:
    scores = [row.quality.validation.classes for _, row in compared]
    before, after = scores[0], scores[-1]
    order = list(range(len(after)))
    is_cut = most < len(order)
    if is_cut:  # those that lost most
        order.sort(key=lambda index: (after[index].f1 - before[index].f1, after[index].f1))
        order = order[:most]
    lines = tuple(_class(class_name(results, index), [of[index] for of in scores]) for index in order)
    caption = "Each class on validation" + (", before → after, percent." if len(compared) > 1 else ", percent.")
    rest = ""
    if is_cut:
        caption = (
            f"The {len(order)} of {len(after):,} classes whose F1 lost most on validation, before → after, percent."
        )
        if len(compared) == 1:
            caption = f"The {len(order)} of {len(after):,} classes with the lowest F1 on validation, percent."
        if len(order) == MOST:
            rest = "All classes stand in results.json."
    return Table(caption, ("Class", "Samples", "Recall", "Precision", "F1"), lines, rest=rest)


def _class(name: str, scores: list[ClassScore]) -> Line:
    def both(of: Callable[[ClassScore], float]) -> Cell:
        first, last = of(scores[0]), of(scores[-1])
        if f"{first:.1f}" == f"{last:.1f}":
            return Cell(f"{last:.1f}")
        return Cell(f"{first:.1f} → {last:.1f}", (f"{text.signed(last - first, 1)} points",))

    figures_of = (both(lambda score: score.recall), both(lambda score: score.precision), both(lambda score: score.f1))
    return Line(name, (Cell(f"{scores[-1].n:,}"), *figures_of))


def _matrices(results: Results, compared: list[tuple[str, Row]]) -> list[Matrix]:
    matrices = []
    for label, row in compared:
        quality = row.quality.validation
        if quality.confusion is None:
            continue
        counts = {(truth, answer): samples for truth, answer, samples in quality.confusion}
        names = [class_name(results, index) for index in range(len(quality.classes))]
        lines = []
        for truth, name in enumerate(names):
            whole = max(1, quality.classes[truth].n)
            line = [(counts.get((truth, answer), 0), truth == answer) for answer in range(len(names))]
            lines.append(
                (name, tuple(Heat(count, _strength(count / whole, is_right), is_right) for count, is_right in line))
            )
        heads = tuple(text.short(name, HEAD_LENGTH) for name in names)
        caption = f"{label}: a line is the right class, a column the answer; an empty cell is 0."
        matrices.append(Matrix(caption, heads, max(map(len, heads)) <= NARROW, tuple(lines)))
    return matrices


def _strength(share: float, is_right: bool) -> int:
    """Percent of colour of a cell, at most 40, which leaves its text readable. Few errors are seen like many hits."""
    if share <= 0:
        return 0
    return round(10 + 30 * min(1.0, share if is_right else 5 * share))


def _confusions(results: Results, compared: list[tuple[str, Row]]) -> Table | None:
    counted = [row.quality.validation.confusion for _, row in compared]
    if any(confusion is None for confusion in counted):
        return None
    of = [{(truth, answer): samples for truth, answer, samples in confusion or ()} for confusion in counted]
    wrong = {pair for counts in of for pair in counts if pair[0] != pair[1]}
    ranked = sorted(wrong, key=lambda pair: (-of[-1].get(pair, 0), -of[0].get(pair, 0), pair))[:LISTED]
    if not ranked:
        return None
    lines = tuple(
        Line(
            class_name(results, truth),
            cells(class_name(results, answer), *(f"{counts.get((truth, answer), 0):,}" for counts in of)),
        )
        for truth, answer in ranked
    )
    columns = ("Right class", "Answered", *(label for label, _ in compared))
    rest = f"{len(wrong):,} pairs of classes are confused at least once." if len(wrong) > LISTED else ""
    return Table("The commonest confusions on validation.", columns, lines, words=("Answered",), rest=rest)
