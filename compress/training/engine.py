"""The one training loop: supervised training, distillation and recovery differ only in their objective.

Everything random in an epoch is seeded by its number, so an epoch's start is described by what a step changes (weights,
optimizer, loss scale, averages), the best weights and the rows so far. They are saved after every epoch; a killed run goes
on there and ends at the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from compress.config import TrainingConfig
from compress.data.base import DecisionData, Split
from compress.errors import TrainingError
from compress.files import canonical_json
from compress.methods.epochs import best, diverged, stalled
from compress.training.average import Average
from compress.training.batchnorm import check_sync, synchronised
from compress.training.failures import astray, explained
from compress.training.loop import Loop
from compress.training.memory import kept_memory
from compress.training.objective import Objective
from compress.training.optimizers import optimizer_of
from compress.training.place import Workplace
from compress.training.precision import Arithmetic
from compress.training.state import Moving, Row, State, digest_of

_NOT_KEPT = ("epochs", "samples_per_second")
_PRECISION, _SETTINGS = "precision", "the settings"
_SAMPLES, _BEGINNING = "the number of samples", "the weights to begin with"
_ALIKE = (_PRECISION, _SETTINGS, _SAMPLES, _BEGINNING)


def fit(objective: Objective, data: DecisionData, config: TrainingConfig, place: Workplace) -> tuple[Row, ...]:
    """Train `objective.model` in place; it ends on the CPU, in evaluation mode, with the weights of its best epoch.

    The best epoch is the one with the highest validation accuracy, of equals the one with the lowest validation loss; of a
    training with a penalty the last one counts as the best.

    Args:
        objective: the model, what learns beside it, and the loss.
        data: training and validation split.
        config: epochs, optimizer, precision and so on.
        place: device, seed, folder for the state, and the processes that train together: each calls this with the same
            arguments, sees its part of every batch, and ends with the same weights.

    Returns:
        A row per epoch: epoch, loss, learning_rate, validation_loss, validation_percent, seconds. Fewer rows than epochs
        where it stopped early.

    Raises:
        TrainingError: where a loss is not finite, training diverges, or memory runs out, naming the epoch and what to try;
            and before any training where a setting asks for what this machine cannot do.
    """
    accelerator = _accelerator(place.device)
    if accelerator.num_processes != place.group.shard.world:
        raise TrainingError(
            f"{accelerator.num_processes} processes were started together, but {place.group.shard.world} train together: start "
            "`compress run` by torchrun, or pass the group of `compress.distributed.joined` to `run`"
        )
    arithmetic = Arithmetic(config.precision, place.device)
    if config.batchnorm == "sync":
        check_sync(place.device, accelerator.num_processes)
    takes_images = any(len(each.shape) == 3 and each.dtype == "float32" for each in data.inputs)
    layout = torch.channels_last if config.channels_last and takes_images else torch.contiguous_format
    objective.to_device(accelerator.device, layout)
    optimizer = optimizer_of(objective, config)
    conditions = _conditions(objective, data, config, accelerator, arithmetic, layout)
    place.group.check_alike({name: conditions[name] for name in _ALIKE})
    # Another number of threads, say, is no reason for a process not to go on where the leader does.
    conditions = {name: str(value) for name, value in place.group.shared(conditions).items()}
    with ExitStack() as prepared:
        if place.device == "cpu":
            prepared.enter_context(kept_memory())
        if config.batchnorm == "sync":
            prepared.enter_context(synchronised(objective))
        if config.compile:
            prepared.enter_context(_compiled(objective.model))
        average = None if config.ema is None else Average(objective.model, config.ema)
        moving = Moving(objective, optimizer, arithmetic.scaler, average)
        with explained(1, min(config.batch_size, len(data.train)), config, arithmetic.precision):
            loop = Loop(moving, arithmetic, accelerator, layout, data, config, place)
        state = State.resume(place.scratch, moving, conditions, place.progress)
        place.group.check_alike({"the number of epochs done": str(len(state.rows))})
        _train(loop, state, moving, data, config, place, arithmetic)
    accelerator.free_memory()  # it remembers what it wrapped
    objective.model.load_state_dict(state.best)
    objective.to_device(torch.device("cpu"), torch.contiguous_format)
    objective.model.eval()
    return tuple({name: value for name, value in row.items() if name not in _NOT_KEPT} for row in state.rows)


def _train(
    loop: Loop,
    state: State,
    moving: Moving,
    data: DecisionData,
    config: TrainingConfig,
    place: Workplace,
    arithmetic: Arithmetic,
) -> None:
    """Epochs until all are done, or no more are of use."""
    if state.rows:
        place.progress.note(f"goes on after epoch {len(state.rows)} of {config.epochs}")
    usual = _most_frequent_percent(data.validation)
    for epoch in range(len(state.rows), config.epochs):
        with explained(epoch + 1, loop.batch_size, config, arithmetic.precision):
            result = loop.epoch(epoch)
            with loop.kept():
                ends = moving.objective.penalty is not None
                state.add(result, moving.objective.model.state_dict(), latest=ends)
        if diverged(state.validated, len(data.classes), usual):
            raise astray(f"in epoch {epoch + 1}", config)
        stops = config.early_stopping is not None and stalled(state.validated, config.early_stopping)
        if (
            epoch + 1 < config.epochs and not stops and place.group.leads
        ):  # after the last one the checkpoint itself is written
            state.save(place.scratch, moving)
        place.progress.epoch(result)
        if stops:
            if epoch + 1 < config.epochs:
                place.progress.note(
                    f"stops after epoch {epoch + 1} of {config.epochs}: the best was epoch {best(state.validated) + 1}"
                )
            return


def _conditions(
    objective: Objective,
    data: DecisionData,
    config: TrainingConfig,
    accelerator: Accelerator,
    arithmetic: Arithmetic,
    layout: torch.memory_format,
) -> Mapping[str, str]:
    """What decides about the bits of a training besides what its steps change."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": str(accelerator.num_processes),
        _PRECISION: arithmetic.precision,
        "memory format": str(layout).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        _SETTINGS: canonical_json(config.model_dump(mode="json", by_alias=True)).decode(),
        _SAMPLES: str(len(data.train)),
        _BEGINNING: digest_of(objective),
    }


def _most_frequent_percent(split: Split) -> float:
    return 100.0 * float(split.labels.bincount().max()) / len(split)


@contextmanager
def _compiled(model: nn.Module) -> Iterator[None]:
    """Inside, calls of `model` run compiled; the names in its state stay what they are, as no wrapper is put around it."""
    model.compile()
    try:
        yield
    finally:
        model._compiled_call_impl = None  # torch has `compile` but no way back


@functools.cache
def _accelerator(device: str) -> Accelerator:
    # Its own mixed precision stays off: it is fixed per process, while ours may differ from stage to stage.
    threads = torch.get_num_threads()
    made = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs()])
    torch.set_num_threads(threads)  # it has its own idea of them where a launcher says how many processes there are
    return made
