"""What `compress bench` does: models of any origin, measured together on every backend that was asked for."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress import machine
from compress.bench import latency, profile
from compress.bench.accuracy import accuracy, check_classes, compare, evaluate_in_onnx, quality
from compress.bench.size import measure_size, precision_of
from compress.checkpoint import Checkpoint
from compress.config import Pipeline
from compress.config.located import located
from compress.config.pipeline import LatencyConfig
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.errors import CompressError
from compress.events import Progress
from compress.files import sha256_of
from compress.measured import NotMeasured, Precision, Profile, Quality, Size, SplitAccuracy, SplitQuality
from compress.results import BenchResults, Comparison, Target
from compress.surroundings import git_revision, machine_record
from compress.targets import Model, Shapes, resolve, shapes_of
from compress.timed import main_setting
from compress.told import Heard, without_folders

_TORCH = ("torch", "torch-compile")
_HALVES = ("fp16", "bf16")


@dataclass(frozen=True)
class BenchSettings:
    """What is to be measured."""

    latency: LatencyConfig
    device: str = "cpu"
    """One of `compress.bench.latency.DEVICES`."""
    backends: tuple[str, ...] = ("onnxruntime",)
    """Some of `compress.bench.latency.BACKENDS`, each once."""
    pipeline: Pipeline | None = None
    """On whose data accuracy is measured; None measures none."""
    with_profile: bool = True
    """Whether every node is timed; on the CPU only."""
    trust_code: bool = False
    """Whether the checkpoints' own model code may be run."""
    shapes: Shapes = field(default_factory=dict)
    """By name of an input the shape of one sample, for files that leave it open; '' is the only input of a file."""
    command: str = ""
    """What to write into the results as the way to repeat them."""


@dataclass(frozen=True)
class _Sized:
    """A model, and what its file tells without being run."""

    model: Model
    precision: Precision
    size: Size
    sha256: str

    @property
    def name(self) -> str:
        return self.model.name


@dataclass(frozen=True)
class _Judged:
    """What a model's answers are worth."""

    accuracy: SplitAccuracy
    quality: SplitQuality
    comparison: Comparison | None
    """With the first model."""


def bench(targets: Sequence[Path], settings: BenchSettings, progress: Progress) -> BenchResults:
    """Measure targets: size, accuracy where there is data, time per node, and latency, all of them in turns.

    Args:
        targets: `.onnx` files, checkpoints, runs and folders of `.onnx` files, at least one. The first is what the others
            are compared with; of a run that is its reference.
        settings: what to measure.
        progress: told of everything that happens.

    Raises:
        CompressError: what is wrong with a target, the settings or the data. What merely cannot be measured becomes a
            record in `missing` or a warning.
    """
    warnings: list[str] = []
    heard = Heard(progress, warnings)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        models = resolve(targets, Path(scratch), heard, trust_code=settings.trust_code)
        # First of all: a file that is no model is told before minutes are spent on those that are.
        sized = [_sized(model) for model in models]
        shapes = shapes_of(models, settings.shapes)
        judged = _known(models) if settings.pipeline is None else _judge(models, settings.pipeline, heard)
        profiles = _profiles(models, shapes, settings, heard) if settings.with_profile else {}
        heard.note("latency of all models, in alternating rounds, a process each")
        variants = [variant for one in sized for variant in _variants(one, shapes[one.name], settings)]
        found = latency.measure(variants, settings.latency, heard, sized[0].name)
    measured = [(one, judged.get(one.name)) for one in sized]
    return BenchResults(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=settings.command,
        git_revision=git_revision(Path()),
        machine=machine_record(),
        rounds=settings.latency.rounds,
        seconds=settings.latency.seconds,
        targets=tuple(
            Target(
                name=one.name,
                file=one.model.path.name,
                sha256=one.sha256,
                precision=one.precision,
                size=one.size,
                accuracy=answers.accuracy if answers else None,
                quality=answers.quality if answers else None,
                comparison=answers.comparison if answers else None,
                latency=found.latencies[one.name],
                profile=profiles.get(one.name),
            )
            for one, answers in measured
        ),
        repeats=found.repeats,
        missing=tuple(_placeless(each, models) for each in found.missing),
        warnings=tuple(warnings),
    )


def _sized(model: Model) -> _Sized:
    return _Sized(model, precision_of(model.path), measure_size(model.path), sha256_of(model.path))


def _known(models: Sequence[Model]) -> Mapping[str, _Judged]:
    """What runs have measured already; compared, where the first of all models is the reference of the same run."""
    first = models[0]
    return {
        model.name: _Judged(
            model.row.accuracy,
            _at_another_time(model.row.quality),
            model.row.comparison if model.results is first.results else None,
        )
        for model in models
        if model.row is not None
    }


