"""`compress robustness`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Optional

import typer
from pydantic import ValidationError

from compress.config.robustness import ATTACKS, RobustnessConfig
from compress.errors import CompressError
from compress.terminal.arguments import (
    INTERRUPTED,
    HtmlFile,
    JsonFile,
    Overrides,
    Targets,
    print_place,
    write_json,
)
from compress.terminal.console import make_console

HELP: Final = (
    "Measure how accurate models stay under noise, blur, compression, occlusion and the like, and under attacks (FGSM, PGD)."
    "\n\nEvery model answers exactly the same corrupted samples, by its ONNX file. Attacks need gradients: a file without them "
    "is shown the images that fool its checkpoint's float weights, or else the first model that has gradients (a transfer "
    "attack; the table says so). Accuracies have 95 % intervals, differences from the first model paired ones."
    "\n\nWhat a run on digits was measured on is known; for other data name the pipeline file."
    "\n\n[bold]compress robustness runs/resnet_mobile --pipeline my.yaml --html robustness.html[/bold]"
    "\n\n[bold]compress robustness teacher/ student/ student.int8.onnx --pipeline my.yaml --corruption jpeg,gaussian_noise "
    "--attack none[/bold]"
)
_ALL, _NONE = "all", "none"
_DEFAULT = RobustnessConfig()
_DEVICE = "cpu"
_SEVERITIES = ",".join(map(str, _DEFAULT.severities))
_EPSILONS = ",".join(f"{epsilon:g}" for epsilon in _DEFAULT.epsilons)


def _told(name: str) -> str:
    return str(RobustnessConfig.model_fields[name].description)


def robustness(
    targets: Targets,
    pipeline: Annotated[
        Optional[Path],  # noqa: UP045  # typer reads this annotation at run time
        typer.Option(
            "--pipeline", metavar="FILE", help="Measure on the data of this pipeline file.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option("--split", metavar="test|validation", help=_told("split"))] = _DEFAULT.split,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help=_told("samples"))] = _DEFAULT.samples,
    corruption: Annotated[
        str,
        typer.Option(
            "--corruption",
            metavar="NAME[,NAME]",
            help="Families, such as gaussian_noise or jpeg; 'all' that the data can have, or 'none'.",
        ),
    ] = _ALL,
    severity: Annotated[str, typer.Option("--severity", metavar="N[,N]", help=_told("severities"))] = _SEVERITIES,
    attack: Annotated[
        str,
        typer.Option("--attack", metavar="fgsm|pgd[,…]", help="Attacks; 'all' where the data has images, or 'none'."),
    ] = _ALL,
    epsilon: Annotated[str, typer.Option("--epsilon", metavar="E[,E]", help=_told("epsilons"))] = _EPSILONS,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help=_told("steps"))] = _DEFAULT.steps,
    restarts: Annotated[int, typer.Option("--restarts", metavar="N", help=_told("restarts"))] = _DEFAULT.restarts,
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda", help="Where attacks are computed; answers are on the CPU.")
    ] = _DEVICE,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run the checkpoints' own model code, which attacks need, and converting what has no ONNX file. It may do "
            "anything.",
        ),
    ] = False,
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure accuracy under corruptions and attacks."""
    from compress.bench.latency import DEVICES
    from compress.terminal.command_line import measuring_command
    from compress.terminal.options import one_of, writable

    config = _config(split, samples, severity, epsilon, steps, restarts)
    place = one_of(device, DEVICES, "--device")
    families, attacks = _names(corruption), _names(attack)
    for name in attacks or ():
        one_of(name, (*ATTACKS, _ALL, _NONE), "--attack")
    writable(json_file, "--json")
    writable(html, "--html")
    if overrides and pipeline is None:
        raise CompressError("--set: changes the file of --pipeline, which is not given")
    if families == () and attacks == ():
        raise CompressError("--corruption and --attack are both 'none': there is nothing to measure")
    from compress.config import load_pipeline

    data = None if pipeline is None else load_pipeline(pipeline, overrides or ())
    from compress.robustness import RobustnessSettings, measure_robustness
    from compress.terminal.console import Terminal
    from compress.terminal.robustness_tables import robustness_tables

    given = {
        "--split": (split, _DEFAULT.split),
        "--samples": (samples, _DEFAULT.samples),
        "--corruption": (corruption, _ALL),
        "--severity": (severity, _SEVERITIES),
        "--attack": (attack, _ALL),
        "--epsilon": (epsilon, _EPSILONS),
        "--steps": (steps, _DEFAULT.steps),
        "--restarts": (restarts, _DEFAULT.restarts),
        "--device": (device, _DEVICE),
    }
    command = measuring_command("robustness", targets, given, pipeline, overrides or (), {"--trust-code": trust_code})
    settings = RobustnessSettings(config, data, families, attacks, place, trust_code, command)
    errors = make_console(stderr=True)
    try:
        # Not where the tables go: whoever reads only their head must not end the measurement.
        with Terminal(errors) as progress:
            results = measure_robustness(targets, settings, progress)
    except KeyboardInterrupt:
        errors.print("\nstopped; nothing was kept")
        raise typer.Exit(INTERRUPTED) from None
    write_json(json_file, results.model_dump(mode="json"))
    if html is not None:
        from compress.files import write_file
        from compress.report.robustness import render_robustness

        write_file(html, render_robustness(results).encode())
    make_console().print(robustness_tables(results))
    print_place("page", html)
    print_place("json", json_file)


def _config(split: str, samples: int, severity: str, epsilon: str, steps: int, restarts: int) -> RobustnessConfig:
    """Options as they were typed, checked; a wrong one is named."""
    from compress.terminal.options import whole_numbers

    options = {
        "split": "--split",
        "samples": "--samples",
        "severities": "--severity",
        "epsilons": "--epsilon",
        "steps": "--steps",
        "restarts": "--restarts",
    }
    given: dict[str, Any] = {
        "split": split,
        "samples": samples,
        "severities": tuple(sorted(whole_numbers(severity, options["severities"]))),
        "epsilons": tuple(sorted(_numbers(epsilon, options["epsilons"]))),
        "steps": steps,
        "restarts": restarts,
    }
    try:
        return RobustnessConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        rule = first["msg"].replace("Input should be", "must be")
        raise CompressError(f"{options[str(first['loc'][0])]}: {rule}, got {first['input']}") from None


def _numbers(text: str, option: str) -> set[float]:
    try:
        return {float(part) for part in text.split(",")}
    except ValueError:
        raise CompressError(
            f"{option}: must be numbers with commas between them, such as 1,2,4,8, got '{text}'"
        ) from None


def _names(text: str) -> tuple[str, ...] | None:
    """Names with commas between them, each once; None for all, () for none."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if names == (_ALL,):
        return None
    return () if names == (_NONE,) else names
