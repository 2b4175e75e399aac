"""From settings to an objective: who is asked, which layers are compared, what is done to the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import JsonValue
from torch import nn

from compress.config import TaughtConfig, TrainConfig, imitates
from compress.data.base import DecisionData
from compress.errors import StageError
from compress.seeds import derive_seed
from compress.training.cache import CachedTeacher, check_repeats
from compress.training.features import FeatureTerms
from compress.training.mixer import Mixer
from compress.training.objective import Objective, Penalty
from compress.training.perturb import perturbation
from compress.training.place import Workplace
from compress.training.teachers import Ensemble, OneTeacher, Teacher


@dataclass(frozen=True)
class TeacherModel:
    """A model that teaches."""

    model: nn.Module
    """On the CPU."""
    identity: Mapping[str, JsonValue]
    """All that decides what it answers."""
    share: float = 1.0
    """Its part of the mean, where there are several."""


def objective_of(
    model: nn.Module,
    config: TaughtConfig | TrainConfig,
    data: DecisionData,
    place: Workplace,
    *,
    at: str,
    teachers: Sequence[TeacherModel] = (),
    average: Literal["probabilities", "logits"] = "probabilities",
    peers: Sequence[nn.Module] = (),
    penalty: Penalty | None = None,
) -> Objective:
    """What a training minimises, as its settings say.

    Args:
        model: the one that learns and is kept, on the CPU.
        config: losses and all else.
        data: training samples, and what a model takes.
        place: seed, and the folder of teachers' answers.
        at: the key of the settings, for messages.
        teachers: needed where a term imitates the teacher; several only where none compares layers.
        average: what of several teachers is averaged.
        peers: models that learn at the same time.
        penalty: of the weights of the model that is kept.

    Raises:
        StageError: where layers or inputs are not what the settings take them for.
    """
    features = _features(model, config, data, at, teachers, place.seed)
    perturb = perturbation(config.perturb, data.inputs, at)
    if not isinstance(config, TaughtConfig):
        return Objective(model, config.losses, None, perturb=perturb, seed=place.seed, penalty=penalty)
    asked = [features.teacher] if features is not None else [OneTeacher(each.model) for each in teachers]
    averaged = any(imitates(entry, "ema") for entry in config.losses)
    return Objective(
        model,
        config.losses,
        _teacher(asked, teachers, average, config, data, place, at),
        share=config.teacher_share,
        features=features,
        peers=peers,
        ema_decay=config.ema_teacher if averaged else None,
        perturb=perturb,
        seed=place.seed,
        penalty=penalty,
    )


def check(
    model: nn.Module,
    config: TaughtConfig | TrainConfig,
    data: DecisionData,
    *,
    at: str,
    teachers: Sequence[TeacherModel],
) -> None:
    """Check what can be checked of a training before anything runs: layers that are compared, and what is done to inputs.

    Raises:
        StageError: as `objective_of`; where inputs cannot be mixed, attacked, or kept.
    """
    _features(model, config, data, at, teachers, seed=0)
    first = next(iter(data.train.take([0, len(data.train) - 1]).batches(2)))
    for way in ("mixup", "cutmix"):
        if getattr(config, way) is not None:
            alone = config.model_copy(update={other: None for other in ("mixup", "cutmix") if other != way})
            try:
                Mixer(alone, len(data.classes), seed=0).mix(first, epoch=0, step=0)
            except StageError as error:
                raise StageError(f"{at}.{error}") from None
    change = perturbation(config.perturb, data.inputs, at)
    if change is not None:
        change(model, first, torch.Generator().manual_seed(0))
    if isinstance(config, TaughtConfig) and config.cache is not None:
        check_repeats(data.train, f"{at}.cache")


def _features(
    model: nn.Module,
    config: TaughtConfig | TrainConfig,
    data: DecisionData,
    at: str,
    teachers: Sequence[TeacherModel],
    seed: int,
) -> FeatureTerms | None:
    if all(entry.settings.reads != "features" for entry in config.losses):
        return None
    (teacher,) = teachers  # settings refuse more
    seed = derive_seed(seed, "features")
    return FeatureTerms(config.losses, model, teacher.model, data.example(), seed=seed, at=at)


def _teacher(
    asked: Sequence[OneTeacher],
    teachers: Sequence[TeacherModel],
    average: Literal["probabilities", "logits"],
    config: TaughtConfig,
    data: DecisionData,
    place: Workplace,
    at: str,
) -> Teacher | None:
    members: list[Teacher] = list(asked)
    if config.cache is not None:
        # One cache per model: their mean depends on the temperature, and other students may want another one.
        folder = place.cache or place.scratch / "teacher"
        members = [
            CachedTeacher(
                one,
                data.train,
                config.cache,
                each.identity,
                folder,
                place.progress,
                group=place.group,
                at=f"{at}.cache",
            )
            for one, each in zip(asked, teachers, strict=True)
        ]
    if len(members) > 1:
        return Ensemble(members, [each.share for each in teachers], average)
    return members[0] if members else None