def _at_another_time(quality: SplitQuality) -> SplitQuality:
    """The same without how fast it was found: nothing that was timed at another time stands beside what is timed now."""

    def untimed(split: Quality) -> Quality:
        return split.model_copy(update={"samples_per_second": None})

    return SplitQuality(validation=untimed(quality.validation), test=untimed(quality.test))


def _placeless(missing: NotMeasured, models: Sequence[Model]) -> NotMeasured:
    return missing.model_copy(update={"reason": without_folders(missing.reason, _places(models))})


def _places(models: Sequence[Model]) -> Iterator[Path]:
    """Where the files lie that an error may name."""
    for model in models:
        yield model.path
        if model.checkpoint is not None:
            yield model.checkpoint.path


def _judge(models: Sequence[Model], pipeline: Pipeline, progress: Progress) -> Mapping[str, _Judged]:
    """What the answers of each file are worth on the data of a pipeline; without those that cannot answer it."""
    with located(pipeline):
        data = load_data(pipeline.data, pipeline.seed)
        check_classes(len(data.classes))
    classes, splits = len(data.classes), {"validation": data.validation, "test": data.test}
    labels = {name: split.labels.numpy() for name, split in splits.items()}
    judged: dict[str, _Judged] = {}
    first: dict[str, NDArray[np.int64]] | None = None
    for model in models:
        if model.checkpoint is not None and (other := other_data(model.checkpoint, data)):
            progress.warn(f"'{model.name}' was made for {other} than this data has: its accuracy here says little")
        try:
            found = {
                name: evaluate_in_onnx(model.path, split, classes, pipeline.bench.batch_size, machine.cores(), progress)
                for name, split in splits.items()
            }
        except CompressError as error:
            progress.warn(without_folders(f"no accuracy of '{model.name}': {error}", _places(models)))
            continue
        answers = {name: one.answers.classes for name, one in found.items()}
        compared = None
        if first is not None:
            compared = Comparison(**{name: compare(labels[name], first[name], answers[name]) for name in splits})
        judged[model.name] = _Judged(
            SplitAccuracy(**{name: accuracy(answers[name] == labels[name]) for name in splits}),
            SplitQuality(**{name: quality(found[name], labels[name], classes) for name in splits}),
            compared,
        )
        if model is models[0]:
            first = answers
    return judged


def other_data(checkpoint: Checkpoint, data: Dataset) -> str:
    """What a checkpoint was made for that this data does not have; empty where they fit."""
    if checkpoint.classes != data.classes:
        return "other classes"
    mine, given = checkpoint.inputs, data.inputs
    if [(each.shape, each.dtype) for each in mine] != [(each.shape, each.dtype) for each in given]:
        return "other inputs"
    pairs = [
        (a, b)
        for one, other in zip(mine, given, strict=True)
        for a, b in ((one.mean, other.mean), (one.std, other.std))
    ]
    # Measured ones may differ in their last digits from one version of a library to the next.
    is_same = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    return "" if is_same else "inputs normalised otherwise"


def _profiles(
    models: Sequence[Model], shapes: Mapping[str, Shapes], settings: BenchSettings, progress: Progress
) -> Mapping[str, Profile]:
    """Times per node in the main setting, as in a run."""
    found: dict[str, Profile] = {}
    if settings.device != "cpu":
        progress.warn("time by operator is measured on the CPU only")
        return found
    for model in models:
        progress.note(f"time per node of '{model.name}'")
        try:
            found[model.name] = profile.profile(model.path, *main_setting(settings.latency), shapes=shapes[model.name])
        except CompressError as error:
            progress.warn(without_folders(f"no times per node of '{model.name}': {error}", _places(models)))
    return found


def _variants(one: _Sized, shapes: Shapes, settings: BenchSettings) -> Iterator[latency.Variant]:
    """One per backend; PyTorch on CUDA computes a checkpoint in half precision too."""
    model = one.model
    for backend in settings.backends:
        runs_halves = backend in _TORCH and settings.device == "cuda" and model.checkpoint and one.precision == "fp32"
        for compute in ("", *(_HALVES if runs_halves else ())):
            yield latency.Variant(
                name=one.name,
                path=model.path,
                precision=one.precision,
                checkpoint=None if model.checkpoint is None else model.checkpoint.path,
                trusted=model.trusted,
                device=settings.device,
                backend=backend,
                compute=compute,
                shapes=shapes,
            )
