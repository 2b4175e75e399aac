"""What `compress robustness` does: models of any origin under the same corruptions and under attacks."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn

from compress import machine
from compress.bench.accuracy import accuracy, check_classes, compare, evaluate_in_onnx
from compress.bench.robustness import (
    CLEAN,
    Answered,
    Answers,
    Condition,
    Plan,
    Subject,
    ask,
    attackable,
    families_for,
)
from compress.bench.size import precision_of
from compress.benchmark import other_data
from compress.checkpoint import Checkpoint
from compress.config import AnyDataConfig, BenchConfig, DigitsConfig, Pipeline
from compress.config.located import located
from compress.config.robustness import ATTACKS, RobustnessConfig
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.errors import CompressError, DataError, listed, nearest
from compress.events import Progress, Silent
from compress.files import sha256_of
from compress.manifest import WEIGHTS
from compress.measured import Precision
from compress.methods.corruptions import FAMILIES, VALUE_FAMILIES
from compress.methods.robustness import mean_difference, mean_share
from compress.robustness_results import (
    CorruptionInfo,
    Level,
    Mean,
    NotAttacked,
    Robustness,
    RobustnessResults,
    UnderAttack,
    UnderCorruption,
)
from compress.surroundings import git_revision, machine_record
from compress.targets import Model, resolve
from compress.told import Heard, without_folders

_SAMPLES_TO_TRY = 8
_ANY_DATA: TypeAdapter[AnyDataConfig] = TypeAdapter(AnyDataConfig)
_SAY_WHICH = "say on which data with --pipeline FILE"


@dataclass(frozen=True)
class RobustnessSettings:
    """What is to be measured."""

    config: RobustnessConfig = field(default_factory=RobustnessConfig)
    pipeline: Pipeline | None = None
    """Whose data; None takes that of the run among the targets, where it needs no files."""
    families: tuple[str, ...] | None = None
    """Corruptions; None takes all that the data can have."""
    attacks: tuple[str, ...] | None = None
    """Some of `compress.config.robustness.ATTACKS`; None takes all where the data can be attacked."""
    device: str = "cpu"
    """Where attacks are computed: 'cpu' or 'cuda'."""
    trust_code: bool = False
    """Whether the checkpoints' own model code may be run."""
    command: str = ""
    """What to write into the results as the way to repeat them."""


@dataclass(frozen=True)
class _Measured:
    """A model that runs on the data."""

    model: Model
    precision: Precision
    sha256: str


@dataclass(frozen=True)
class _Crafters:
    """Who attacks whom."""

    models: Mapping[str, nn.Module]
    """Float models by the name of the target that they are of."""
    of: Mapping[str, str]
    """By target the name of its crafter."""
    own: frozenset[str]
    """Targets that are attacked with the gradients of their own weights."""
    missing: tuple[NotAttacked, ...]


def measure_robustness(targets: Sequence[Path], settings: RobustnessSettings, progress: Progress) -> RobustnessResults:
    """Accuracy of targets on clean, corrupted and attacked samples; each answers the same corrupted ones.

    All answers come from the targets' ONNX files. Attacks need gradients, which only checkpoints have: what has none is
    shown the images that fool its float weights, or else the first target that has gradients.

    Args:
        targets: as of `compress bench`, at least one. The first is what the others are compared with.
        settings: what to measure.
        progress: told of everything that happens.

    Raises:
        CompressError: what is wrong with a target, the settings or the data. A target that does not run on the data, and
            an attack that cannot be made, become a warning and a record.
    """
    for family in settings.families or ():
        if family not in (known := (*FAMILIES, *VALUE_FAMILIES)):
            raise CompressError(
                f"--corruption: there is no '{family}' (there are {listed(known)}){nearest(family, known)}"
            )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CompressError("--device: there is no CUDA device that this torch can use")
    warnings: list[str] = []
    heard = Heard(progress, warnings)
    with tempfile.TemporaryDirectory(prefix="compress-robustness-") as scratch:
        models = resolve(targets, Path(scratch), heard, trust_code=settings.trust_code)
        data, bench, seed = _data(models, settings.pipeline)
        families = _families(settings.families, data)
        attacks = _attacks(settings.attacks, data, heard)
        split = data.test if settings.config.split == "test" else data.validation
        measured = _running(models, data, bench, heard)
        crafters = _crafters(measured) if attacks else _Crafters({}, {}, frozenset(), ())
        if attacks and settings.attacks and not crafters.models:
            raise CompressError(f"--attack: no target has gradients: {crafters.missing[0].reason}")
        subjects = [Subject(one.model.name, one.model.path, crafters.of.get(one.model.name)) for one in measured]
        plan = Plan(settings.config, families, attacks, seed, bench.batch_size, machine.cores(), settings.device)
        answered = ask(subjects, crafters.models, data, split, plan, heard)
    missing = (
        *crafters.missing,
        *(
            NotAttacked(name=one.name, reason=answered.failed[one.crafter])
            for one in subjects
            if one.crafter in answered.failed and one.crafter is not None
        ),
    )
    for each in dict.fromkeys(one.reason for one in missing):
        names = listed(f"'{one.name}'" for one in missing if one.reason == each)
        heard.warn(without_folders(f"no attacks on {names}: {each}", _places(models)))
    side = min((min(each.shape[1:]) for each in data.inputs if each.is_image), default=0)
    return RobustnessResults(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=settings.command,
        git_revision=git_revision(Path()),
        machine=machine_record(),
        split=settings.config.split,
        samples=len(answered.labels),
        seed=seed,
        classes=data.classes,
        severities=settings.config.severities,
        epsilons=settings.config.epsilons if attacks else (),
        steps=settings.config.steps,
        restarts=settings.config.restarts,
        families=tuple(_info(family, settings.config.severities, side) for family in families),
        targets=tuple(_target(one, measured[0].model.name, crafters, answered, plan) for one in measured),
        missing=tuple(
            each.model_copy(update={"reason": without_folders(each.reason, _places(models))}) for each in missing
        ),
        warnings=tuple(warnings),
    )


