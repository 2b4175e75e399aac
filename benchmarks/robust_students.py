"""What makes a student robust: the same ResNet-20 taught in five ways, under corruptions, FGSM and PGD.

Each way is a run of a pipeline with one `distill` stage; student, first weights, order of the samples, epochs and optimizer are
the same, only the losses and what is done to the images differ. The students are then measured together by what
`compress robustness` does, on the same corrupted test images; each is attacked with its own gradients (white box).

    plain         labels alone
    distilled     soft labels of the published ResNet-56
    noisy         as distilled, its student sees images with Gaussian noise
    adversarial   labels alone, on attacked images (PGD; Madry et al. 2018)
    robust        as distilled, its student sees attacked images (adversarially robust distillation; Goldblum et al. 2020)

The teacher is no robust one. A killed run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import CompressError, load_pipeline, machine, run
from compress.config.robustness import RobustnessConfig
from compress.events import EpochResult, Silent
from compress.files import readable_json, write_file
from compress.report.robustness import render_robustness
from compress.robustness import RobustnessSettings, measure_robustness
from compress.robustness_results import RobustnessResults

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "robust_students.json"
NAME = "robust_students"
LABELS, SOFT = [{"labels": {"weight": 1.0}}], [{"kd": {"temperature": 4.0, "weight": 0.9}}, {"labels": {"weight": 0.1}}]
# Three steps that can cross the ball, a compromise: the paper's seven cost twice as much.
ATTACKED = {"perturb": {"adversarial": {"epsilon": 4 / 255, "step": 2 / 255, "steps": 3}}}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"losses": LABELS},
    "distilled": {"losses": SOFT},
    "noisy": {"losses": SOFT, "perturb": {"noise": {"std": 0.1}}},
    "adversarial": {"losses": LABELS, **ATTACKED},
    "robust": {"losses": SOFT, **ATTACKED},
}


class Lines(Silent):
    """A line per epoch."""

    def __init__(self, what: str) -> None:
        self._what = what

    def epoch(self, result: EpochResult) -> None:
        """Shows it."""
        told = f"{self._what} epoch {result.epoch}/{result.epochs}: validation {result.validation_percent:.2f} %"
        print(f"{told}, {result.seconds:.1f} s", flush=True)

    def note(self, text: str) -> None:
        """Shows it."""
        print(f"{self._what}: {text}", flush=True)

    warn = note


def document(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline that trains a student in one of the ways."""
    training = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "learning_rate")}
    return {
        "name": NAME,  # one for all: they share the source, and what its teacher answers
        "threads": arguments.threads,
        "device": arguments.device,
        "data": {
            "kind": "arrays",
            "root": str(arguments.data.resolve()),
            # What the published weights were trained with.
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "augment": {"crop": 4, "flip": True},
            "validation": {"from": "train", "size": 5000},
            **({} if arguments.per_class is None else {"per_class": arguments.per_class}),
        },
        "model": {"factory": "cifar:resnet56", "weights": str(arguments.weights.resolve())},
        "stages": [{"distill": {"student": {"factory": "cifar:resnet20"}, **training, **WAYS[way]}}],
        "bench": {"latency": None, "sensitivity": None},
    }


def measure(arguments: argparse.Namespace) -> RobustnessResults:
    """Train what is not trained yet, and measure all students together."""
    students, pipeline = [], None
    for way in WAYS:
        path = arguments.runs / f"{way}.json"
        write_file(path, readable_json(document(way, arguments)))
        pipeline = load_pipeline(path)
        trained = run(pipeline, runs=arguments.runs, progress=Lines(way))
        students.append(arguments.runs / NAME / trained.rows[-1].checkpoint)
    config = RobustnessConfig(samples=arguments.samples, severities=(1, 3, 5), steps=arguments.steps)
    command = shlex.join(["python", "benchmarks/robust_students.py", *_told(arguments)])
    settings = RobustnessSettings(config, pipeline, device=arguments.device, command=command)
    return measure_robustness(students, settings, Lines("robustness"))


def _told(arguments: argparse.Namespace) -> list[str]:
    """What decides about the figures, without folders of this machine."""
    names = ("epochs", "batch_size", "learning_rate", "per_class", "samples", "steps", "threads")
    pairs = ((f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in names)
    return [str(word) for option, value in pairs if value is not None for word in (option, value)]


def table(found: RobustnessResults) -> str:
    """Accuracy in percent, a row per student."""
    attacks = [(attack, level) for attack in ("fgsm", "pgd") for level in found.epsilons]
    heads = ["student", "clean", "noise", "all corruptions"]
    heads += [f"{attack.upper()} {level:g}/255" for attack, level in attacks]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for way, target in zip(WAYS, found.targets, strict=True):
        noise = next(one.mean for one in target.corruptions if one.family == "gaussian_noise")
        cells = [f"{target.clean.percent:.1f} [{target.clean.low:.1f}, {target.clean.high:.1f}]"]
        assert target.mean is not None
        cells += [f"{mean.percent:.1f} [{mean.low:.1f}, {mean.high:.1f}]" for mean in (noise, target.mean)]
        known = {(one.attack, each.level): each.accuracy for one in target.attacks for each in one.levels}
        cells += [f"{known[each].percent:.1f}" for each in attacks]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 as arrays")
    parser.add_argument("--weights", type=Path, required=True, help="cifar10_resnet56.safetensors")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--per-class", type=int, help="training images of each class")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=1000, help="test images")
    parser.add_argument("--steps", type=int, default=10, help="of PGD when measuring")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/robust_students"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--html", type=Path, help="the page of `compress robustness`")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    found = measure(arguments)
    write_file(arguments.out, readable_json(json.loads(found.model_dump_json())))
    if arguments.html:
        write_file(arguments.html, render_robustness(found).encode())
    print(table(found))


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(str(error))
