"""What each distillation method is worth: a ResNet-20 for CIFAR-10 from scratch, taught by the published ResNet-56.

Every method is a `distill` stage in `distillation_methods.py`, with settings from its paper or from the code of Tian et al. 2020,
arXiv:1910.10699, for what compares layers. All else is the same for all: student, initial weights and order of the samples
(both decided by the seed alone), epochs, optimizer, batch size. Each (method, seed) is one training by the stage's own code,
the one that `compress run` would do; the epoch that is best on validation is kept, and measured once on test.

Validation is a part of train, so that test is all of CIFAR-10's 10,000 images; a student from scratch has seen none of either.
(The teacher has seen the validation images, but is never asked about them.)

The teacher's answers are computed once per seed and shared by all methods that need nothing else of it. By default there are
as many augmented views as epochs, so that no method sees less variety than another; with fewer, methods that have no cache
(`none`, those that compare layers, mixup and CutMix) see more, and the table says so.

Each finished training is written to --out at once; the same command goes on where it was stopped, also inside a training.

    python benchmarks/distillation.py --data cifar10 --weights . --epochs 30 --seeds 0 1 2
    python benchmarks/distillation.py --render                       the table, for benchmarks/README.md
    python benchmarks/distillation.py --render --cards docs/methods  and the results on the method cards
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from distillation_methods import ALONE, METHODS, PLAIN, STUDENT
from distillation_table import known_results, markdown, write_cards

from compress import CompressError, machine
from compress import checkpoint as checkpoints
from compress.checkpoint import Checkpoint
from compress.config import DistillConfig, Pipeline
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.events import EpochResult, Silent
from compress.files import readable_json, sha256_of, write_file
from compress.models.cost import parameters
from compress.plan import Keys, check_files, planned_stages
from compress.provenance import code_digest
from compress.stages import STAGES, source
from compress.stages.base import Context
from compress.surroundings import git_revision, machine_record
from compress.training import evaluate
from compress.training.cache import CachedTeacher
from compress.training.precision import Arithmetic, resolved_precision
from compress.training.teachers import OneTeacher

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "distillation.json"
TEACHER, TEACHER_WEIGHTS = "cifar:resnet56", "cifar10_resnet56.safetensors"
SECOND_WEIGHTS = "cifar10_resnet20.safetensors"
PUBLISHED = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""What the published weights were trained with."""


@dataclass(frozen=True)
class Budget:
    """What all trainings share, as the command line says."""

    data: Path
    weights: Path
    epochs: int
    validation: int
    views: int
    device: str
    threads: int
    batch_size: int
    learning_rate: float
    per_class: int | None = None
    fraction: float | None = None

    def told(self) -> dict[str, Any]:
        """What decides about the numbers, without where files lie."""
        names = ("epochs", "batch_size", "learning_rate", "validation", "views", "per_class", "fraction", "threads")
        return {
            **{name: getattr(self, name) for name in names},
            "teacher": TEACHER,
            "student": STUDENT,
            "precision": resolved_precision("auto", self.device),
            "device": machine.cuda_device_name() if self.device == "cuda" else machine.cpu_model(),
        }

    def pipeline(self, method: str, seed: int) -> Pipeline:
        """The pipeline that does the same."""
        amount = {name: getattr(self, name) for name in ("per_class", "fraction") if getattr(self, name) is not None}
        document = {
            "name": "distillation",
            "seed": seed,
            "device": self.device,
            "threads": self.threads,
            "data": {
                "kind": "arrays",
                "root": str(self.data.resolve()),
                "normalize": PUBLISHED,
                "augment": {"crop": 4, "flip": True},
                "validation": {"from": "train", "size": self.validation},
                **amount,
            },
            "model": {"factory": TEACHER, "weights": str((self.weights / TEACHER_WEIGHTS).resolve())},
            "stages": [{"distill": self._stage(method)}],
        }
        return Pipeline.model_validate_json(json.dumps(document))

    def _stage(self, method: str) -> dict[str, Any]:
        settings = {
            "student": {"factory": STUDENT},
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            **METHODS[method].stage,
        }
        if "ensemble" in settings:
            weights = str((self.weights / SECOND_WEIGHTS).resolve())
            settings["ensemble"] = {"others": [{"factory": STUDENT, "weights": weights}]}
        return {**settings, "cache": {"views": self.views}} if can_cache(settings) else settings


def can_cache(settings: Mapping[str, Any]) -> bool:
    """Whether a method needs the teacher's answers to images that come again, and nothing else of it."""
    try:
        DistillConfig.model_validate_json(json.dumps({**settings, "cache": {}}))
    except ValueError:
        return False
    return True