# --- what is asked for -----------------------------------------------------------------------------------------------


_Data: TypeAlias = tuple[Dataset, BenchConfig, int]


def _data(models: Sequence[Model], pipeline: Pipeline | None) -> _Data:
    """The data of a pipeline file; or of the runs among the targets, which keep no folders of the machine."""
    if pipeline is not None:
        with located(pipeline):
            data = load_data(pipeline.data, pipeline.seed)
            check_classes(len(data.classes))
        return data, pipeline.bench, pipeline.seed
    runs = {model.results.name: model.results for model in models if model.results is not None}
    if not runs:
        raise CompressError(f"robustness needs data, and no target is a run: {_SAY_WHICH}")
    described = {(str(run.settings.get("data")), run.seed) for run in runs.values()}
    if len(described) > 1:
        raise CompressError(f"the runs {listed(runs)} have different data or seeds: {_SAY_WHICH}")
    run = next(iter(runs.values()))
    try:
        config = _ANY_DATA.validate_python(run.settings.get("data"), strict=False)
    except ValidationError:
        config = None
    if not isinstance(config, DigitsConfig):
        made = f" (it was made by: {run.command})" if run.command else ""
        raise CompressError(f"the run '{run.name}' does not keep where its data lies: {_SAY_WHICH}{made}")
    data = load_data(config, run.seed)
    return data, BenchConfig(), run.seed


def _families(asked: Sequence[str] | None, data: Dataset) -> tuple[str, ...]:
    possible = families_for(data.inputs)
    if asked is None:
        return possible
    for family in asked:
        if family not in possible:
            kind = "images" if family in FAMILIES else "measured values that are no images"
            raise DataError(f"--corruption: '{family}' is for {kind}; this data can have {listed(possible)}")
    return tuple(asked)


def _attacks(asked: Sequence[str] | None, data: Dataset, progress: Progress) -> tuple[str, ...]:
    if asked is not None and not asked:
        return ()
    try:
        attackable(data.inputs)
    except DataError as error:
        if asked is not None:
            raise DataError(f"--attack: {error}") from None
        progress.note(f"no attacks: {error}")
        return ()
    return ATTACKS if asked is None else tuple(asked)


def _running(models: Sequence[Model], data: Dataset, bench: BenchConfig, progress: Progress) -> list[_Measured]:
    """Those that answer the data, tried on a few samples before minutes are spent."""
    few = data.validation.take(range(min(_SAMPLES_TO_TRY, len(data.validation))))
    found: list[_Measured] = []
    errors: list[CompressError] = []
    for model in models:
        precision = precision_of(model.path)  # a file that is no model is an error, not a row
        try:
            evaluate_in_onnx(model.path, few, len(data.classes), bench.batch_size, machine.cores(), Silent())
        except CompressError as error:
            errors.append(error)
            progress.warn(without_folders(f"'{model.name}' is left out: {error}", _places(models)))
            continue
        if model.checkpoint is not None and (other := other_data(model.checkpoint, data)):
            progress.warn(f"'{model.name}' was made for {other} than this data has: its accuracy here says little")
        found.append(_Measured(model, precision, sha256_of(model.path)))
    if not found:
        raise errors[0]
    return found


