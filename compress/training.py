"""The one training loop: supervised training, distillation and recovery differ only in their objective.

Everything random in an epoch is seeded by its number, so an epoch's start is described by weights, optimizer state and
best weights alone. They are saved after every epoch; a killed run goes on there and ends at the same bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.config import KDLossConfig, LabelLossConfig, LossEntry, TrainingConfig
from compress.data.base import Batch, DecisionData, Split
from compress.errors import TrainingError
from compress.events import EpochResult, Progress
from compress.files import canonical_json, write_file
from compress.machine import has_fast_bfloat16
from compress.methods.losses import label_loss, soft_label_loss
from compress.methods.schedules import learning_rate
from compress.models.answers import logits_of
from compress.seeds import derive_seed

_EVALUATION_BATCH = 256
_STATE = "training.safetensors"
_LOSSES_SHOWN = 20


@dataclass(frozen=True)
class Workplace:
    """Where and under which seed training happens."""

    device: str
    """'cpu' or 'cuda'."""
    seed: int
    scratch: Path
    """Folder for the state after each epoch."""
    progress: Progress


class Objective(Protocol):
    """What a step minimises."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """A scalar loss from logits (n, classes), float32, and the batch that gave them."""


class WeightedLosses:
    """The sum of the terms that a pipeline lists, each with its weight."""

    def __init__(self, losses: Sequence[LossEntry], teacher: nn.Module | None) -> None:
        """Take the terms, and the teacher that soft labels come from (None where no term needs one)."""
        self._terms = [entry.settings for entry in losses]
        self._teacher = teacher

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """A scalar loss."""
        total = logits.new_zeros(())
        for term in self._terms:
            match term:
                case KDLossConfig():
                    assert self._teacher is not None, "settings refuse soft labels where there is no teacher"
                    with torch.no_grad():
                        answers = logits_of(self._teacher(*batch.inputs)).float()
                    total = total + term.weight * soft_label_loss(logits, answers, term.temperature)
                case LabelLossConfig():
                    total = total + term.weight * label_loss(logits, batch.labels, term.smoothing)
                case _:
                    raise AssertionError(f"the settings know a loss that training does not: {type(term).__name__}")
        return total


def fit(
    model: nn.Module,
    data: DecisionData,
    losses: Sequence[LossEntry],
    teacher: nn.Module | None,
    config: TrainingConfig,
    place: Workplace,
) -> tuple[dict[str, float | int], ...]:
    """Train `model` in place; it ends on the CPU, in evaluation mode, with the weights of its best epoch.

    The best epoch is the one with the highest validation accuracy, of equals the one with the lowest validation loss.

    Args:
        model: classifier from the data's inputs, each (n, ...), to logits (n, classes), perhaps among other outputs.
        data: training and validation split.
        losses: terms of the loss.
        teacher: model that soft labels come from, None where no term needs one; put on the device, not changed.
        config: epochs, optimizer, precision and so on.
        place: device, seed, folder for the state.

    Returns:
        A row per epoch: epoch, loss, learning_rate, validation_loss, validation_percent, seconds.

    Raises:
        TrainingError: where the loss is not finite or memory runs out, naming the epoch and what to try.
    """
    accelerator = _accelerator(place.device)
    takes_images = any(len(each.shape) == 3 and each.dtype == "float32" for each in data.inputs)
    layout = torch.channels_last if config.channels_last and takes_images else torch.contiguous_format
    model.to(device=accelerator.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this form
    if teacher is not None:
        teacher.to(device=accelerator.device, memory_format=layout).eval()  # type: ignore[call-overload]
    optimizer = _optimizer(model, config)
    loop = _Loop(model, WeightedLosses(losses, teacher), optimizer, accelerator, layout, data, config, place)
    state = _State.resume(place.scratch, model, optimizer)
    if state.rows:
        place.progress.note(f"goes on after epoch {len(state.rows)} of {config.epochs}")
    for epoch in range(len(state.rows), config.epochs):
        try:
            result = loop.epoch(epoch)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}: try a smaller batch_size than {config.batch_size}"
            ) from None
        state.add(result, model)
        if epoch + 1 < config.epochs:  # after the last one the checkpoint itself is written
            state.save(place.scratch, model, optimizer)
        place.progress.epoch(result)
    model.load_state_dict(state.best)
    model.cpu().eval()
    if teacher is not None:
        teacher.cpu()
    return tuple(
        {name: value for name, value in row.items() if name not in ("epochs", "samples_per_second")}
        for row in state.rows
    )


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: str) -> tuple[float, int]:
    """Mean cross-entropy and number of correct answers on a split, in float32; `model` must be on `device`."""
    model.eval()
    loss, correct = 0.0, 0
    for batch in split.batches(_EVALUATION_BATCH):
        inputs, labels = batch.to(device)
        logits = logits_of(model(*inputs)).float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(split), correct


class _Loop:
    """Steps and epochs of one training."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        layout: torch.memory_format,
        data: DecisionData,
        config: TrainingConfig,
        place: Workplace,
    ) -> None:
        self.model, self.objective, self.optimizer, self.accelerator = model, objective, optimizer, accelerator
        self.layout, self.data, self.config, self.place = layout, data, config, place
        self.batch_size = min(config.batch_size, len(data.train))
        self.steps = len(data.train) // self.batch_size
        self.autocast = resolved_precision(config.precision, place.device) == "bf16"
        self.last_validation = ""

    def epoch(self, epoch: int) -> EpochResult:
        started = time.perf_counter()
        seed = derive_seed(self.place.seed, "epoch", epoch)
        self.model.train()
        standing = ""
        total = torch.zeros((), device=self.accelerator.device)
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step, batch in enumerate(self._batches(seed)):
                total += self._step(batch, epoch * self.steps + step)
                if step % max(1, self.steps // _LOSSES_SHOWN) == 0:  # reading the loss makes a GPU wait
                    standing = f"loss {float(total) / (step + 1):.4f}{self.last_validation}"
                self.place.progress.work(f"epoch {epoch + 1}/{self.config.epochs}", step + 1, self.steps, standing)
        loss = float(total) / self.steps
        trained = time.perf_counter() - started
        validation_loss, correct = evaluate(self.model, self.data.validation, str(self.accelerator.device))
        self.last_validation = f", validation {100.0 * correct / len(self.data.validation):.2f} %"
        # The training loss is taken before each step, so that what the last one did shows on validation only.
        if not (math.isfinite(loss) and math.isfinite(validation_loss)):
            raise TrainingError(
                f"the loss is not finite in epoch {epoch + 1}: try a lower learning_rate than "
                f"{self.config.learning_rate}, a gradient_clip such as 1.0, or precision: fp32"
            )
        return EpochResult(
            epoch=epoch + 1,
            epochs=self.config.epochs,
            loss=loss,
            learning_rate=self._learning_rate((epoch + 1) * self.steps - 1),
            validation_loss=validation_loss,
            validation_percent=100.0 * correct / len(self.data.validation),
            seconds=time.perf_counter() - started,
            samples_per_second=self.steps * self.batch_size / trained,
        )

    def _batches(self, seed: int) -> Iterator[Batch]:
        for batch in self.data.train.batches(self.batch_size, seed=seed, drop_last=True):
            inputs, labels = batch.to(self.accelerator.device)
            yield Batch(tuple(self._laid_out(tensor) for tensor in inputs), labels)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        image_like = tensor.dim() == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=self.layout) if image_like else tensor

    def _learning_rate(self, step: int) -> float:
        factor = learning_rate(self.config.schedule, step, self.config.epochs * self.steps)
        return self.config.learning_rate * factor

    def _step(self, batch: Batch, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.autocast):
            logits = logits_of(self.model(*batch.inputs))
            loss = self.objective(logits.float(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.config.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return loss.detach()


class _State:
    """What an epoch leaves behind: rows so far and the best weights."""

    def __init__(self, start: str) -> None:
        """Begin at weights with the digest `start`."""
        self.start = start
        self.rows: list[dict[str, float | int]] = []
        self.best: dict[str, Tensor] = {}

    def add(self, result: EpochResult, model: nn.Module) -> None:
        self.rows.append(asdict(result))
        if max(self.rows, key=_quality) is self.rows[-1]:
            self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def save(self, scratch: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)
            }
        rows = canonical_json(self.rows).decode()
        # safetensors takes contiguous tensors of their own memory only.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_file(scratch / _STATE, save(own, metadata={"rows": rows, "start": self.start}))

    @classmethod
    def resume(cls, scratch: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
        """The state after the last saved epoch, put into model and optimizer.

        A new one where none was saved, where it cannot be read, or where it began at other weights than `model` has:
        then it belongs to another training of the same stage.
        """
        state = cls(_digest_of(model))
        path = scratch / _STATE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            if metadata["start"] != state.start:
                return state
            tensors = load_file(path)
            state.rows = json.loads(metadata["rows"])
        except (OSError, SafetensorError):
            return state
        model.load_state_dict(_under("model.", tensors))
        state.best = _under("best.", tensors)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, slot = name.split(".", 1)
            like = parameters[int(index)]
            # The layout of its parameter again: another one computes more slowly, and may round differently.
            value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        return state


def _digest_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _quality(row: dict[str, float | int]) -> tuple[float, float]:
    return float(row["validation_percent"]), -float(row["validation_loss"])


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("no parameter of the model can be trained: each has requires_grad False")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def resolved_precision(precision: str, device: str) -> str:
    """'fp32' or 'bf16': what 'auto' means on a device."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "bf16" if has_fast_bfloat16() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp32"


@functools.cache
def _accelerator(device: str) -> Accelerator:
    # Its own mixed precision stays off: it is fixed per process, while ours may differ from stage to stage.
    return Accelerator(cpu=device == "cpu", mixed_precision="no")
