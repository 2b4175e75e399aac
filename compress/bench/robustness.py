"""Answers to corrupted and attacked samples. Every model gets exactly the same corrupted ones.

Samples are read once and stay in memory in parts; what a corruption makes of a part is answered by all models before the
next one is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.bench.accuracy import evaluate_in_onnx
from compress.config.robustness import RobustnessConfig
from compress.data.base import WHOLE, Batch, DecisionData, Input, Inputs, Shard, Split
from compress.data.splits import stratified_sample
from compress.errors import DataError, ModelError, first_line, listed
from compress.events import Progress, Silent
from compress.methods.attacks import Reach, fgsm, label_loss_of, pgd
from compress.methods.corruptions import FAMILIES, VALUE_FAMILIES, corrupt, corrupt_values
from compress.models.answers import logits_of
from compress.models.modes import in_evaluation
from compress.seeds import derive_seed

Answers = NDArray[np.int64]
Condition = tuple[str, float]
"""Family or attack, and severity or ε in 255ths of a pixel's range."""
CLEAN: Condition = ("clean", 0.0)

_PART_VALUES = 1 << 25
"""Of the inputs in memory at once: 128 MiB of them."""
_CRAFTED_TOGETHER = 128
"""Fixed, so that the starts of an attack do not depend on how models are run."""
_MEASURED_SAMPLES = 1000
_STEP_SHARE = 2.5
"""Length of all steps of PGD together, in ε: enough to cross the ball from any start (Madry et al. 2018, section 5)."""


@dataclass(frozen=True)
class Subject:
    """A model that answers."""

    name: str
    path: Path
    """Its ONNX file."""
    crafter: str | None = None
    """Name of the model whose gradients attack it; None attacks it not."""


@dataclass(frozen=True)
class Plan:
    """What is to be asked."""

    config: RobustnessConfig
    families: tuple[str, ...]
    """Of `families_for`."""
    attacks: tuple[str, ...]
    """Some of `compress.config.robustness.ATTACKS`."""
    seed: int
    batch_size: int
    """Samples per call of an ONNX file."""
    threads: int
    device: str = "cpu"
    """Where attacks are computed."""

    @property
    def corruptions(self) -> tuple[Condition, ...]:
        """Every family at every severity."""
        return tuple((family, float(level)) for family in self.families for level in self.config.severities)

    @property
    def attacked(self) -> tuple[Condition, ...]:
        """Every attack at every ε."""
        return tuple((attack, epsilon) for attack in self.attacks for epsilon in self.config.epsilons)


def families_for(inputs: Sequence[Input]) -> tuple[str, ...]:
    """Families of corruptions that these inputs can have: those of images where there is one, else those of numbers.

    Raises:
        DataError: where all inputs are numbers that stand for something, such as tokens.
    """
    if any(each.is_image for each in inputs):
        return tuple(FAMILIES)
    if any(each.dtype == "float32" for each in inputs):
        return tuple(VALUE_FAMILIES)
    raise DataError(
        f"nothing to corrupt: {_names(inputs)} {'holds' if len(inputs) == 1 else 'hold'} whole numbers that stand for "
        "something, such as tokens; robustness is measured of images and of measured values"
    )


def attackable(inputs: Sequence[Input]) -> Input:
    """The input that attacks change.

    Raises:
        DataError: where there is not exactly one image.
    """
    images = [each for each in inputs if each.is_image]
    if len(images) == 1:
        return images[0]
    reason = "is no image" if len(inputs) == 1 else f"hold {len(images)} images"
    raise DataError(
        f"attacks change pixels of one image, but {_names(inputs)} {reason}; ask for corruptions alone (--attack none)"
    )


def _names(inputs: Sequence[Input]) -> str:
    return ("the input " if len(inputs) == 1 else "the inputs ") + listed(f"'{each.name}'" for each in inputs)


@dataclass(frozen=True)
class Answered:
    """What all models said."""

    labels: Answers
    """Of the samples, (n,)."""
    answers: Mapping[str, Mapping[Condition, Answers]]
    """By model and condition, (n,); attacks that could not be made are not there."""
    failed: Mapping[str, str]
    """Models whose gradients could not be used, and why."""


