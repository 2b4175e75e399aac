"""Models under corruptions and attacks as one self-contained page: no script, no external request.

The terminal shares its words.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from compress.measured import PairedDifference
from compress.report import text
from compress.report.compare import Legend
from compress.report.compare_chart import SIGNS, style_of
from compress.report.html import page_environment, page_style
from compress.report.robustness_chart import draw_attacks, draw_families
from compress.report.sections.parts import Cell, Facts, Line, Table
from compress.robustness_results import Level, Mean, Robustness, RobustnessResults

FIRST = "first"
TRANSFER = (
    "A transfer attack flatters: its images are the worst for another model, or for the weights before they were "
    "quantized."
)
UPPER_BOUND = "Attacks find an upper bound of what an adversary leaves: a stronger search may find more wrong answers."


@dataclass(frozen=True)
class Page:
    """What the page says, as text."""

    title: str
    subject: str
    overview: Table
    legend: tuple[Legend, ...]
    families: Table | None
    severities: Table | None
    attacks: Table | None
    attack_words: tuple[str, ...]
    definitions: Facts
    reproduce: Facts
    warnings: tuple[str, ...]


def render_robustness(results: RobustnessResults) -> str:
    """The whole page. Everything but our own stylesheet and drawings is escaped."""
    families, attacks = draw_families(results), draw_attacks(results)
    return (
        page_environment()
        .get_template("robustness.html.j2")
        .render(
            page=_page(results),
            style=page_style() + _own_style(),
            families=[Markup(svg) for svg in families.drawings],  # noqa: S704 (serialized, so escaped, by ElementTree)
            families_caption=families.caption,
            attacks=[Markup(svg) for svg in attacks.drawings],  # noqa: S704 (the same)
            attacks_caption=attacks.caption,
        )
    )


def _own_style() -> Markup:
    # The page has the legend and the colours of the comparison of runs.
    return Markup(resources.files("compress.report").joinpath("compare.css").read_text(encoding="utf-8"))  # noqa: S704


def difference_words(difference: PairedDifference | None) -> str:
    """Points against the first model with their interval."""
    if difference is None:
        return text.MISSING
    return f"{text.signed(difference.points)} [{text.signed(difference.low)}, {text.signed(difference.high)}]"


def mean_points_words(mean: Mean) -> str:
    """The same of a mean over several levels."""
    if mean.points is None or mean.points_low is None or mean.points_high is None:
        return text.MISSING
    return f"{text.signed(mean.points)} [{text.signed(mean.points_low)}, {text.signed(mean.points_high)}]"


def drop_words(mean: Mean) -> str:
    """How much of the clean accuracy is lost."""
    return text.MISSING if mean.relative_drop is None else f"{mean.relative_drop:.1f} %"


def epsilon_words(epsilon: float) -> str:
    """The largest change of a pixel."""
    return f"{epsilon:g}/255"


def crafted_words(target: Robustness) -> str:
    """Whose gradients attacked a model."""
    under = target.attacks[0]
    kind = "transfer attack, crafted on" if under.is_transfer else "attacked with the gradients of"
    itself = under.crafted_on == target.name
    return f"{text.plain(target.name)}: {kind} {'itself' if itself else text.plain(under.crafted_on)}"


def attacked_name(target: Robustness) -> str:
    """A model in a table of attacks; marked where its images were crafted on something else."""
    is_transfer = any(under.is_transfer for under in target.attacks)
    return f"{text.plain(target.name)}{' (transfer)' if is_transfer else ''}"


def level_of(target: Robustness, attack: str, epsilon: float) -> Level | None:
    """What a model answered under an attack; None where that could not be made."""
    levels = (level for under in target.attacks if under.attack == attack for level in under.levels)
    return next((level for level in levels if level.level == epsilon), None)


def attacks_of(results: RobustnessResults) -> tuple[str, ...]:
    """Attacks that any model was under, in their order."""
    return tuple(dict.fromkeys(under.attack for target in results.targets for under in target.attacks))


def _page(results: RobustnessResults) -> Page:
    names = _names(results)
    title = f"Robustness of {names[0]}" if len(names) == 1 else f"Robustness of {len(names)} models"
    return Page(
        title=title,
        subject=f"{results.samples:,} samples of {results.split}. {text.moment(results.created)}, "
        f"{text.plain(results.machine.cpu)}",
        overview=_overview(results),
        legend=tuple(
            Legend(SIGNS[style_of(position)], style_of(position) + 1, name) for position, name in enumerate(names)
        ),
        families=_families(results) if results.families else None,
        severities=_severities(results) if results.families else None,
        attacks=_attacks(results) if attacks_of(results) else None,
        attack_words=_attack_words(results),
        definitions=_definitions(results),
        reproduce=_reproduce(results),
        warnings=tuple(map(text.plain, results.warnings)),
    )


def _overview(results: RobustnessResults) -> Table:
    columns = ["Model", "Clean"]
    if results.families:
        columns += ["Corrupted", "Of the clean accuracy lost", "Hardest family"]
    lines = []
    for target in results.targets:
        is_first = target is results.targets[0]
        clean = [text.span(target.clean.low, target.clean.high), f"{target.clean.correct:,} of {target.clean.n:,}"]
        cells = [Cell(text.percent(target.clean.percent), tuple(clean + _paired(target.difference)))]
        if target.mean is not None:
            hardest = min(target.corruptions, key=lambda under: under.mean.percent)
            cells += [
                _mean(target.mean),
                Cell(drop_words(target.mean)),
                Cell(text.percent(hardest.mean.percent), (hardest.family,)),
            ]
        lines.append(Line(text.plain(target.name), tuple(cells), (target.precision,), is_first))
    caption = f"With 95 % intervals; points are against {text.plain(results.targets[0].name)}, on the same samples."
    if results.families:
        caption += " Corrupted is the mean over all families and severities; each image counts once in its interval."
    return Table(caption, tuple(columns), tuple(lines))


def _paired(difference: PairedDifference | None) -> list[str]:
    if difference is None:
        return []
    return [
        f"{text.signed(difference.points)} points",
        f"paired {text.signed_span(difference.low, difference.high)}",
    ]


def _mean(mean: Mean) -> Cell:
    details = [text.span(mean.low, mean.high)]
    if mean.points is not None and mean.points_low is not None and mean.points_high is not None:
        details += [
            f"{text.signed(mean.points)} points",
            f"paired {text.signed_span(mean.points_low, mean.points_high)}",
        ]
    return Cell(text.percent(mean.percent), tuple(details))


def _names(results: RobustnessResults) -> tuple[str, ...]:
    return tuple(text.plain(target.name) for target in results.targets)


def _families(results: RobustnessResults) -> Table:
    lines = tuple(
        Line(info.family, tuple(_mean(target.corruptions[position].mean) for target in results.targets))
        for position, info in enumerate(results.families)
    )
    severities = ", ".join(map(str, results.severities))
    caption = f"Mean accuracy over the severities {severities}, with 95 % intervals."
    return Table(caption, ("Family", *_names(results)), lines)


def _severities(results: RobustnessResults) -> Table:
    lines = tuple(
        Line(
            f"{info.family} {severity}",
            tuple(_level(target.corruptions[position].levels[at]) for target in results.targets),
            (f"{info.strengths[at]:g}",),
        )
        for position, info in enumerate(results.families)
        for at, severity in enumerate(results.severities)
    )
    return Table("Every severity, with its strength and 95 % intervals.", ("Corruption", *_names(results)), lines)


def _level(level: Level | None) -> Cell:
    if level is None:
        return Cell(text.MISSING)
    accuracy = level.accuracy
    return Cell(text.percent(accuracy.percent), (text.span(accuracy.low, accuracy.high), *_paired(level.difference)))


def _attacks(results: RobustnessResults) -> Table:
    lines = tuple(
        Line(
            f"{attack}, ε = {epsilon_words(epsilon)}",
            tuple(_level(level_of(target, attack, epsilon)) for target in results.targets),
        )
        for attack in attacks_of(results)
        for epsilon in results.epsilons
    )
    caption = (
        f"No pixel changes by more than ε (L∞). PGD takes {text.plural(results.steps, 'step')} from "
        f"{text.plural(results.restarts, 'random start')}. {UPPER_BOUND}"
    )
    return Table(caption, ("Attack", *map(attacked_name, results.targets)), lines)


def _attack_words(results: RobustnessResults) -> tuple[str, ...]:
    said = [crafted_words(target) for target in results.targets if target.attacks]
    if any(under.is_transfer for target in results.targets for under in target.attacks):
        said.append(TRANSFER)
    said += [f"{text.plain(each.name)}: no attacks, {text.plain(each.reason)}" for each in results.missing]
    return tuple(said)


def _definitions(results: RobustnessResults) -> Facts:
    return tuple(
        (
            info.family,
            f"{info.what}; {info.unit}: {', '.join(f'{one:g}' for one in info.strengths)} (strengths: {info.source})",
        )
        for info in results.families
    )


def _reproduce(results: RobustnessResults) -> Facts:
    files = "; ".join(f"{text.plain(target.file)} {target.sha256[:12]}" for target in results.targets)
    return (
        ("Command", text.plain(results.command or "called from Python")),
        ("Seed", str(results.seed)),
        ("Commit", text.plain(results.git_revision or "not under git")),
        ("Files", files),
    )
