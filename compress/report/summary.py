"""What the report says, as text and in order. The Markdown and the HTML page only lay it out."""

from __future__ import annotations

from dataclasses import dataclass

from compress.report.sections import reproduce as origin
from compress.report.sections.changed import Changed, changed
from compress.report.sections.groups import Groups, groups
from compress.report.sections.head import Head, head
from compress.report.sections.layers import Layers, layers
from compress.report.sections.parts import Facts
from compress.report.sections.quality import Answers, answers
from compress.report.sections.stages import Stages, stages
from compress.results import Results


@dataclass(frozen=True)
class Summary:
    """The whole report as text."""

    head: Head
    stages: Stages
    groups: tuple[Groups, ...]
    layers: Layers
    answers: Answers
    changed: Changed | None
    files: tuple[origin.File, ...]
    checks: Facts
    warnings: Facts
    notes: Facts
    reproduce: origin.Reproduce
    definitions: Facts = origin.DEFINITIONS


def summarize(results: Results) -> Summary:
    """Everything the report says about `results`."""
    return Summary(
        head=head(results),
        stages=stages(results),
        groups=groups(results),
        layers=layers(results),
        answers=answers(results),
        changed=changed(results),
        files=origin.files(results),
        checks=origin.checks(results),
        warnings=origin.warnings(results),
        notes=origin.notes(results),
        reproduce=origin.reproduce(results),
    )
