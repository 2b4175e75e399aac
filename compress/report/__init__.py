"""The report of a run: a pure function of its `Results`, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from compress.files import write_file
from compress.report.html import render_html
from compress.report.markdown import render_markdown
from compress.report.summary import summarize
from compress.results import Results


def write_report(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into `folder` and return their paths.

    Both are rendered before either is written, so results that cannot be rendered leave an old report as it was.

    Raises:
        CompressError: where the folder cannot be written.
    """
    summary = summarize(results)
    contents = {
        folder / "report.md": render_markdown(summary),
        folder / "report.html": render_html(summary, results),
    }
    for path, content in contents.items():
        write_file(path, content.encode())
    markdown, html = contents
    return markdown, html