def _crafters(measured: Sequence[_Measured]) -> _Crafters:
    """Float models of the checkpoints, those with the same weights once; targets without one get the first's."""
    models: dict[str, nn.Module] = {}
    of: dict[str, str] = {}
    known: dict[object, str] = {}
    reasons: dict[str, str] = {}
    for one in measured:
        name, checkpoint = one.model.name, one.model.checkpoint
        if checkpoint is None:
            reasons[name] = "ONNX Runtime has no gradients; a checkpoint has"
            continue
        key = _weights(checkpoint)
        if key not in known:
            try:
                models[name] = checkpoint.build(one.model.trusted)
            except CompressError as error:
                reasons[name] = str(error)
                continue
            known[key] = name
        of[name] = known[key]
    own = frozenset(of)
    if models:
        return _Crafters(models, of | dict.fromkeys(reasons, next(iter(models))), own, ())
    return _Crafters({}, {}, own, tuple(NotAttacked(name=name, reason=reason) for name, reason in reasons.items()))


def _weights(checkpoint: Checkpoint) -> object:
    record = checkpoint.manifest
    return record.arch.model_dump_json(), record.edits, record.files[WEIGHTS].sha256


def _places(models: Sequence[Model]) -> Iterator[Path]:
    """Where the files lie that an error may name."""
    for model in models:
        yield model.path
        if model.checkpoint is not None:
            yield model.checkpoint.path


# --- what was found --------------------------------------------------------------------------------------------------


def _info(family: str, severities: Sequence[int], side: int) -> CorruptionInfo:
    if family in FAMILIES:
        image = FAMILIES[family]
        strengths = tuple(float(f"{image.strength(severity, side):.3g}") for severity in severities)
        return CorruptionInfo(family=family, what=image.what, unit=image.unit, strengths=strengths, source=image.source)
    values = VALUE_FAMILIES[family]
    strengths = tuple(values.strengths[severity - 1] for severity in severities)
    return CorruptionInfo(
        family=family, what=values.what, unit=values.unit, strengths=strengths, source="our own choice"
    )


def _target(one: _Measured, first_name: str, crafters: _Crafters, answered: Answered, plan: Plan) -> Robustness:
    name, labels = one.model.name, answered.labels
    answers = answered.answers[name]
    first = None if name == first_name else answered.answers[first_name]

    def level(condition: Condition) -> Level:
        said = answers[condition]
        compared = None if first is None or condition not in first else compare(labels, first[condition], said)
        return Level(level=condition[1], accuracy=accuracy(said == labels), difference=compared)

    def levels(name: str, conditions: Sequence[Condition]) -> tuple[Level, ...]:
        return tuple(level(condition) for condition in conditions if condition[0] == name)

    def mean(conditions: Sequence[Condition]) -> Mean:
        return _mean(labels, answers, first, conditions)

    is_own = name in crafters.own
    crafted_on = name if is_own else crafters.of.get(name, "")
    is_quantized = one.precision != "fp32"
    clean = level(CLEAN)
    return Robustness(
        name=name,
        file=one.model.path.name,
        sha256=one.sha256,
        precision=one.precision,
        clean=clean.accuracy,
        difference=clean.difference,
        corruptions=tuple(
            UnderCorruption(
                family=family,
                levels=levels(family, plan.corruptions),
                mean=mean([condition for condition in plan.corruptions if condition[0] == family]),
            )
            for family in plan.families
        ),
        mean=mean(plan.corruptions) if plan.families else None,
        attacks=tuple(
            UnderAttack(
                attack=attack,
                crafted_on=f"{crafted_on}, its float weights" if is_own and is_quantized else crafted_on,
                is_transfer=not is_own or is_quantized,
                levels=levels(attack, plan.attacked),
            )
            for attack in plan.attacks
            if any(condition in answers for condition in plan.attacked)
        ),
    )


def _mean(
    labels: Answers,
    answers: Mapping[Condition, Answers],
    first: Mapping[Condition, Answers] | None,
    conditions: Sequence[Condition],
) -> Mean:
    def shares(of: Mapping[Condition, Answers]) -> NDArray[np.float64]:
        right: NDArray[np.float64] = np.mean([of[condition] == labels for condition in conditions], axis=0)
        return right

    percent, low, high = (100.0 * value for value in mean_share(shares(answers)))
    clean = 100.0 * float(np.mean(answers[CLEAN] == labels))
    points: tuple[float | None, ...] = (None, None, None)
    if first is not None:
        points = tuple(100.0 * value for value in mean_difference(shares(first), shares(answers)))
    return Mean(
        percent=percent,
        low=low,
        high=high,
        relative_drop=100.0 * (clean - percent) / clean if clean else None,
        points=points[0],
        points_low=points[1],
        points_high=points[2],
    )
