"""Runs against each other as one self-contained page: no script, no external request. The terminal shares its words."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from compress.comparison.conditions import Verdict
from compress.comparison.records import Compared, Difference, ModelFigures, RunFigures, Setting, Time
from compress.measured import Accuracy
from compress.report import text
from compress.report.compare_chart import SIGNS, draw_fronts, style_of
from compress.report.figures import load_words
from compress.report.html import page_environment, page_style
from compress.report.sections.parts import Cell, Facts, Line, Table

OTHER_MACHINE = "other machine"
BASELINE = "baseline"
PAIRED = (
    "paired interval: the answers to the same samples were compared one by one; of two models of different runs without "
    "the labels, so that it is rather too wide than too narrow"
)
NOT_IN_TURNS = (
    "Latencies of different runs were not taken in turns, so that a drift of the machine between them counts in full; "
    "compress bench measures models together."
)
AS_FAR_AS_REPEATS = (
    "The interval of a ratio of times reaches at least as far as that of a run's reference against itself (A/A)."
)


@dataclass(frozen=True)
class Legend:
    """A run's mark in the charts."""

    sign: str
    style: int
    """Number of its colour, from 1."""
    name: str


@dataclass(frozen=True)
class Page:
    """What the page says, as text."""

    title: str
    subject: str
    verdict: Verdict | None
    runs: Table
    models: Table
    legend: tuple[Legend, ...]
    origins: tuple[tuple[str, Facts], ...]
    """Of each run, where it comes from."""


def render_compare(compared: Compared, verdict: Verdict | None = None) -> str:
    """The whole page. Everything but our own stylesheet and drawings is escaped.

    Args:
        compared: what was found.
        verdict: what conditions say of it; None where there are none.
    """
    charts = draw_fronts(compared)
    return (
        page_environment()
        .get_template("compare.html.j2")
        .render(
            page=_page(compared, verdict),
            style=page_style() + _own_style(),
            charts=[Markup(svg) for svg in charts.drawings],  # noqa: S704 (serialized, so escaped, by ElementTree)
            caption=charts.caption,
        )
    )


def _own_style() -> Markup:
    return Markup(resources.files("compress.report").joinpath("compare.css").read_text(encoding="utf-8"))  # noqa: S704


def about_times(compared: Compared) -> str:
    """What ratios of times are worth."""
    return f"{AS_FAR_AS_REPEATS} {NOT_IN_TURNS}" if len(compared.runs) > 1 else AS_FAR_AS_REPEATS


def faster_words(time: Time) -> str:
    """How many times faster than the baseline; none where the interval holds 1."""
    if time.speedup is None or time.speedup_low is None or time.speedup_high is None:
        return BASELINE
    if time.speedup_low <= 1 <= time.speedup_high:
        return "no clear difference"
    return text.times(time.speedup, "faster", "slower", "as fast")


def points_words(difference: Difference | None) -> str:
    """Points against the baseline with their interval."""
    if difference is None:
        return BASELINE
    return f"{text.signed(difference.points)} [{text.signed(difference.low)}, {text.signed(difference.high)}]"


def front_words(model: ModelFigures) -> str:
    """On which Pareto fronts a row lies."""
    on = [word for word, is_on in (("size", model.is_on_size_front), ("latency", model.is_on_latency_front)) if is_on]
    return " and ".join(on) or text.MISSING


def why_unpaired(run: RunFigures) -> str | None:
    """In a sentence, why the points of a run have the wider interval; None where they have not."""
    if run.why_unpaired is None:
        return None
    return f"{text.plain(run.name)}: unpaired interval of the points, because {text.plain(run.why_unpaired)}"


def _page(compared: Compared, verdict: Verdict | None) -> Page:
    names = [text.plain(run.name) for run in compared.runs]
    baseline = text.plain(compared.baseline)
    title = f"{len(names)} runs compared" if len(names) > 1 else f"{names[0]} against its reference"
    return Page(
        title=title,
        subject=f"Baseline: {baseline}. {text.moment(compared.created)}, {text.plain(compared.cpu)}",
        verdict=verdict,
        runs=_runs(compared),
        models=_models(compared),
        legend=tuple(
            Legend(SIGNS[style_of(position)], style_of(position) + 1, name) for position, name in enumerate(names)
        ),
        origins=tuple((text.plain(run.name), _origin(run)) for run in compared.runs),
    )