class Watch(Silent):
    """A line per epoch."""

    def __init__(self, what: str) -> None:
        self._what = what

    def epoch(self, result: EpochResult) -> None:
        """Shows it."""
        print(
            f"  {self._what} epoch {result.epoch}/{result.epochs} loss {result.loss:.4f} "
            f"validation {result.validation_percent:.2f} % {result.seconds:.1f} s",
            flush=True,
        )

    def note(self, text: str) -> None:
        """Shows it."""
        print(f"  {self._what} {text}", flush=True)

    warn = note


@dataclass
class Workshop:
    """All trainings of one seed: they share data, teacher and the folder of its answers."""

    budget: Budget
    seed: int
    folder: Path
    dataset: Dataset = field(init=False)
    teacher: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        pipeline = self.budget.pipeline(ALONE, self.seed)
        check_files(pipeline)
        self.dataset = load_data(pipeline.data, self.seed)
        weights = sha256_of(Path(str(pipeline.model.weights)))[:8]
        path = self.folder / f"teacher-{weights}-seed{self.seed}"
        if not path.exists():
            made = planned_stages(pipeline)[0]
            draft = source.make(pipeline.model, made.seed)
            given = {"inputs": self.dataset.inputs, "classes": self.dataset.classes}
            checkpoints.save(path, draft, **given, history=(), key={})
        self.teacher = checkpoints.load(path)

    def answered(self) -> float | None:
        """Let the teacher answer all views, so that no training has to wait; seconds per view, None where all were there."""
        pipeline = self.budget.pipeline(PLAIN, self.seed)
        context, config = self._context(PLAIN, pipeline, Silent()), pipeline.stages[0].settings
        asked = context.teacher(self.teacher)
        split = self.dataset.train
        folder = self._answers
        cached = CachedTeacher(OneTeacher(asked.model), split, config.cache, asked.identity, folder, context.progress)
        cached.to(torch.device(self.budget.device), torch.channels_last)
        before, started = self._views(), time.perf_counter()
        for view in range(self.budget.views):
            batch = next(iter(split.batches(1, view=view)))
            with Arithmetic(config.precision, self.budget.device).autocast():
                cached.logits(batch.to(self.budget.device), 1.0)
        made = self._views() - before
        return (time.perf_counter() - started) / made if made else None

    def record(self, method: str) -> dict[str, Any]:
        """One training, and what came of it."""
        pipeline = self.budget.pipeline(method, self.seed)
        context = self._context(method, pipeline, Watch(f"{method} seed {self.seed}"))
        before = self._views()
        draft = STAGES["distill"].load()(self.teacher, pipeline.stages[0].settings, context)
        draft.model.to(self.budget.device)
        _, correct = evaluate(draft.model, self.dataset.test, self.budget.device)
        shutil.rmtree(context.scratch, ignore_errors=True)
        best = max(draft.training, key=lambda row: (row["validation_percent"], -row["validation_loss"]))
        return {
            "method": method,
            "seed": self.seed,
            "stage": METHODS[method].stage,
            "test_percent": 100.0 * correct / len(self.dataset.test),
            "validation_percent": best["validation_percent"],
            "last_validation_percent": draft.training[-1]["validation_percent"],
            "best_epoch": best["epoch"],
            "parameters": parameters(draft.model),
            "train_samples": len(self.dataset.train),
            "test_samples": len(self.dataset.test),
            "epoch_seconds": statistics.median(row["seconds"] for row in draft.training),
            "views_computed": self._views() - before,
            "notes": context.notes,
            "warnings": context.warnings,
            "code": code_digest("compress.stages.distill")[:16],
        }

    @property
    def _answers(self) -> Path:
        return self.folder / "teacher"

    def _views(self) -> int:
        """How many files of answers there are, of any seed and teacher."""
        return sum(1 for _ in self._answers.glob("view*"))

    def _context(self, method: str, pipeline: Pipeline, progress: Silent) -> Context:
        return Context(
            data=self.dataset.for_decisions(),
            reference=self.teacher,
            device=self.budget.device,
            threads=self.budget.threads,
            seed=planned_stages(pipeline)[1].seed,
            scratch=self.folder / "work" / f"{method}-seed{self.seed}",
            progress=progress,
            trusted=frozenset(model.factory for _, model in pipeline.models()),
            cache=self._answers,
            answers_key=Keys(pipeline).answers(),
        )


