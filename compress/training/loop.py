"""Steps and epochs of one training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.config import TaughtConfig, TrainingConfig
from compress.data.base import Batch, DecisionData
from compress.errors import TrainingError
from compress.events import EpochResult
from compress.methods.schedules import learning_rate
from compress.seeds import derive_seed
from compress.training.batchnorm import freeze
from compress.training.evaluation import evaluate
from compress.training.failures import not_finite
from compress.training.layout import laid_out
from compress.training.mixer import Mixer
from compress.training.parallel import shared
from compress.training.place import Workplace
from compress.training.precision import Arithmetic
from compress.training.state import Moving

_READINGS = 20
"""How often in an epoch the loss is read, at least; each reading makes a GPU wait."""


class Loop:
    """Steps and epochs of one training."""

    def __init__(
        self,
        moving: Moving,
        arithmetic: Arithmetic,
        accelerator: Accelerator,
        layout: torch.memory_format,
        data: DecisionData,
        config: TrainingConfig,
        place: Workplace,
    ) -> None:
        """Take what learns, how it computes, where and from which data."""
        self._moving, self._arithmetic, self._accelerator = moving, arithmetic, accelerator
        self._layout, self._data, self._config, self._place = layout, data, config, place
        self._mixer = Mixer(config, len(data.classes), place.seed)
        self._model = moving.objective.model
        self._group = place.group
        self._world = place.group.shard.world
        self.batch_size = min(config.batch_size, len(data.train))
        if self.batch_size < 2 * self._world and self._world > 1:
            raise TrainingError(
                f"batch_size: {self.batch_size} samples are too few for {self._world} processes, each needs two or more"
            )
        self._parts = min(config.accumulate, max(1, self.batch_size // (2 * self._world)))
        self._steps = len(data.train) // self.batch_size
        self._total_steps = config.epochs * self._steps
        self._last_validation = ""
        self._objective: nn.Module = moving.objective
        if self._world > 1:
            self._objective = shared(moving.objective, accelerator, self._group, self._first_loss)

    def epoch(self, epoch: int) -> EpochResult:
        """Train for an epoch (from 0) and validate what would be kept.

        Raises:
            TrainingError: where a loss is not finite; it is noticed within a twentieth of the epoch.
        """
        started = time.perf_counter()
        loss = self._train(epoch)
        self._group.follow_leader(self._moving.statistics())
        trained = time.perf_counter() - started
        validation_loss, correct = self._validate()
        percent = 100.0 * correct / len(self._data.validation)
        self._last_validation = f", validation {percent:.2f} %"
        # The training loss is taken before each step, so that what the last one did shows on validation only.
        if not math.isfinite(validation_loss):
            raise self._not_finite("the validation loss is", f"in epoch {epoch + 1}")
        if self._arithmetic.lost():
            raise self._not_finite("gradients in fp16 are", f"in epoch {epoch + 1}")
        return EpochResult(
            epoch=epoch + 1,
            epochs=self._config.epochs,
            loss=loss,
            learning_rate=self._learning_rate((epoch + 1) * self._steps - 1),
            validation_loss=validation_loss,
            validation_percent=percent,
            seconds=time.perf_counter() - started,
            samples_per_second=self._steps * self.batch_size / trained,
        )

    def kept(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are validated and kept: its average where there is one."""
        average = self._moving.average
        return nullcontext() if average is None else average.within(self._model)

    def _train(self, epoch: int) -> float:
        """The mean loss of an epoch."""
        standing, between = "", max(1, self._steps // _READINGS)
        total = torch.zeros((), device=self._accelerator.device)
        with self._training(epoch) as seed:
            for step, batch in enumerate(self._batches(epoch, seed)):
                total += self._step(self._mixer.mix(batch, epoch, step), epoch * self._steps + step)
                if step % between == 0:
                    loss = self._mean(total, step + 1)
                    if not math.isfinite(loss):
                        when = f"in epoch {epoch + 1} (by step {step + 1} of {self._steps})"
                        raise self._not_finite("the loss is", when)
                    standing = f"loss {loss:.4f}{self._last_validation}"
                self._place.progress.work(f"epoch {epoch + 1}/{self._config.epochs}", step + 1, self._steps, standing)
        loss = self._mean(total, self._steps)
        if not math.isfinite(loss):
            raise self._not_finite("the loss is", f"in epoch {epoch + 1}")
        return loss

    @contextmanager
    def _training(self, epoch: int) -> Iterator[int]:
        """Inside, everything is in training mode and what is drawn depends on the seed of the epoch, which it gives."""
        seed = derive_seed(self._place.seed, "epoch", epoch)
        self._moving.objective.train()
        if self._config.batchnorm == "frozen":
            freeze(self._moving.objective)
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Dropout of the first sample of one process is not that of the first sample of another.
            rank = self._group.shard.rank
            torch.manual_seed(seed if rank == 0 else derive_seed(seed, "process", rank))
            yield seed

    def _first_loss(self, objective: nn.Module) -> Tensor:
        """What an objective's loss of a part of the first batch would be."""
        with self._training(0) as seed, self._arithmetic.autocast():
            batch = self._mixer.mix(next(self._batches(0, seed)), 0, 0)
            part, _ = next(divided(batch, self._parts))
            loss: Tensor = objective(part, 0.0)
            return loss

    def _batches(self, epoch: int, seed: int) -> Iterator[Batch]:
        cache = self._config.cache if isinstance(self._config, TaughtConfig) else None
        view = epoch % cache.views if cache is not None else None
        batches = self._data.train.batches(
            self.batch_size, seed=seed, drop_last=True, view=view, shard=self._group.shard
        )
        for batch in batches:
            yield laid_out(batch.to(self._accelerator.device), self._layout)

    def _step(self, batch: Batch, step: int) -> Tensor:
        """One step of the optimizer (from 0, over all epochs); the loss before it."""
        moving, scaler = self._moving, self._arithmetic.scaler
        rate, position = self._learning_rate(step), step / max(1, self._total_steps - 1)
        for group in moving.optimizer.param_groups:
            group["lr"] = rate
        moving.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        # The mean over processes, which is what all of them go on with, is then that over the samples of all.
        whole = self._world * len(batch.labels) / self.batch_size
        for part, share in divided(batch, self._parts):
            later = len(losses) + 1 < self._parts and self._world > 1
            with self._accelerator.no_sync(self._objective) if later else nullcontext():
                with self._arithmetic.autocast():
                    loss = self._objective(part, position)
                weighted = loss if whole * share == 1 else whole * share * loss
                self._accelerator.backward(scaler.scale(weighted))
            losses.append(weighted.detach())
        if self._config.gradient_clip is not None:
            scaler.unscale_(moving.optimizer)
            self._accelerator.clip_grad_norm_(moving.objective.parameters(), self._config.gradient_clip)
        scaler.step(moving.optimizer)
        scaler.update()
        moving.objective.after_step()
        if moving.average is not None:
            moving.average.follow(self._model, step)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _validate(self) -> tuple[float, int]:
        # Compiling for evaluation mode, and for the last batch's size, would take longer than it saves.
        eager = torch.compiler.set_stance("force_eager") if self._config.compile else nullcontext()
        with self.kept(), eager:
            return evaluate(self._model, self._data.validation, str(self._accelerator.device), self._group)

    def _mean(self, total: Tensor, steps: int) -> float:
        """The mean loss over steps and processes."""
        return float(self._group.sum(total.clone())) / (steps * self._world)

    def _learning_rate(self, step: int) -> float:
        config = self._config
        return config.learning_rate * learning_rate(
            config.schedule,
            step,
            self._total_steps,
            warm_up=config.warm_up,
            milestones=config.milestones,
            gamma=config.gamma,
        )

    def _not_finite(self, what: str, when: str) -> Exception:
        return not_finite(what, when, self._config, self._arithmetic.precision)


def divided(batch: Batch, parts: int) -> Iterator[tuple[Batch, float]]:
    """A batch in parts as equal as can be, each with its share of the samples (they add up to 1)."""
    if parts == 1:
        yield batch, 1.0
        return
    pieces = [tensor.tensor_split(parts) for tensor in (batch.labels, batch.indices, *batch.inputs)]
    for labels, indices, *inputs in zip(*pieces, strict=True):
        part = batch._replace(labels=labels, indices=indices, inputs=tuple(inputs))
        yield part, len(labels) / len(batch.labels)