def _runs(compared: Compared) -> Table:
    settings = list(dict.fromkeys(time.setting for run in compared.runs for time in run.times))
    several = len({(setting.device, setting.backend) for setting in settings}) > 1
    titles = (
        f"Latency, {load_words(setting.batch_size, setting.threads)}"
        + (f", {text.plain(setting.backend)} on {setting.device}" if several else "")
        for setting in settings
    )
    columns = ("Run", "Validation accuracy", "Test accuracy", "Size", *titles, "Model's parameters", "MACs")
    lines = tuple(
        Line(
            label=text.plain(run.name),
            cells=(
                _accuracy(run.accuracy.validation, run.validation),
                _accuracy(run.accuracy.test, run.test),
                _size(run),
                *(_time(run, setting) for setting in settings),
                Cell(f"{run.parameters:,}"),
                Cell(text.count(run.macs)),
            ),
            tags=(text.plain(run.stage), text.plain(run.precision)),
            is_reference=run.validation is None,
        )
        for run in compared.runs
    )
    caption = (
        f"The last row of every run, with 95 % intervals; points, ratios and what is faster are against "
        f"{text.plain(compared.baseline)}."
    )
    if settings:
        caption += f" {about_times(compared)}"
    return Table(caption, columns, lines)


def _accuracy(accuracy: Accuracy, difference: Difference | None) -> Cell:
    details = [text.span(accuracy.low, accuracy.high), f"{accuracy.correct:,} of {accuracy.n:,}"]
    if difference is not None:
        kind = "paired" if difference.is_paired else "unpaired"
        details += [
            f"{text.signed(difference.points)} points",
            f"{kind} {text.signed_span(difference.low, difference.high)}",
        ]
    return Cell(text.percent(accuracy.percent), tuple(details))


def _size(run: RunFigures) -> Cell:
    ratio = () if run.size_ratio is None else (text.times(run.size_ratio, "smaller", "larger", "same size"),)
    return Cell(text.size(run.size_bytes), (*ratio, f"{text.size(run.gzip_bytes)} gzipped"))


def _time(run: RunFigures, setting: Setting) -> Cell:
    time = next((time for time in run.times if time.setting == setting), None)
    if time is None:
        return Cell(text.MISSING, () if run.is_same_machine else (OTHER_MACHINE,))
    details = [text.span(time.low_ms, time.high_ms, text.decimals_of(time.median_ms))]
    if time.speedup_low is not None and time.speedup_high is not None:
        details += [faster_words(time), text.factor_span(time.speedup_low, time.speedup_high)]
    return Cell(text.milliseconds(time.median_ms), tuple(details))


def _models(compared: Compared) -> Table:
    has_times = any(model.time is not None for model in compared.models)
    lines = tuple(
        Line(
            label=text.plain(model.stage),
            cells=(
                Cell(text.plain(model.precision)),
                Cell(text.percent(model.accuracy.validation.percent)),
                Cell(text.percent(model.accuracy.test.percent)),
                Cell(text.size(model.size_bytes)),
                *((Cell(text.MISSING if model.time is None else text.milliseconds(model.time.median_ms)),) * has_times),
                Cell(front_words(model)),
            ),
            tags=(text.plain(model.run), *((BASELINE,) if model.is_baseline else ())),
            is_reference=model.is_baseline,
        )
        for model in compared.models
    )
    columns = ("Row", "Type", "Validation", "Test", "Size", *(("Latency",) if has_times else ()), "Pareto front")
    caption = (
        "Every row of every run. On a front lies what no other row beats: none is as small (or as fast) and as accurate on "
        "validation, and better in one of the two."
    )
    return Table(caption, columns, lines, words=("Type", "Pareto front"))


def _origin(run: RunFigures) -> Facts:
    facts = [
        ("Made", text.moment(run.created)),
        ("Commit", text.plain(run.git_revision or "not under git")),
        (
            "Machine",
            text.plain(run.cpu) + ("" if run.is_same_machine else f": {OTHER_MACHINE}, its times are not compared"),
        ),
    ]
    if run.why_unpaired is not None:
        facts.append(("Points", f"unpaired interval, because {text.plain(run.why_unpaired)}"))
    elif run.validation is not None:
        facts.append(("Points", PAIRED))
    if run.is_budget_met is not None:
        facts.append(("Its budget", "met" if run.is_budget_met else "missed"))
    return tuple(facts)
