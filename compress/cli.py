"""The command line. Torch is imported only by the commands that need it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from compress import __version__
from compress.console import literal, make_console
from compress.errors import CompressError, ConfigError

app = typer.Typer(
    name="compress",
    help="From a trained PyTorch model to the smallest, fastest ONNX model that still does the job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PipelineFile = Annotated[Path, typer.Argument(metavar="FILE", help="Pipeline file (YAML).", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  # typer reads this annotation at run time
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Lay a setting over the file, such as [bold]stages.prune.target.macs=0.4[/bold]; may be repeated.",
        show_default=False,
    ),
]
RunsFolder = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of all runs.")]
Until = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--until", metavar="STAGE", help="Stop after this stage; 'source' runs none.", show_default=False),
]

BUDGET_MISSED, INTERRUPTED = 1, 130


def main() -> None:
    """Entry point: user errors become one message and exit code 2, bugs keep their traceback."""
    errors = make_console(stderr=True)
    # As `python -m` does, but last: a folder must not hide an installed package.
    sys.path.append(str(Path.cwd()))
    try:
        app(prog_name="compress")
    except ConfigError as error:
        for problem in error.problems:
            errors.print(f"[red]error:[/red] {literal(str(problem))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except CompressError as error:
        errors.print(f"[red]error:[/red] {literal(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version


@app.command()
def run(
    file: PipelineFile,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do every stage anew instead of taking it from the cache.")
    ] = False,
    until: Until = None,
) -> None:
    """Run a pipeline: every stage is cached, measured and reported under [bold]runs/NAME[/bold].

    Ends with exit code 1 where the accuracy budget is missed, 2 where something is wrong with the input.
    """
    from compress.config import load_pipeline

    pipeline = load_pipeline(file, overrides or ())
    console = make_console()
    from compress.console import Terminal, results_table
    from compress.pipeline import run as run_pipeline

    folder = runs / pipeline.name
    try:
        with Terminal(console) as progress:
            results = run_pipeline(
                pipeline,
                runs=runs,
                fresh=fresh,
                until=until,
                progress=progress,
                command=_command(file, overrides, until),
            )
    except KeyboardInterrupt:
        make_console(stderr=True).print(
            f"\nstopped; the same command goes on from {literal(str(folder))}", soft_wrap=True
        )
        raise typer.Exit(INTERRUPTED) from None
    console.print()
    console.print(results_table(results))
    console.print(f"\nreport: {literal(str(folder / 'report.html'))}", soft_wrap=True)
    if results.artifact is not None:
        console.print(f"artifact: {literal(str(folder / 'dist' / results.artifact.model))}", soft_wrap=True)
    budget = results.budget
    if budget is not None and not budget.met:
        make_console(stderr=True).print(
            f"[red]budget missed:[/red] {-budget.difference.points:.2f} points of validation accuracy lost "
            f"(95 % interval {-budget.difference.high:.2f} to {-budget.difference.low:.2f}), "
            f"budget.accuracy_drop allows {budget.accuracy_drop:g}",
            soft_wrap=True,
        )
        raise typer.Exit(BUDGET_MISSED)


@app.command()
def validate(
    file: PipelineFile,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    until: Until = None,
) -> None:
    """Check a pipeline file and show what a run would do, without doing it and without loading torch."""
    from compress.config import load_pipeline
    from compress.config.located import located
    from compress.plan import make_plan

    pipeline = load_pipeline(file, overrides or ())
    with located(pipeline):
        steps = make_plan(pipeline, runs, until=until)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "stage", "plan", "why"):
        table.add_column(heading)
    words = {"cached": "[green]cached[/green]", "run": "[yellow]runs[/yellow]", "follows": "[yellow]runs[/yellow]"}
    for step in steps:
        where = f"{step.reason} ({step.folder})" if step.folder else step.reason
        table.add_row(str(step.planned.position), literal(step.planned.label), words[step.status], literal(where))
    console = make_console()
    console.print(f"{literal(str(file))}: valid", soft_wrap=True)
    console.print(table)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code", help="Run the checkpoint's own model code, to count its parameters. It may do anything."
        ),
    ] = False,
) -> None:
    """Show what a checkpoint holds: architecture, edits, lineage, metrics. Every file is checked."""
    from compress.inspection import describe

    make_console().print(describe(checkpoint, trust_code=trust_code))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/resnet_mobile.", show_default=False)
    ],
) -> None:
    """Write report.md and report.html of a run again from its results.json."""
    from compress.report import write_report
    from compress.results import load_results

    for path in write_report(load_results(run / "results.json"), run):
        typer.echo(path)


@app.command()
def schema() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    from compress.config import Pipeline

    document = Pipeline.model_json_schema(by_alias=True)
    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **document}, indent=2))


def _command(file: Path, overrides: list[str] | None, until: str | None) -> str:
    """The command that repeats a run, without folders of this machine."""
    words = ["compress", "run", file.name if file.is_absolute() else file.as_posix()]
    for override in overrides or ():
        key, _, value = override.partition("=")
        words += ["--set", f"{key}={Path(value).name if Path(value).is_absolute() else value}"]
    if until is not None:
        words += ["--until", until]
    return shlex.join(words)
