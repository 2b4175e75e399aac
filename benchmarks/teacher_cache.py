"""What it saves to ask the teacher once per input, and what it costs in accuracy.

Time: a student is distilled with the teacher asked in every step (`naive`) and with its answers looked up (`cached`), by the
engine of `compress run` in one process, in an order that changes from repeat to repeat. Both do the same steps on as many
augmented images and the same validation. Every repeat begins without a cache: `making` is what its first epoch took longer
than the others, and `pays_after_epochs` how many epochs make up for that. Pictures are random where no --data is given: how long
a step takes does not depend on what they show.

    epoch     seconds per epoch, validation included: the median of a run's epochs but the first
    ratio     naive / cached, repeat by repeat

Accuracy (only with --data and --weights): the same student, from scratch, with fresh augmentation in every epoch and the
teacher asked in every step, and with 1, 4 and 8 augmented views per image taken in turn by the epochs. Each seed has the same
first weights and the same order of images in all of them; differences to fresh augmentation are taken seed by seed, in points
of test accuracy of the epoch that was best on validation. Both splits come from the data's own test set. A budget of few epochs
says little about a long training: the fewer times an image comes, the less it matters that it comes in few versions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from compress import machine
from compress.config import DistillConfig
from compress.config.data import ArraysConfig, Augment, Normalize, Validation
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.errors import CompressError
from compress.events import Silent
from compress.files import readable_json, sha256_of, write_file
from compress.methods.statistics import paired_ratio
from compress.models.factory import Arch
from compress.models.source import make_model
from compress.seeds import derive_seed
from compress.surroundings import git_revision, machine_record
from compress.training import Workplace, evaluate, fit
from compress.training.precision import resolved_precision
from compress.training.taught import TeacherModel, objective_of

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = 10
AUGMENT = Augment(crop=4, flip=True)
# What the published CIFAR-10 weights were trained with.
NORMALIZE = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
VIEWS = (1, 4, 8)
# What an untrained teacher answers about random pictures cannot be learned: at a usual rate that ends as a divergence.
_TIMED_LEARNING_RATE = 1e-4

Rows = Sequence[Mapping[str, float | int]]
Say = Callable[[str, list[dict[str, Any]]], None]


class Notes(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keeps it."""
        self.notes.append(text)


