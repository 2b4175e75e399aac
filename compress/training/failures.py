"""How training fails, and what to try: only what the settings in force leave to be tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from compress.config import TrainingConfig
from compress.errors import CompressError, DivergedError, TrainingError, first_line

_USUAL_CLIP, _USUAL_WARM_UP = 1.0, 0.05
_COMPILERS = ("torch._dynamo", "torch._inductor")


def not_finite(what: str, when: str, config: TrainingConfig, precision: str) -> DivergedError:
    """The error for a loss that is no number any more.

    Args:
        what: what is not finite.
        when: such as 'in epoch 3 (step 40 of 100)'.
        config: the settings in force.
        precision: what the training computes in.
    """
    exact = [] if precision == "fp32" else ["precision: fp32"]
    return DivergedError(f"{what} not finite {when}: try {_or([*_steadier(config), *exact])}")


def astray(when: str, config: TrainingConfig) -> DivergedError:
    """The error for training that diverges without ever reaching infinity; `when` is such as 'in epoch 3'."""
    return DivergedError(
        f"training diverges {when}: three times in a row the validation loss is over ten times that of guessing, with no "
        f"more right answers than guessing, and does not fall: try {_or(_steadier(config))}"
    )


@contextmanager
def explained(epoch: int, batch_size: int, config: TrainingConfig, precision: str) -> Iterator[None]:
    """Turn what the memory and the compiler raise inside into a clear error.

    Args:
        epoch: from 1.
        batch_size: samples of a step.
        config: the settings in force.
        precision: what the training computes in.

    Raises:
        TrainingError: instead of those.
    """
    try:
        with out_of_memory_as(_out_of_memory(epoch, batch_size, config, precision)):
            yield
    except RuntimeError as error:
        if "finished reduction in the prior iteration" in str(error):  # DistributedDataParallel waits for all gradients
            raise TrainingError(
                "the model leaves parameters out in some steps (layers dropped at random?), which several processes cannot train "
                "together: switch that off in its kwargs, or train in one process"
            ) from error
        if config.compile and any(kind.__module__.startswith(_COMPILERS) for kind in type(error).__mro__):
            raise TrainingError(
                f"compile: the model cannot be compiled here: {first_line(error)}; set it to false"
            ) from error
        raise


@contextmanager
def out_of_memory_as(told: CompressError) -> Iterator[None]:
    """Raise `told` instead of what torch and Python raise inside where memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise told from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch's CPU allocator says it
            raise
        raise told from error


def _out_of_memory(epoch: int, batch_size: int, config: TrainingConfig, precision: str) -> TrainingError:
    remedies = []
    if 4 * config.accumulate <= batch_size:
        remedies.append(f"accumulate: {2 * config.accumulate} (the same step in more, smaller parts)")
    remedies.append(f"a smaller batch_size than {batch_size}")
    if precision == "fp32":
        remedies.append("precision: bf16")
    return TrainingError(f"out of memory in epoch {epoch}: try {_or(remedies)}")


def _steadier(config: TrainingConfig) -> list[str]:
    remedies = [f"a lower learning_rate than {config.learning_rate}"]
    if config.gradient_clip is None:
        remedies.append(f"a gradient_clip such as {_USUAL_CLIP}")
    if config.schedule != "one_cycle" and config.warm_up == 0:
        remedies.append(f"a warm_up such as {_USUAL_WARM_UP}")
    return remedies


def _or(remedies: Sequence[str]) -> str:
    if len(remedies) <= 2:
        return " or ".join(remedies)
    return f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
