"""How a run looks on a terminal, and how in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from compress.events import EpochResult
from compress.results import Results

_LOG_EVERY_SECONDS = 15.0
_LOG_WIDTH = 1000


def literal(text: str) -> str:
    """Text to be shown as it is: no markup in it counts, and control codes cannot rule the terminal."""
    return escape("".join(character if character.isprintable() or character in "\n\t" else "�" for character in text))


def make_console(*, stderr: bool = False) -> Console:
    """A console that colours nothing by itself and, where it is no terminal, cuts and wraps nothing."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


class Terminal:
    """A `Progress` for people: finished stages scroll by, the running one is live below them.

    Where the output is no terminal, each event is one plain line and bars are left out.
    """

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self._console = console
        self._bars = Bars(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._live = (
            Live(self._bars, console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._last_log = 0.0
        self._work_started = time.monotonic()
        self._what = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, emoji=False, soft_wrap=not self._console.is_terminal)

    def stage_started(self, name: str, position: int, total: int, reason: str) -> None:
        """A heading with the reason."""
        self._stage = name
        self._print(f"[bold]{position}/{total} {literal(name)}[/bold]  [dim]{literal(reason)}[/dim]")

    def stage_cached(self, name: str, position: int, total: int) -> None:
        """One line."""
        self._print(f"[bold]{position}/{total} {literal(name)}[/bold]  [green]cached[/green]")
        self._stage = ""

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """One line with what bench measured."""
        self._drop_bar()
        self._print(f"  [green]{literal(name)} done[/green] in {_duration(seconds)}: {literal(summary)}")
        self._stage = ""

    def work(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar; in a log, a line now and then."""
        if what != self._what:
            self._what, self._work_started, self._last_log = what, time.monotonic(), time.monotonic()
            self._drop_bar()
        elapsed = time.monotonic() - self._work_started
        rate = f"{done / elapsed:,.1f}/s" if elapsed > 0.2 else ""
        if self._live is not None:
            label = f"{self._stage}{': ' if self._stage else ''}{what}{f' ({detail})' if detail else ''}"
            shown: dict[str, Any] = {
                "description": literal(label),
                "completed": done,
                "total": total or None,
                "count": f"{done}/{total}" if total else str(done),
                "rate": rate,
            }
            if self._task is None:
                self._task = self._bars.add_task(**shown)
            self._bars.update(self._task, **shown)
            if done == total:
                self._drop_bar()
        elif time.monotonic() - self._last_log > _LOG_EVERY_SECONDS:
            self._last_log = time.monotonic()
            count = f"{done}{f' of {total}' if total else ''}"
            self._print(f"  {literal(what)}: {count} {rate} {literal(detail)}".rstrip())

    def epoch(self, result: EpochResult) -> None:
        """A line per epoch: loss, accuracy, rate, time left."""
        self._drop_bar()
        left = (result.epochs - result.epoch) * result.seconds
        self._print(
            f"  epoch {result.epoch:>3}/{result.epochs}  loss {result.loss:.4f}  "
            f"validation {result.validation_percent:6.2f} %  {result.samples_per_second:,.0f} samples/s  "
            f"{_duration(result.seconds)}, {_duration(left)} left"
        )

    def note(self, text: str) -> None:
        """A line."""
        self._print(f"  {literal(text)}")

    def warn(self, text: str) -> None:
        """A line that stands out."""
        self._drop_bar()
        self._print(f"  [yellow]warning:[/yellow] {literal(text)}")

    def _drop_bar(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def results_table(results: Results) -> RenderableType:
    """The rows of a run as a table for the terminal."""
    table = Table(title=literal(results.name), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "validation %", "test %", "parameters", "M MACs", "size KB"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    settings = [(entry.batch_size, entry.threads) for entry in results.rows[-1].latency]
    for batch_size, threads in settings:
        table.add_column(f"ms, batch {batch_size}, {threads} thr.", justify="right")
    for row in results.rows:
        marked = f"{row.stage} (reference)" if row.stage == results.reference else row.stage
        times = {(entry.batch_size, entry.threads): entry.median_ms for entry in row.latency}
        table.add_row(
            literal(marked),
            f"{row.accuracy.validation.percent:.2f}",
            f"{row.accuracy.test.percent:.2f}",
            f"{row.parameters:,}",
            f"{row.macs / 1e6:.2f}",
            f"{row.size_bytes / 1e3:,.1f}",
            *(f"{times[setting]:.3f}" if setting in times else "—" for setting in settings),
        )
    said = [*_ratios(results), *_repeats(results)]
    return Group(table, *(Text(line) for line in said))


def _ratios(results: Results) -> Iterator[str]:
    reference, last = results.reference_row(), results.rows[-1]
    if reference is last:
        return
    from compress.report import figures, text  # with what draws the report, which no other command needs

    parts = [text.times(figures.smaller(last, reference), "smaller", "larger", "same size")]
    for entry in last.latency:
        if entry.ratio is not None:
            load = f"at batch {entry.batch_size} with {text.plural(entry.threads, 'thread')}"
            repeat = figures.repeat_in(results, figures.Setting.of(entry))
            parts.append(f"{figures.speed(entry.ratio, repeat)} ({figures.speed_span(entry.ratio, repeat)}) {load}")
    points = last.accuracy.test.percent - reference.accuracy.test.percent
    parts.append(f"{points:+.2f} points on test")
    yield f"against '{text.plain(reference.stage)}': {', '.join(parts)}"


def _repeats(results: Results) -> Iterator[str]:
    """The reference against itself, and where that is too noisy."""
    from compress.report import text

    if not results.repeats:
        return
    parts = [
        f"{one.ratio.value:.3f}× ({one.ratio.low:.3f}× to {one.ratio.high:.3f}×) "
        f"at batch {one.batch_size} with {text.plural(one.threads, 'thread')}{', too noisy' if one.is_noisy else ''}"
        for one in results.repeats
    ]
    yield f"'{text.plain(results.reference)}' against itself: {'; '.join(parts)}"
    if any(one.is_noisy for one in results.repeats):
        yield "caution: where it was too noisy, differences of latency as small as 5 % cannot be told"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
