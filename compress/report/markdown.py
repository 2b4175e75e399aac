"""The report as Markdown, in GitHub's flavour."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compress.report import text
from compress.report.summary import Facts, Summary

# An underscore inside a word means nothing in Markdown, and names are full of them.
_SPECIAL = re.compile(r"[\\`*{}\[\]#|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_markdown(summary: Summary) -> str:
    """The whole document."""
    sections = (
        _head(summary),
        _rows(summary),
        _artifact(summary),
        _facts("Warnings", summary.warnings),
        _facts("Notes", summary.notes),
        _reproduce(summary),
        _facts("Machine", summary.machine),
        _facts("What the figures mean", summary.definitions),
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


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    lines = [titles, [align] * len(titles), *rows]
    lines[1] = [":--", *lines[1][1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(summary: Summary) -> Iterable[str]:
    yield f"# {escape(summary.name)}"
    yield f"**{escape(summary.headline)}**"
    yield f"{escape(summary.subject)}, {escape(summary.created)}."
    if summary.verdict is not None:
        yield f"**{escape(summary.verdict.title)}.** {escape(summary.verdict.explanation)}"


def _rows(summary: Summary) -> Iterable[str]:
    yield "## Measured after each stage"
    rows = []
    for line in summary.lines:
        label = f"**{escape(line.label)}**" if line.is_reference else escape(line.label)
        cells = (", ".join((cell.figure, *cell.details)) for cell in line.cells)
        rows.append([f"{label} ({', '.join(line.tags)})", *(escape(cell) for cell in cells)])
    yield _table(["Stage", *(escape(title) for title in summary.columns)], rows, "--:")


def _artifact(summary: Summary) -> Iterable[str]:
    yield "## Artifact"
    if not summary.files:
        yield "Not exported."
        return
    rows = [
        [f"**{escape(file.name)}**" if file.is_model else escape(file.name), escape(file.size), escape(file.sha256)]
        for file in summary.files
    ]
    yield _table(["File", "Size", "SHA-256"], rows, ":--")
    if summary.checks:
        yield _list(summary.checks)


def _facts(title: str, facts: Facts) -> Iterable[str]:
    if facts:
        yield f"## {title}"
        yield _list(facts)


def _list(facts: Facts) -> str:
    return "\n".join(f"- **{escape(term)}:** {escape(value)}" for term, value in facts)


def _reproduce(summary: Summary) -> Iterable[str]:
    yield "## How to reproduce"
    yield fenced(summary.command, "sh")
    yield _list(summary.conditions)
    yield "The digests of the checkpoints tell whether two runs agree."
    yield "<details>\n<summary>Settings, every default spelled out</summary>"
    yield fenced(summary.settings_json, "json")
    yield "</details>"
    yield "<details>\n<summary>Checkpoints</summary>"
    rows = [[escape(value) for value in checkpoint] for checkpoint in summary.checkpoints]
    yield _table(["Stage", "Folder", "Digest"], rows, ":--")
    yield "</details>"
