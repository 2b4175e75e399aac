"""The report as Markdown, in GitHub's flavour: the figures that a pull request needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.report import text
from compress.report.charts.kinds import words
from compress.report.sections.parts import Facts, Table
from compress.report.summary import Summary

# An underscore inside a word means nothing in Markdown, and names are full of them.
_SPECIAL = re.compile(r"[\\`*{}\[\]#|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_markdown(summary: Summary) -> str:
    """The whole document."""
    sections = (
        _head(summary),
        _stages(summary),
        _quality(summary),
        _groups(summary),
        _nodes(summary),
        _sensitivities(summary),
        _artifact(summary),
        _facts("Warnings", summary.warnings),
        _facts("Notes", summary.notes),
        _reproduce(summary),
    )
    return "\n\n".join(block for section in sections for block in section) + "\n"


def escape(value: str) -> str:
    """Text that no Markdown reader takes for markup, in a table cell or out of one."""
    line = text.plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", line)


def fenced(content: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def table(content: Table) -> str:
    """A table: figures to the right, what qualifies them in lines below."""
    align = [":--" if index == 0 or title in content.words else "--:" for index, title in enumerate(content.columns)]
    rows = []
    for line in content.lines:
        label = f"**{escape(line.label)}**" if line.is_reference else escape(line.label)
        tags = f" ({escape(', '.join(line.tags))})" if line.tags else ""
        rows.append([label + tags, *("<br>".join(map(escape, (cell.figure, *cell.details))) for cell in line.cells)])
    return _grid([escape(title) for title in content.columns], align, rows)


def _grid(titles: Sequence[str], align: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, align, *rows))


def _folded(title: str, *blocks: str) -> Iterable[str]:
    yield f"<details>\n<summary>{title}</summary>"
    yield from blocks
    yield "</details>"


def _head(summary: Summary) -> Iterable[str]:
    head = summary.head
    yield f"# {escape(head.name)}"
    yield f"**{escape(head.headline)}**"
    yield f"{escape(head.subject)}, {escape(head.created)}."
    if head.verdict is not None:
        yield f"**{escape(head.verdict.title)}.** {escape(head.verdict.explanation)}"
    if head.caution:
        yield f"**Latency: caution.** {escape(head.caution)}"
    if head.trust:
        yield escape(head.trust)


def _stages(summary: Summary) -> Iterable[str]:
    yield "## Stage by stage"
    yield table(summary.stages.table)
    if summary.stages.latency is not None:
        yield from _folded("Latency in every setting", table(summary.stages.latency))
    if summary.stages.start is not None:
        yield from _folded("Start, memory and slow calls", table(summary.stages.start))
    if summary.stages.repeats is not None:
        yield from _folded("The reference against itself", table(summary.stages.repeats))


def _quality(summary: Summary) -> Iterable[str]:
    yield "## Quality of the answers"
    yield escape(summary.answers.sentence)
    if summary.changed is not None:
        yield escape(summary.changed.counted)
    yield from _folded("All measures", table(summary.answers.overall))


def _groups(summary: Summary) -> Iterable[str]:
    for one in summary.groups:
        yield f"## What each group of channels costs: {escape(one.label)}"
        yield f"{escape(one.table.caption)} {escape(one.table.rest)}".rstrip()
        yield from _folded("Groups that lose most", table(one.table))


def _nodes(summary: Summary) -> Iterable[str]:
    if not summary.layers.bars:
        return
    yield "## Time by operator"
    yield "\n".join(f"- **{escape(bar.label)}:** {escape(words(bar))}" for bar in summary.layers.bars)
    yield from _folded("Operators", *(table(operators) for _, operators in summary.layers.operators))


def _sensitivities(summary: Summary) -> Iterable[str]:
    found = summary.layers.sensitivities
    if found is None:
        return
    yield "## Sensitivity to int8"
    yield f"{escape(found.caption)} {escape(found.rest)}"
    yield escape(summary.layers.advice)
    yield from _folded("Layers that lose most", table(found))


def _artifact(summary: Summary) -> Iterable[str]:
    yield "## Artifact"
    if not summary.files:
        yield "Not exported."
        return
    rows = [
        [f"**{escape(file.name)}**" if file.is_model else escape(file.name), escape(file.size), escape(file.sha256)]
        for file in summary.files
    ]
    yield _grid(["File", "Size", "SHA-256"], [":--", "--:", ":--"], rows)
    if summary.checks:
        yield _list(summary.checks)


def _facts(title: str, facts: Facts) -> Iterable[str]:
    if facts:
        yield f"## {title}"
        yield _list(facts)


def _list(facts: Facts) -> str:
    return "\n".join(f"- **{escape(term)}:** {escape(value)}" for term, value in facts)


def _reproduce(summary: Summary) -> Iterable[str]:
    origin = summary.reproduce
    yield "## How to reproduce"
    yield fenced(origin.command, "sh")
    yield _list((*origin.conditions, *origin.machine))
    yield "The digests of the checkpoints tell whether two runs agree."
    yield from _folded("Settings, every default spelled out", fenced(origin.settings_json, "json"))
    rows = [[escape(value) for value in checkpoint] for checkpoint in origin.checkpoints]
    yield from _folded("Checkpoints", _grid(["Stage", "Folder", "Digest"], [":--"] * 3, rows))
    yield from _folded("What the figures mean", _list(summary.definitions))