def random_pictures(root: Path, samples: int, validation: int) -> Path:
    """Arrays in the shape of CIFAR-10, all values random."""
    rng = np.random.default_rng(0)
    for split, n in (("train", samples), ("test", 2 * validation)):
        np.save(root / f"{split}_images.npy", rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
        np.save(root / f"{split}_labels.npy", np.arange(n) % CLASSES)
    return root


def data_of(root: Path, per_class: int | None, validation: int) -> Dataset:
    """The data; validation is part of the test set, because the teacher may have seen all of train."""
    config = ArraysConfig(
        kind="arrays",
        root=root,
        normalize=NORMALIZE,
        augment=AUGMENT,
        per_class=per_class,
        validation=Validation.model_validate({"from": "test", "size": validation}),
    )
    return load_data(config, seed=0)


def settings_of(arguments: argparse.Namespace, epochs: int, views: int | None, **others: float) -> DistillConfig:
    """Settings of the student's training; no views: the teacher is asked in every step."""
    return DistillConfig.model_validate(
        {
            "student": {"factory": f"cifar:{arguments.student}"},
            "epochs": epochs,
            "batch_size": arguments.batch_size,
            "precision": arguments.precision,
            "cache": None if views is None else {"views": views},
            **others,
        }
    )


def trained(
    data: Dataset, config: DistillConfig, teacher: TeacherModel, folder: Path, seed: int, device: str
) -> tuple[torch.nn.Module, Rows, list[str]]:
    """A student, its epochs, and what was told meanwhile."""
    told = Notes()
    with tempfile.TemporaryDirectory() as scratch:
        place = Workplace(device, seed, Path(scratch), told, cache=folder)
        student = make_model(Arch(config.student.factory), None, derive_seed(seed, "student"))
        objective = objective_of(student, config, data.for_decisions(), place, at="distill", teachers=[teacher])
        rows = fit(objective, data.for_decisions(), config, place)
    return student, rows, told.notes


def timed(data: Dataset, arguments: argparse.Namespace, teacher: TeacherModel, number: int) -> dict[str, Any]:
    """Both ways, in an order that changes, with an empty cache."""
    ways: dict[str, int | None] = {"naive": None, "cached": 1}
    found: dict[str, Any] = {}
    for way in ways if number % 2 == 0 else reversed(ways):
        with tempfile.TemporaryDirectory() as folder:
            config = settings_of(arguments, arguments.epochs, ways[way], learning_rate=_TIMED_LEARNING_RATE)
            started = time.perf_counter()
            _, rows, notes = trained(data, config, teacher, Path(folder) / "teacher", number, arguments.device)
            total = time.perf_counter() - started
            disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        seconds = [float(row["seconds"]) for row in rows]
        found[way] = {
            "epoch_seconds": statistics.median(seconds[1:]),
            "first_epoch_seconds": seconds[0],
            "total_seconds": total,
            "last_loss": rows[-1]["loss"],
            "disk_bytes": disk,
            "notes": notes,
        }
    return {"repeat": number, **found}


def time_summary(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the repeats say together."""
    naive, cached = ([repeat[way]["epoch_seconds"] for repeat in repeats] for way in ("naive", "cached"))
    making = [repeat["cached"]["first_epoch_seconds"] - repeat["cached"]["epoch_seconds"] for repeat in repeats]
    value, low, high = paired_ratio(naive, cached)
    saved = statistics.median(naive) - statistics.median(cached)
    return {
        "repeats": len(repeats),
        "epoch_seconds": {"naive": statistics.median(naive), "cached": statistics.median(cached)},
        "naive_over_cached": {"value": value, "low": low, "high": high},
        "making_seconds": statistics.median(making),
        "pays_after_epochs": statistics.median(making) / saved if saved > 0 else None,
        "disk_bytes": repeats[-1]["cached"]["disk_bytes"],
    }


def one_accuracy(
    data: Dataset, arguments: argparse.Namespace, teacher: TeacherModel, folder: Path, seed: int, views: int | None
) -> dict[str, Any]:
    """A student's accuracy, and how long it took."""
    config = settings_of(arguments, arguments.accuracy_epochs, views)
    student, rows, _ = trained(data, config, teacher, folder, seed, arguments.device)
    student.to(arguments.device)
    _, correct = evaluate(student, data.test, arguments.device)
    return {
        "seed": seed,
        "views": views,
        "test_percent": 100.0 * correct / len(data.test),
        "validation_percent": max(row["validation_percent"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def accuracy_summary(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per way; differences to fresh augmentation, of the seeds that have both."""
    by_way = {(row["views"], row["seed"]): row for row in measured}
    rows = []
    for views in (None, *VIEWS):
        own = {seed: row for (way, seed), row in by_way.items() if way == views}
        if not own:
            continue
        percent = [row["test_percent"] for row in own.values()]
        differences = [
            row["test_percent"] - by_way[None, seed]["test_percent"]
            for seed, row in own.items()
            if views is not None and (None, seed) in by_way
        ]
        rows.append(
            {
                "views": "fresh" if views is None else views,
                "seeds": len(own),
                "test_percent": statistics.fmean(percent),
                "test_percent_range": [min(percent), max(percent)],
                "points_against_fresh": statistics.fmean(differences) if differences else None,
                "points_against_fresh_range": [min(differences), max(differences)] if differences else None,
                "seconds": statistics.median(row["seconds"] for row in own.values()),
            }
        )
    return rows


def measure_time(arguments: argparse.Namespace, teacher: TeacherModel, say: Say) -> None:
    """Repeat after repeat; `say` gets all of them each time."""
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.data or random_pictures(Path(folder), arguments.samples, arguments.validation)
        per_class = arguments.samples // CLASSES if arguments.data else None
        data = data_of(root, per_class, arguments.validation)
        repeats: list[dict[str, Any]] = []
        for number in range(arguments.repeats):
            repeats.append(timed(data, arguments, teacher, number))
            say("time", repeats)


def measure_accuracy(arguments: argparse.Namespace, teacher: TeacherModel, say: Say) -> None:
    """Seed after seed, each in all ways; `say` gets all students each time. All of them share one cache."""
    data = data_of(arguments.data, arguments.accuracy_per_class, arguments.validation)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for views in (None, *VIEWS):
                measured.append(one_accuracy(data, arguments, teacher, Path(folder) / "teacher", seed, views))
                say("accuracy", measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6, help="of the time; 0 leaves it out")
    parser.add_argument("--epochs", type=int, default=4, help="per timed run, at least 2")
    parser.add_argument("--samples", type=int, default=2000, help="training images per timed epoch")
    parser.add_argument("--validation", type=int, default=500, help="validation images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--teacher", default="resnet56", help="one of the cifar: networks")
    parser.add_argument("--student", default="resnet20", help="one of the cifar: networks")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as arrays, as `kind: arrays` takes them")
    parser.add_argument("--weights", help="of the teacher, a file")
    parser.add_argument("--accuracy-epochs", type=int, default=16)
    parser.add_argument("--accuracy-per-class", type=int, help="training images per class; all when left out")
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracy; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="what was found is written to this file after each step")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: must be at least 2, because the first one fills the cache")
    torch.set_num_threads(arguments.threads)
    command = shlex.join(["python", "benchmarks/teacher_cache.py", *sys.argv[1:]])
    found: dict[str, Any] = {
        "machine": machine_record().model_dump(mode="json"),
        "git_revision": git_revision(REPOSITORY),
        "command": command,
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "data", "weights")},
        "precision_ran": resolved_precision(arguments.precision, arguments.device),
        "trained_teacher": arguments.weights is not None,
    }
    print(f"{command}\n{json.dumps(found['machine'])}", flush=True)
    model = make_model(Arch(f"cifar:{arguments.teacher}"), arguments.weights, seed=0)
    identity: dict[str, JsonValue] = {"network": arguments.teacher}
    if arguments.weights is not None:
        identity["weights"] = sha256_of(Path(arguments.weights))
    teacher = TeacherModel(model, identity)

    def say(what: str, measured: list[dict[str, Any]]) -> None:
        summary = time_summary(measured) if what == "time" else accuracy_summary(measured)
        found[what] = {"summary": summary, "measured": measured}
        print(f"{what}: {json.dumps(measured[-1])}\n{json.dumps(summary)}", flush=True)
        if arguments.json:
            write_file(arguments.json, readable_json(found))

    if arguments.repeats:
        measure_time(arguments, teacher, say)
    if arguments.data and arguments.weights:
        measure_accuracy(arguments, teacher, say)


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(str(error))
