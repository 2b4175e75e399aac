"""What can be found wrong with a run before hours go into training, and with its reference before they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from compress.config import DistillConfig, ModelConfig, Pipeline, RecoveryConfig, TeacherConfig, TrainConfig
from compress.data.base import Dataset
from compress.methods.statistics import two_proportions_differ
from compress.models.factory import Arch
from compress.models.source import make_model
from compress.plan import Planned
from compress.rows import Done
from compress.stages.base import check_deterministic, check_forward, check_training_forward
from compress.training.taught import TeacherModel, check

_SUSPICIOUS_GAP_POINTS = 2.0
_SUSPICIOUS_P_VALUE = 0.001
Warn = Callable[[str], None]


def check_models(pipeline: Pipeline, data: Dataset, model: nn.Module, stages: Sequence[Planned], warn: Warn) -> None:
    """Check factories, forward passes and shapes of all that the stages will train, and what their losses compare.

    Args:
        pipeline: all settings.
        data: what models are tried on.
        model: the source.
        stages: those that will run or be taken from the cache, the source first.
        warn: told of what is allowed and hardly meant.

    Raises:
        StageError: where something does not fit, with the key of its settings.
    """
    inputs = data.example()
    check_forward(model, inputs, len(data.classes), "model")
    check_deterministic(model, inputs, "model")
    trains = any(planned.name == "train" for planned in stages)
    if trains:
        check_training_forward(model, inputs, "model")
    made = {key: _checked(key, config, data, pipeline.seed) for key, config in _others(pipeline, stages)}
    _check_trainings(model, made, data, stages)
    if len(stages) > 1 and not (trains or Arch(pipeline.model.factory).is_code() or pipeline.model.weights):
        warn("the source model has random weights: give model.weights, or begin with the stage 'train'")


def check_reference(reference: Done, warn: Warn) -> None:
    """Warn where the model that all others are compared with saw the validation images in its training."""
    validation = reference.measurement.accuracy.validation
    test = reference.measurement.accuracy.test
    p_value = two_proportions_differ(validation.correct, validation.n, test.correct, test.n)
    if validation.percent - test.percent > _SUSPICIOUS_GAP_POINTS and p_value < _SUSPICIOUS_P_VALUE:
        warn(
            f"'{reference.planned.label}' answers {validation.percent:.2f} % of validation but {test.percent:.2f} % of "
            "test: it was probably trained on the validation images, so no budget means anything; take validation "
            "from elsewhere, such as data.validation: {from: test, size: 2000}"
        )


def _others(pipeline: Pipeline, stages: Sequence[Planned]) -> Iterator[tuple[str, ModelConfig]]:
    """The models besides the source that these stages need, by key."""
    needed = tuple(f"stages.{planned.position - 1}." for planned in stages)
    return ((key, config) for key, config in pipeline.models() if key.startswith(needed))


def _checked(key: str, config: ModelConfig, data: Dataset, seed: int) -> nn.Module:
    """A model that learns or teaches beside the source, found to be usable."""
    inputs = data.example()
    made = make_model(Arch(config.factory, config.kwargs), config.weights, seed, at=key)
    check_forward(made, inputs, len(data.classes), key)
    check_deterministic(made, inputs, key)
    if not isinstance(config, TeacherConfig):
        check_training_forward(made, inputs, key)
    return made


def _check_trainings(
    source: nn.Module, made: Mapping[str, nn.Module], data: Dataset, stages: Sequence[Planned]
) -> None:
    """Layers that are compared and inputs that are changed; surgery in between keeps the names of layers."""
    model = source
    for planned in stages:
        key = f"stages.{planned.position - 1}.{planned.name}"
        teacher = TeacherModel(source, {})
        if isinstance(planned.settings, DistillConfig):
            teacher, model = TeacherModel(model, {}), made[f"{key}.student"]
        if isinstance(planned.settings, TrainConfig | DistillConfig):
            check(model, planned.settings, data, at=key, teachers=[teacher])
        recovery = getattr(planned.settings, "recovery", None)
        if isinstance(recovery, RecoveryConfig):
            check(model, recovery, data, at=f"{key}.recovery", teachers=[teacher])
