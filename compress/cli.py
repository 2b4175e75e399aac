"""The command line. Torch is imported only by the commands that need it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from compress import __version__, machine
from compress.comparison.conditions import FLAGS, QUANTITIES, RELATIONS
from compress.config.pipeline import LatencyConfig
from compress.errors import CompressError, ConfigError
from compress.terminal.arguments import INTERRUPTED, HtmlFile, JsonFile, Overrides, Targets, print_place, write_json
from compress.terminal.console import literal, make_console
from compress.terminal.robustness import HELP as _ROBUSTNESS_HELP
from compress.terminal.robustness import robustness
from compress.terminal.schemas import Document, json_schema

app = typer.Typer(
    name="compress",
    help="From a trained PyTorch model to the smallest, fastest ONNX model that still does the job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PipelineFile = Annotated[Path, typer.Argument(metavar="FILE", help="Pipeline file (YAML).", show_default=False)]
RunsFolder = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of all runs.")]
Until = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--until", metavar="STAGE", help="Stop after this stage; 'source' runs none.", show_default=False),
]
BUDGET_MISSED = CONDITION_HOLDS = NOTHING_MEASURED = 1
_LATENCY = LatencyConfig()
_ROUNDS, _SECONDS = (LatencyConfig.model_fields[name].description for name in ("rounds", "seconds"))
_BATCH_SIZES, _THREADS = (",".join(map(str, numbers)) for numbers in (_LATENCY.batch_sizes, _LATENCY.threads))
_BACKEND, _DEVICE = "onnxruntime", "cpu"

_BENCH_HELP = (
    "Measure models against each other: latency, cold start, memory, size, time by operator and, with data, accuracy.\n\n"
    "Every model runs in a process of its own. The processes take turns in rounds, and the first model takes part twice: "
    "its ratio with itself (A/A) is what the noise of this machine makes of equal things. Times are medians with 95 % "
    "intervals; ratios are taken round by round. Nothing that was timed on another machine, or at another time, is used."
    "\n\nWhat cannot be measured is a row that says why. Ends with exit code 1 where no latency at all could be measured, and "
    "with 2 where something is wrong with the input. The tables go to standard output, progress to standard error."
    "\n\n[bold]compress bench runs/resnet_mobile --batch-size 1,32 --threads 1,2[/bold]"
    "\n\n[bold]compress bench before.onnx after.onnx --backend onnxruntime,openvino --json bench.json[/bold]"
)
_COMPARE_HELP = (
    "Compare runs: accuracy with the interval of the difference, size, latency, and the Pareto fronts over all their rows."
    "\n\nLatency is compared where runs were measured on the same machine with the same libraries. Ends with exit code 1 "
    "where a condition holds, and with 2 where one cannot be told, such as latency on another machine."
    "\n\n[bold]compress compare runs/before runs/after --html compare.html --fail-if 'accuracy_drop>1.0'[/bold]"
)


def main() -> None:
    """Entry point: user errors become one message and exit code 2, bugs keep their traceback."""
    errors = make_console(stderr=True)
    # As `python -m` does, but last: a folder must not hide an installed package.
    sys.path.append(str(Path.cwd()))
    try:
        app(prog_name="compress")
    except CompressError as error:
        where = f" (process {machine.process_number()})" if machine.processes() > 1 else ""
        for problem in error.problems if isinstance(error, ConfigError) else (error,):
            errors.print(f"[red]error{where}:[/red] {literal(str(problem))}", soft_wrap=True)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version
    if machine.processes() > 1 and context.invoked_subcommand != "run":
        raise CompressError(f"compress {context.invoked_subcommand} is for one process: start it without a launcher")


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

    Started by torchrun or accelerate launch, several processes train each stage together.

    Ends with exit code 1 where the accuracy budget is missed, 2 where something is wrong with the input.
    """
    if machine.process_number() > 0:
        _assist()
        return
    from compress.config import load_pipeline
    from compress.terminal.command_line import run_command

    pipeline = load_pipeline(file, overrides or ())
    console = make_console()
    from compress.distributed import joined
    from compress.pipeline import run as run_pipeline
    from compress.terminal.console import Terminal, results_table

    folder = runs / pipeline.name
    try:
        with joined() as group, Terminal(console) as progress:
            results = run_pipeline(
                pipeline,
                runs=runs,
                fresh=fresh,
                until=until,
                progress=progress,
                command=run_command(file, overrides or (), until),
                group=group,
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


def _assist() -> None:
    """What all processes do but the first: it alone reads the pipeline file, writes and shows anything."""
    from compress.distributed import joined
    from compress.making import assist

    try:
        with joined() as group:
            assist(group)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


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
    from compress.terminal.inspection import describe

    make_console().print(describe(checkpoint, trust_code=trust_code))


@app.command(help=_BENCH_HELP)
def bench(
    targets: Targets,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where models run.")] = _DEVICE,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME[,NAME]",
            help="onnxruntime, torch, torch-compile, openvino, tensorrt. What is not installed is a row that says so. PyTorch "
            "runs checkpoints only; on cuda in half precision too.",
        ),
    ] = _BACKEND,
    batch_size: Annotated[str, typer.Option("--batch-size", metavar="N[,N]", help="Samples per call.")] = _BATCH_SIZES,
    threads: Annotated[str, typer.Option("--threads", metavar="N[,N]", help="Threads per model.")] = _THREADS,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help=_ROUNDS)] = _LATENCY.rounds,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help=_SECONDS)] = _LATENCY.seconds,
    shape: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--shape",
            metavar="[NAME=]CxHxW",
            help="Shape of one sample of an input that a file leaves open, without the batch, such as "
            "[bold]image=3x224x224[/bold]; for every model that has an input of that name. A file with one input needs no "
            "name. May be repeated.",
            show_default=False,
        ),
    ] = None,
    pipeline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--pipeline",
            metavar="FILE",
            help="Measure accuracy on the data of this pipeline file. Without it, rows of runs bring what their run measured.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run the checkpoints' own model code, which PyTorch needs, and converting what has no ONNX file. It may do "
            "anything.",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile/--no-profile", help="Time every operator; on the CPU, by ONNX Runtime's own profile."),
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Measure models against each other."""
    from compress.bench.latency import BACKENDS, DEVICES
    from compress.terminal.command_line import measuring_command
    from compress.terminal.options import chosen, input_shapes, latency_config, one_of, writable

    latency = latency_config(batch_size, threads, rounds, seconds)
    backends, place = chosen(backend, BACKENDS, "--backend"), one_of(device, DEVICES, "--device")
    shapes = input_shapes(shape or ())
    writable(json_file, "--json")
    if overrides and pipeline is None:
        raise CompressError("--set: changes the file of --pipeline, which is not given")
    from compress.config import load_pipeline

    data = None if pipeline is None else load_pipeline(pipeline, overrides or ())
    from compress.benchmark import BenchSettings
    from compress.benchmark import bench as measure
    from compress.terminal.bench import bench_tables
    from compress.terminal.console import Terminal

    given = {
        "--device": (device, _DEVICE),
        "--backend": (backend, _BACKEND),
        "--batch-size": (batch_size, _BATCH_SIZES),
        "--threads": (threads, _THREADS),
        "--rounds": (rounds, _LATENCY.rounds),
        "--seconds": (seconds, _LATENCY.seconds),
    }
    flags = {"--trust-code": trust_code, "--no-profile": not profile}
    command = measuring_command("bench", targets, given, pipeline, overrides or (), flags, shape or ())
    settings = BenchSettings(latency, place, backends, data, profile, trust_code, shapes, command)
    errors = make_console(stderr=True)
    try:
        # Not where the tables go: whoever reads only their head must not end the measurement.
        with Terminal(errors) as progress:
            results = measure(targets, settings, progress)
    except KeyboardInterrupt:
        errors.print("\nstopped; nothing was kept")
        raise typer.Exit(INTERRUPTED) from None
    # Before anything is shown: a pipe that closes, or a table that fails, must not lose what took minutes.
    write_json(json_file, results.model_dump(mode="json"))
    console = make_console()
    console.print(bench_tables(results))
    print_place("json", json_file)
    if not any(target.latency for target in results.targets):
        errors.print("[red]nothing measured:[/red] no model has a latency in any setting; the reasons stand above")
        raise typer.Exit(NOTHING_MEASURED)


app.command(help=_ROBUSTNESS_HELP)(robustness)


@app.command(help=_COMPARE_HELP)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, or their results.json. The last row of the first is the baseline; a run alone is compared "
            "with its own reference.",
            show_default=False,
        ),
    ],
    html: HtmlFile = None,
    json_file: JsonFile = None,
    fail_if: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--fail-if",
            metavar="CONDITION",
            help="End with exit code 1 where it holds for a later run, or for the only one, such as "
            "[bold]'accuracy_drop>1.0'[/bold] in quotes; may be repeated. "
            f"What there is: {'; '.join(f'{name}: {what}' for name, what in (QUANTITIES | FLAGS).items())}. "
            f"With {', '.join(RELATIONS)} and a number, but for budget_missed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare runs with each other."""
    from compress.comparison.conditions import judge, parse
    from compress.terminal.options import writable

    conditions = [parse(text) for text in fail_if or ()]
    writable(html, "--html")
    writable(json_file, "--json")
    from compress.comparison import runs as comparing

    compared = comparing.compare(comparing.read_runs(runs))
    verdict = judge(conditions, comparing.figures_of(compared))
    from compress.terminal.compare import compare_tables

    if html is not None:
        from compress.files import write_file
        from compress.report.compare import render_compare

        write_file(html, render_compare(compared, verdict if conditions else None).encode())
    write_json(json_file, compared.model_dump(mode="json"))
    make_console().print(compare_tables(compared))
    print_place("page", html)
    print_place("json", json_file)
    errors = make_console(stderr=True)
    for line in verdict.failed:
        errors.print(f"[red]failed:[/red] {literal(line)}", soft_wrap=True)
    if verdict.unknown:
        raise CompressError("\n".join(verdict.unknown))
    if verdict.failed:
        raise typer.Exit(CONDITION_HOLDS)


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
def schema(
    of: Annotated[
        Document,
        typer.Argument(help="Pipeline files, or what runs, `bench`, `compare` and `robustness` write as JSON."),
    ] = "pipeline",
) -> None:
    """Print the JSON schema of pipeline files, for editors, or of results, for programs: every field described."""
    typer.echo(json.dumps(json_schema(of), indent=2))