def ask(
    subjects: Sequence[Subject],
    crafters: Mapping[str, nn.Module],
    data: DecisionData,
    split: Split,
    plan: Plan,
    progress: Progress,
) -> Answered:
    """Answers of models to the samples of a split, clean, corrupted and attacked.

    Args:
        subjects: models that are known to run on the data.
        crafters: float models by name; for attacks.
        data: its train split tells the spread of inputs that are no images.
        split: where the samples come from.
        plan: what to ask.
        progress: told how far it is.

    Raises:
        CompressError: where a model does not run on the data after all.
    """
    chosen = _chosen(split, plan)
    spread = _spread(data, plan)
    used = [name for name in crafters if any(subject.crafter == name for subject in subjects)]
    conditions = len(plan.corruptions) + 1
    parts = list(_parts(chosen, data.inputs))
    total = len(parts) * (conditions * len(subjects) + len(plan.attacked) * (len(used) + len(subjects)))
    found: dict[str, dict[Condition, list[Answers]]] = {subject.name: {} for subject in subjects}
    failed: dict[str, str] = {}
    done = 0

    def answer(subject: Subject, condition: Condition, batch: Batch) -> None:
        nonlocal done
        held = _Held(condition[0], batch)
        said = evaluate_in_onnx(subject.path, held, len(data.classes), plan.batch_size, plan.threads, Silent())
        found[subject.name].setdefault(condition, []).append(said.answers.classes)
        done += 1
        progress.work("robustness", done, total, f"{condition[0]} {condition[1]:g}, {subject.name}")

    all_labels: list[Tensor] = []
    for indices in parts:
        batch = _read(split, indices)
        all_labels.append(batch.labels)
        for condition in (CLEAN, *plan.corruptions):
            inputs = batch.inputs
            if condition is not CLEAN:
                inputs = _corrupted(batch.inputs, data.inputs, condition, indices, spread, plan.seed)
            for subject in subjects:
                answer(subject, condition, batch._replace(inputs=inputs))
        for name in used:
            for condition in plan.attacked:
                if name in failed:
                    break
                try:
                    inputs = _attacked(crafters[name], batch, data.inputs, condition, indices, plan)
                except (ValueError, RuntimeError, ModelError) as error:  # a model is anybody's code
                    failed[name] = first_line(error)
                    break
                done += 1
                progress.work("robustness", done, total, f"{condition[0]} {condition[1]:g}, gradients of {name}")
                for subject in subjects:
                    if subject.crafter == name:
                        answer(subject, condition, batch._replace(inputs=inputs))
    whole = {name: {key: np.concatenate(said) for key, said in each.items()} for name, each in found.items()}
    for subject in subjects:
        if subject.crafter in failed:
            whole[subject.name] = {key: said for key, said in whole[subject.name].items() if key not in plan.attacked}
    return Answered(torch.cat(all_labels).numpy(), whole, failed)


class _Held:
    """A batch in memory as a `compress.data.base.Split`."""

    repeats = True

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.labels, self._batch = name, batch.labels, batch

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        view: int | None = None,
        shard: Shard = WHOLE,
    ) -> Iterator[Batch]:
        """In order, as they are: there is nothing to shuffle, to drop or to share here."""
        assert (seed, drop_last, view, shard) == (None, False, None, WHOLE)
        for start in range(0, len(self), batch_size):
            yield _part(self._batch, slice(start, start + batch_size))

    def take(self, indices: Sequence[int]) -> _Held:
        """The samples at `indices`, in that order."""
        return _Held(self.name, _part(self._batch, list(indices)))


def _part(batch: Batch, which: slice | list[int]) -> Batch:
    inputs = tuple(tensor[which] for tensor in batch.inputs)
    return batch._replace(inputs=inputs, labels=batch.labels[which], indices=batch.indices[which])


