"""The report as one self-contained page: no script, no external request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report import figures, text
from compress.report.charts.cost import draw_costs
from compress.report.charts.groups import draw_groups
from compress.report.charts.kinds import draw_kinds
from compress.report.charts.training import draw_training
from compress.report.charts.waterfall import draw_waterfalls
from compress.report.sections.groups import Groups
from compress.report.summary import Summary
from compress.results import Results


@dataclass(frozen=True)
class Section:
    """A part of the page, laid out by the template of its name."""

    name: str
    title: str


@dataclass(frozen=True)
class Drawings:
    """Inline SVG, which is serialized, so escaped, by ElementTree."""

    costs: tuple[Markup, ...]
    costs_caption: str
    steps: tuple[Markup, ...]
    training: tuple[tuple[str, str, Markup], ...]
    """Stage, how long it trained, curves."""
    groups: tuple[tuple[Groups, Markup], ...]
    """A stage that measured its groups of channels, and what they cost."""
    kinds: Markup | None


def render_html(summary: Summary, results: Results) -> str:
    """The whole page. Everything but our own stylesheet and drawings is escaped."""
    drawings = _draw(summary, results)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            style=page_style(),
            drawings=drawings,
            sections=tuple(_sections(summary, drawings)),
        )
    )


def page_environment() -> Environment:
    """Templates of pages: everything is escaped, and a name that is not known is an error."""
    return Environment(
        loader=PackageLoader("compress", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def page_style() -> Markup:
    """The stylesheet of all pages."""
    return Markup(resources.files("compress.report").joinpath("report.css").read_text(encoding="utf-8"))  # noqa: S704


def _sections(summary: Summary, drawings: Drawings) -> Iterator[Section]:
    """What the page holds, in order."""
    yield Section("stages", "Stage by stage")
    if summary.warnings:
        yield Section("warnings", "Warnings")
    yield Section("costs", "Accuracy against cost")
    if drawings.steps:
        yield Section("steps", "Where bytes and time went")
    yield Section("quality", "Quality of the answers")
    if summary.changed is not None:
        yield Section("changed", "What was lost")
    if summary.groups:
        yield Section("groups", "What each group of channels costs")
    if not summary.layers.is_empty:
        yield Section("layers", "Layer by layer")
    if drawings.training:
        yield Section("training", "Training")
    yield Section("artifact", "Artifact")
    if summary.notes:
        yield Section("notes", "Notes")
    yield Section("reproduce", "How to reproduce")
    yield Section("definitions", "What the figures mean")


def _draw(summary: Summary, results: Results) -> Drawings:
    costs = draw_costs(results)
    training = []
    for index, (label, row) in enumerate(zip(figures.labels(results), results.rows, strict=True)):
        if row.training:
            seconds = sum(epoch.seconds for epoch in row.training)
            took = f"{text.plural(len(row.training), 'epoch')}, {text.duration(seconds)}"
            training.append((label, took, _markup(draw_training(f"training-{index}", label, row.training))))
    return Drawings(
        costs=tuple(map(_markup, costs.drawings)),
        costs_caption=costs.caption,
        steps=tuple(map(_markup, draw_waterfalls(results))),
        training=tuple(training),
        groups=tuple(
            (one, _markup(draw_groups(f"groups-{index}", one.label, one.found)))
            for index, one in enumerate(summary.groups)
        ),
        kinds=_markup(draw_kinds(summary.layers.bars)) if summary.layers.bars else None,
    )


def _markup(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 (see Drawings)
