"""What every stage is given and what stages share: wiring, no mathematics."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, Draft
from compress.config import (
    LossEntry,
    RecoveryConfig,
    ScheduleConfig,
    TaughtConfig,
    TrainConfig,
    TrainingConfig,
    imitates,
)
from compress.data.base import DecisionData, Inputs, Split
from compress.data.splits import stratified_sample
from compress.distributed import ALONE, Group
from compress.errors import ModelError, StageError, first_line, listed, nearest
from compress.events import Progress
from compress.models.answers import LOGITS, outputs_of
from compress.models.cost import macs, parameters
from compress.seeds import derive_seed
from compress.training import Workplace, evaluate, fit
from compress.training.batchnorm import reestimate
from compress.training.objective import Objective, Penalty
from compress.training.taught import TeacherModel, objective_of

_SHOWN_REASONS = 5
_STATISTICS_BATCH = 64
_ROUNDING = 1e-3
Run = Callable[..., Draft]
"""Of a checkpoint, settings and a `Context`; some stages take more by name."""


@dataclass(frozen=True)
class Context:
    """Everything a stage may use besides its input and its settings. There is no test split in it."""

    data: DecisionData
    reference: Checkpoint
    """The model that recovery distils from and that accuracy is compared with."""
    device: str
    threads: int
    seed: int
    """Of this stage alone."""
    scratch: Path
    """Folder for what a killed stage needs to go on."""
    progress: Progress
    trusted: frozenset[str]
    """Factories of the user's own pipeline file, which may run code."""
    cache: Path | None = None
    """Folder of teachers' answers, shared by the stages of a run; None keeps them in `scratch`."""
    costs: Path | None = None
    """Folder of what groups of channels cost, shared by the stages of a run; None keeps nothing."""
    group: Group = ALONE
    """The processes that train together; all make the same calls, and only what the leader returns is kept."""
    answers_key: Mapping[str, JsonValue] = field(default_factory=dict)
    """What decides a teacher's answers besides the teacher."""
    parent_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    """What bench measured of the stage's input, by split: to be written down, never to decide by."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Show a line and keep it in the checkpoint's history."""
        self.notes.append(text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """Show a warning and keep it in the checkpoint's history."""
        self.warnings.append(text)
        self.progress.warn(text)

    @property
    def workplace(self) -> Workplace:
        """Where training happens."""
        return Workplace(self.device, self.seed, self.scratch, self.progress, cache=self.cache, group=self.group)

    def example(self) -> Inputs:
        """Two training samples, as the model gets them."""
        return self.data.example()

    def samples(self, n: int, seed: int) -> Split:
        """About `n` training samples, stratified by class, never augmented; all where there are fewer."""
        train = self.data.train
        return train.take(stratified_sample(train.labels, n, seed))

    def teacher(self, checkpoint: Checkpoint, share: float = 1.0) -> TeacherModel:
        """The model of a checkpoint as teacher."""
        identity = {"teacher": checkpoint.digest, **self.answers_key}
        return TeacherModel(checkpoint.build(self.trusted), identity, share)

    def validation_percent(self, model: nn.Module) -> float:
        """Accuracy on validation; `model` is on the CPU before and after."""
        model.to(self.device)
        _, correct = evaluate(model, self.data.validation, self.device)
        model.cpu()
        return 100.0 * correct / len(self.data.validation)


@dataclass(frozen=True)
class Recovered:
    """What came of mending a model after surgery; accuracies on validation, in percent."""

    straight: float
    """Straight after surgery."""
    kept: float
    """Of the model as it is now."""
    training: tuple[dict[str, float | int], ...] = ()
    """A row per epoch."""


def recover(
    model: nn.Module, config: RecoveryConfig | None, batchnorm_samples: int, context: Context
) -> tuple[dict[str, float | int], ...]:
    """Mend `model` in place after surgery, as `recovered` does; a row per epoch."""
    return recovered(model, config, batchnorm_samples, context).training


def recovered(model: nn.Module, config: RecoveryConfig | None, batchnorm_samples: int, context: Context) -> Recovered:
    """Mend `model` in place after surgery: the statistics of its batch norms, then by training.

    By default it learns from the answers of the reference model. What is no better on validation than before is not kept.

    Args:
        model: on the CPU, before and after.
        config: of the training; None for none.
        batchnorm_samples: training samples for the statistics; 0 leaves them.
        context: data, seed, and the model that others are compared with.
    """
    straight, percent = _with_new_statistics(model, batchnorm_samples, context)
    if config is None:
        context.note(f"{percent:.2f} % on validation, without recovery training")
        return Recovered(straight, percent)
    context.note(f"{percent:.2f} % on validation before recovery training")
    for line in told_losses(config):
        context.note(line)
    tell_of_views(config, context)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = trained_to_recover(model, config, context)
    best = max(float(row["validation_percent"]) for row in training)
    if best < percent:
        model.load_state_dict(before)
        context.note("no epoch of recovery training was as good: the weights before it are kept")
    return Recovered(straight, max(best, percent), training)


def trained_to_recover(
    model: nn.Module, config: RecoveryConfig, context: Context, penalty: Penalty | None = None
) -> tuple[dict[str, float | int], ...]:
    """Train `model` in place with the settings of a recovery; a row per epoch.

    Args:
        model: on the CPU, before and after.
        config: of the training.
        context: data, seed, and the model that it learns from by default.
        penalty: added to the loss; see `Objective`.
    """
    teachers = (
        [context.teacher(context.reference)] if any(imitates(entry, "teacher") for entry in config.losses) else []
    )
    objective = objective_of(
        model, config, context.data, context.workplace, at="recovery", teachers=teachers, penalty=penalty
    )
    tell_of_layers(objective, context)
    return fit(objective, context.data, config, context.workplace)


def _with_new_statistics(model: nn.Module, samples: int, context: Context) -> tuple[float, float]:
    """Accuracy on validation, in percent, as it was and with the statistics of batch norms that are the better ones."""
    percent = context.validation_percent(model)
    if samples == 0:
        return percent, percent
    chosen = context.samples(samples, derive_seed(context.seed, "batch norms"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(context.device)
    has_norms = reestimate(model, (batch.to(context.device) for batch in chosen.batches(_STATISTICS_BATCH)))
    model.cpu()
    if not has_norms:
        return percent, percent
    again = context.validation_percent(model)
    context.note(
        f"{percent:.2f} % on validation straight after surgery, {again:.2f} % once batch norms have statistics of "
        f"{len(chosen)} training samples" + ("" if again > percent else ": the old ones are kept")
    )
    if again <= percent:
        model.load_state_dict(before)
    return percent, max(percent, again)


def told_losses(config: TrainConfig | TaughtConfig) -> Iterator[str]:
    """What a training learns from, a line each, where that is not the usual."""
    if config.losses != type(config).model_fields["losses"].default:
        yield f"loss: {', '.join(_told_term(entry) for entry in config.losses)}"
    if isinstance(config, TaughtConfig) and config.teacher_share is not None:
        yield f"terms that imitate count {_told(config.teacher_share)} times, all others the rest"
    if isinstance(config, TaughtConfig) and any(imitates(entry, "ema") for entry in config.losses):
        yield f"the average of the student keeps {config.ema_teacher:g} of itself in a step"
    yield from _told_perturb(config)


def tell_of_views(config: TaughtConfig, context: Context) -> None:
    """Say where a cache of the teacher's answers leaves the student fewer augmented versions of each image than epochs."""
    if config.cache is None or config.cache.views >= config.epochs:
        return
    if next(iter(context.data.train.batches(1, view=1))).view == 0:
        return  # nothing is augmented
    if config.cache.views == 1:
        context.warn(
            "cache: with one view every epoch sees the same augmented version of each image; more views, up to the "
            f"{config.epochs} epochs, are more variety"
        )
        return
    context.note(f"{config.epochs} epochs see {config.cache.views} augmented versions of each image in turn")


def tell_of_layers(objective: Objective, context: Context) -> None:
    """Say which layers are compared where the settings leave that open."""
    if objective.features is not None:
        for kind, layers in objective.features.found.items():
            text = f"{kind} compares {listed(map(repr, layers))}"
            if text not in context.notes:  # a sparsity training before the cut has said it
                context.note(text)


def _told_perturb(config: TrainingConfig) -> Iterator[str]:
    """What a training does to its images, where it does anything."""
    if config.perturb is not None:
        settings = ", ".join(f"{name} {value:.3g}" for name, value in config.perturb.settings.model_dump().items())
        yield f"images are changed: {config.perturb.kind} ({settings})"


def _told_term(entry: LossEntry) -> str:
    term = entry.settings
    source = getattr(term, "source", "teacher")
    temperature = f" at T {_told(term.temperature)}" if hasattr(term, "temperature") else ""
    return f"{term.weight:g} × {entry.kind}{temperature}{'' if source == 'teacher' else f' from {source}'}"


def _told(value: float | ScheduleConfig) -> str:
    if isinstance(value, ScheduleConfig):
        return f"{value.start:g} to {value.end:g} ({value.shape})"
    return f"{value:g}"


def warn_of_idle_patterns(key: str, patterns: Sequence[str], names: Sequence[str], context: Context) -> None:
    """Name the patterns that match nothing: most likely a slip of the pen."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            context.warn(f"{key}: '{pattern}' matches nothing{nearest(pattern, names)}")


def described(left_alone: Mapping[str, str]) -> str:
    """What a stage left alone, each with the reason, as one readable line."""
    return listed((f"{name} ({reason})" for name, reason in left_alone.items()), _SHOWN_REASONS)


def check_forward(model: nn.Module, example: Inputs, classes: int, what: str) -> None:
    """Run a model once and check that it answers one logit per class.

    Raises:
        StageError: with the reason where it fails or answers something else.
    """
    model.eval()
    try:
        with torch.no_grad():
            answer = model(*example)
    except Exception as error:  # a user's forward may raise anything
        raise StageError(f"{what}: the forward pass fails on {_shapes(example)}: {first_line(error)}") from error
    logits, samples = _outputs(answer, what)[LOGITS], len(example[0])
    if tuple(logits.shape) != (samples, classes):
        hint = ""
        if logits.dim() == 2 and logits.shape[0] == samples:
            hint = f"; set its kwargs to {{num_classes: {classes}}}, or what its factory calls it"
        raise StageError(
            f"{what}: answers {tuple(logits.shape)} for {samples} samples, but the data has {classes} classes{hint}"
        )


def check_deterministic(model: nn.Module, example: Inputs, what: str) -> None:
    """Run a model twice in evaluation mode and check that it answers the same.

    Raises:
        StageError: where it does not: no measurement of it would mean anything, nor would its exported file agree with it.
    """
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        first, second = (_outputs(model(*example), what) for _ in range(2))
    for name, tensor in first.items():
        if not _agree(tensor, second.get(name)):
            raise StageError(
                f"{what}: answers differently each time it is called in evaluation mode: "
                "dropout without training=self.training?"
            )


def _agree(one: Tensor, other: Tensor | None) -> bool:
    """Whether two answers are the same but for rounding: threads may add in another order."""
    if other is None or one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), _ROUNDING, _ROUNDING / 100, equal_nan=True)


def check_training_forward(model: nn.Module, example: Inputs, what: str) -> None:
    """Run copies of a model once in training and once in evaluation mode; some answer more while they train.

    Raises:
        StageError: where training mode fails, or answers something that evaluation mode does not.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            training = copy.deepcopy(model).train()(*example)
            evaluation = copy.deepcopy(model).eval()(*example)
    except Exception as error:  # a user's forward may raise anything
        raise StageError(f"{what}: the forward pass fails in training mode: {first_line(error)}") from error
    expected = _outputs(evaluation, what)
    try:
        known = outputs_of(training).keys() <= expected.keys()
    except ModelError:
        known = False
    if not known:
        usual = "one tensor of logits" if len(expected) == 1 else f"{listed(expected)} as in evaluation mode"
        raise StageError(
            f"{what}: in training mode the forward pass returns a {type(training).__name__}, not {usual}; "
            "switch auxiliary heads off in its kwargs"
        )


def _outputs(answer: Any, what: str) -> dict[str, Tensor]:
    try:
        return outputs_of(answer)
    except ModelError as error:
        raise StageError(f"{what}: {error}") from None


def _shapes(example: Inputs) -> str:
    """The shapes of one sample, for messages."""
    if len(example) == 1:
        return f"inputs of shape {tuple(example[0].shape[1:])}"
    shapes = (f"{tuple(x.shape[1:])}{'' if x.is_floating_point() else ' of whole numbers'}" for x in example)
    return f"inputs of the shapes {' and '.join(shapes)}"


@dataclass(frozen=True)
class Cost:
    """What a model costs."""

    parameters: int
    macs: int


def cost_of(model: nn.Module, example: Inputs) -> Cost:
    """Parameters, and multiply-accumulates of one sample."""
    return Cost(parameters(model), macs(model, tuple(tensor[:1] for tensor in example)))


def what_remains(before: Cost, after: Cost) -> str:
    """How much of a model surgery left, for the notes."""
    macs_left, parameters_left = after.macs / before.macs, after.parameters / before.parameters
    return f"{100 * macs_left:.1f} % of the MACs and {100 * parameters_left:.1f} % of the parameters remain"