def _chosen(split: Split, plan: Plan) -> Sequence[int]:
    wanted = plan.config.samples or len(split)
    return stratified_sample(split.labels.numpy(), wanted, derive_seed(plan.seed, "robustness"))


def _parts(chosen: Sequence[int], inputs: Sequence[Input]) -> Iterator[Sequence[int]]:
    values = sum(math.prod(each.shape) for each in inputs)
    most = max(1, _PART_VALUES // values // _CRAFTED_TOGETHER) * _CRAFTED_TOGETHER
    for start in range(0, len(chosen), most):
        yield chosen[start : start + most]


def _read(split: Split, indices: Sequence[int]) -> Batch:
    return next(iter(split.take(indices).batches(len(indices))))


def _spread(data: DecisionData, plan: Plan) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each feature of the inputs that are to be corrupted as numbers, on the train split."""
    if not set(plan.families) & set(VALUE_FAMILIES):
        return {}
    some = stratified_sample(data.train.labels.numpy(), _MEASURED_SAMPLES, derive_seed(plan.seed, "spread"))
    batch = _read(data.train, some)
    return {
        each.name: (values.mean(0), values.std(0, correction=0))
        for each, values in zip(data.inputs, batch.inputs, strict=True)
        if each.dtype == "float32"
    }


def _corrupted(
    inputs: Inputs,
    given: Sequence[Input],
    condition: Condition,
    indices: Sequence[int],
    spread: Mapping[str, tuple[Tensor, Tensor]],
    seed: int,
) -> Inputs:
    """Images where the family is one of images, else numbers; other inputs stay as they are."""
    family, severity = condition[0], int(condition[1])

    def generators(name: str) -> list[torch.Generator]:
        # By the place in the split, whichever samples were chosen; the same for all severities.
        return [torch.Generator().manual_seed(derive_seed(seed, family, name, index)) for index in indices]

    def one(tensor: Tensor, each: Input) -> Tensor:
        if family in FAMILIES and each.is_image:
            return _on_pixels(tensor, each, lambda pixels: corrupt(pixels, family, severity, generators(each.name)))
        if family in VALUE_FAMILIES and each.dtype == "float32":
            return corrupt_values(tensor, *spread[each.name], family, severity, generators(each.name))
        return tensor

    return tuple(one(tensor, each) for tensor, each in zip(inputs, given, strict=True))


def _on_pixels(images: Tensor, given: Input, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Normalised images after a change of their pixels in [0, 1]."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (given.mean, given.std))
    pixels = (images * std + mean).clamp(0.0, 1.0)
    return (change(pixels) - mean) / std


def _attacked(
    model: nn.Module, batch: Batch, given: Sequence[Input], condition: Condition, indices: Sequence[int], plan: Plan
) -> Inputs:
    """The inputs with the image replaced by what an attack on the model makes of it."""
    attack, epsilon = condition[0], condition[1] / 255
    image = attackable(given)
    place = list(given).index(image)
    reach = Reach.of_pixels(epsilon, image.mean, image.std).to(plan.device)
    found = []
    model.to(plan.device)
    with in_evaluation(model):
        for start in range(0, len(indices), _CRAFTED_TOGETHER):
            part = slice(start, start + _CRAFTED_TOGETHER)
            inputs, labels, *_ = _part(batch, part).to(plan.device)

            def logits(images: Tensor, others: Inputs = inputs) -> Tensor:
                return logits_of(model(*others[:place], images, *others[place + 1 :])).float()

            loss = label_loss_of(logits, labels)
            if attack == "fgsm":
                found.append(fgsm(loss, inputs[place], reach).cpu())
                continue
            first = derive_seed(plan.seed, "pgd", str(condition[1]), indices[start])
            found.append(
                pgd(
                    loss,
                    inputs[place],
                    reach,
                    step=_STEP_SHARE * epsilon / plan.config.steps,
                    steps=plan.config.steps,
                    restarts=plan.config.restarts,
                    generator=torch.Generator().manual_seed(first),
                ).cpu()
            )
    model.cpu()
    return (*batch.inputs[:place], torch.cat(found), *batch.inputs[place + 1 :])
