"""From the settings of a term to its loss: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compress.config import (
    AttentionConfig,
    DISTLossConfig,
    DKDLossConfig,
    EntropyConfig,
    HintConfig,
    KDLossConfig,
    LabelLossConfig,
    LogitMSEConfig,
    RelationalConfig,
    ScheduleConfig,
    SimilarityConfig,
    TeacherLabelsConfig,
)
from compress.methods.losses.features import (
    attention_transfer,
    hint_loss,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from compress.methods.losses.logits import (
    decoupled,
    dist,
    entropy,
    label_loss,
    logit_mse,
    soft_cross_entropy,
    soft_label_loss,
    standardize,
    teacher_label_loss,
)
from compress.methods.schedules import scheduled

_DIVERGENCES = {"kl": soft_label_loss, "cross_entropy": soft_cross_entropy}


@dataclass(frozen=True)
class Step:
    """What a term that compares answers sees of a step of the training."""

    logits: Tensor
    """Of the model that learns, (n, classes), float32."""
    labels: Tensor
    """int64 (n,), or a probability per class (n, classes) where samples are mixed."""
    position: float
    """0 (first step) to 1 (last step)."""
    wanted: Callable[[float], Tensor]
    """The logits to imitate, for a temperature, as `Teacher.logits`; of terms that imitate alone."""

    def at(self, value: float | ScheduleConfig) -> float:
        """A setting that may change over the training, now."""
        return value_at(value, self.position)


def value_at(value: float | ScheduleConfig, position: float) -> float:
    """A setting that may change over the training, at `position` of it, 0 to 1."""
    if isinstance(value, ScheduleConfig):
        return scheduled(value.start, value.end, value.shape, position)
    return value


def classes_of(labels: Tensor) -> Tensor:
    """One class per sample, int64 (n,): of mixed samples the one with the larger part."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def _soft_labels(term: KDLossConfig, step: Step) -> Tensor:
    temperature = step.at(term.temperature)
    loss = _DIVERGENCES[term.divergence]
    if term.standardize:
        # Standardized logits have no temperature of their own: averaged teachers give their plain mean.
        return loss(standardize(step.logits), standardize(step.wanted(1.0)), temperature)
    return loss(step.logits, step.wanted(temperature), temperature)


def _decoupled(term: DKDLossConfig, step: Step) -> Tensor:
    temperature = step.at(term.temperature)
    labels = classes_of(step.labels)
    return decoupled(step.logits, step.wanted(temperature), labels, term.alpha, term.beta, temperature)


def _dist(term: DISTLossConfig, step: Step) -> Tensor:
    temperature = step.at(term.temperature)
    return dist(step.logits, step.wanted(temperature), term.beta, term.gamma, temperature)


def _relational(term: RelationalConfig, student: Tensor, teacher: Tensor) -> Tensor:
    total = torch.zeros((), device=student.device)
    if term.distance > 0:
        total = total + term.distance * relational_distance(student, teacher)
    if term.angle > 0:  # memory grows with the third power of the batch
        total = total + term.angle * relational_angle(student, teacher)
    return total


AnswerLoss: TypeAlias = Callable[[Any, Step], Tensor]
"""From a term's settings and what it sees to its loss, before its weight."""
FeatureLoss: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]
"""The same, from what a layer of the student and one of the teacher give out."""

ANSWERS: Mapping[type, AnswerLoss] = {
    KDLossConfig: _soft_labels,
    LabelLossConfig: lambda term, step: label_loss(step.logits, step.labels, term.smoothing),
    TeacherLabelsConfig: lambda term, step: teacher_label_loss(step.logits, step.wanted(1.0), term.smoothing),
    LogitMSEConfig: lambda _, step: logit_mse(step.logits, step.wanted(1.0)),
    DKDLossConfig: _decoupled,
    DISTLossConfig: _dist,
    EntropyConfig: lambda _, step: -entropy(step.logits),
}
FEATURES: Mapping[type, FeatureLoss] = {
    HintConfig: lambda _, adapted, teacher: hint_loss(adapted, teacher),
    AttentionConfig: lambda term, student, teacher: attention_transfer(student, teacher, term.power),
    SimilarityConfig: lambda _, student, teacher: similarity_preserving(student, teacher),
    RelationalConfig: _relational,
}