class Table:
    """The file of results: what is in it is not done again."""

    def __init__(self, path: Path, budget: Budget, command: str) -> None:
        """Go on with the file where there is one.

        Raises:
            CompressError: where it holds trainings of another budget.
        """
        self._path = path
        self._content: dict[str, Any] = {
            "machine": machine_record().model_dump(mode="json"),
            "git_revision": git_revision(REPOSITORY),
            "command": command,
            "budget": budget.told(),
            "seconds_per_view": None,
            "records": [],
        }
        before = json.loads(path.read_bytes()) if path.is_file() else {}
        if before:
            changed = [name for name, value in budget.told().items() if before["budget"].get(name) != value]
            if changed:
                raise CompressError(
                    f"{path}: holds trainings with {changed[0]} {before['budget'].get(changed[0])}, this one has "
                    f"{budget.told()[changed[0]]}; name another file with --out"
                )
            self._content |= {name: before[name] for name in ("records", "seconds_per_view")}

    def holds(self, method: str, seed: int) -> bool:
        """Whether this training, with the settings it has today, is done."""
        return any(
            (record["method"], record["seed"]) == (method, seed)
            and "failed" not in record
            and record["stage"] == METHODS[method].stage
            for record in self._content["records"]
        )

    def answered(self, seconds_per_view: float | None) -> None:
        """Take in how long the teacher took; None where it did nothing."""
        if seconds_per_view is not None:
            self._content["seconds_per_view"] = seconds_per_view

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a training, in place of one with other settings."""
        place = (record["method"], record["seed"])
        kept = [one for one in self._content["records"] if (one["method"], one["seed"]) != place]
        order = list(METHODS)
        self._content["records"] = sorted(
            [*kept, record], key=lambda one: (one["seed"], order.index(one["method"]) if one["method"] in order else 0)
        )
        write_file(self._path, readable_json(self._content))


def measure(budget: Budget, methods: Sequence[str], seeds: Sequence[int], folder: Path, table: Table) -> None:
    """All trainings that are not done yet, seed by seed, so that what is there is comparable whenever it is stopped."""
    torch.set_num_threads(budget.threads)
    for seed in seeds:
        left = [method for method in methods if not table.holds(method, seed)]
        if not left:
            continue
        workshop = Workshop(budget, seed, folder)
        if any(can_cache({"student": {"factory": STUDENT}, **METHODS[method].stage}) for method in left):
            table.answered(workshop.answered())
        for method in left:
            try:
                record = workshop.record(method)
            except CompressError as error:  # a method that fails is a row that says so
                record = {"method": method, "seed": seed, "stage": METHODS[method].stage, "failed": str(error)}
            table.add(record)
            told = record.get("failed") or f"test {record['test_percent']:.2f} %"
            print(f"{method} seed {seed}: {told}", flush=True)


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train_images.npy, train_labels.npy, test_images.npy, …")
    parser.add_argument("--weights", type=Path, help=f"folder with {TEACHER_WEIGHTS} and {SECOND_WEIGHTS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--per-class", type=int, help="training images of each class")
    amount.add_argument("--fraction", type=float, help="part of the training images")
    parser.add_argument("--validation", type=int, default=5000, help="training images kept for validation")
    parser.add_argument("--views", type=int, help="augmented versions that the teacher answers; as many as epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/distillation"), help="folder for what can be made again"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--render", action="store_true", help="train nothing, print the table")
    parser.add_argument(
        "--cards", type=Path, help="with --render: write the results into the method cards of this folder"
    )
    parsed = parser.parse_args(given)
    if not parsed.render and (parsed.data is None or parsed.weights is None):
        parser.error("--data and --weights are needed, or --render")
    if parsed.cards and not parsed.render:
        parser.error("--cards goes with --render")
    return parsed


def main(given: Sequence[str] = tuple(sys.argv[1:])) -> None:
    arguments = _arguments(given)
    if not arguments.render:
        shared = {name: getattr(arguments, name) for name in Budget.__dataclass_fields__ if name != "views"}
        budget = Budget(**shared, views=arguments.views or arguments.epochs)
        command = shlex.join(["python", "benchmarks/distillation.py", *_without_places(given)])
        table = Table(arguments.out, budget, command)
        cudnn = torch.backends.cudnn
        # As `compress run` does: the same kernels each time, and float32 that is float32.
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            measure(budget, arguments.methods, arguments.seeds, arguments.runs, table)
    found = known_results(arguments.out)
    if found is None:
        raise CompressError(f"{arguments.out}: no such file; measure first")
    print(markdown(found))
    if arguments.cards:
        write_cards(arguments.cards, found)


def _without_places(given: Sequence[str]) -> list[str]:
    """Arguments without the folders of this machine."""
    places = ("--data", "--weights", "--runs", "--out")
    return [Path(one).name if before in places else one for before, one in zip(["", *given], given, strict=False)]


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(str(error))
