"""Whose statistics batch norms use while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.data.base import Batch
from compress.errors import TrainingError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def freeze(model: nn.Module) -> None:
    """Put the batch norms of a model in training mode back into evaluation mode: their statistics stay as they are.

    Their weights and biases still learn.
    """
    for module in _batch_norms(model):
        module.eval()


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Let batch norms find their statistics anew: the means over these batches; weights stay as they are.

    After surgery the statistics are still those of the whole network (Li et al. 2020, "EagleEye", arXiv:2007.02491,
    section 3.2, adaptive batch normalization).

    Args:
        model: on the device of the batches; it ends in evaluation mode.
        batches: of some dozen samples each, at least one batch.

    Returns:
        Whether there are any such norms.
    """
    norms = [module for module in _batch_norms(model) if module.track_running_stats]
    model.eval()
    if not norms:
        return False
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches count the same
        norm.train()
    for batch in batches:
        model(*batch.inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return True


def check_sync(device: str, processes: int) -> None:
    """Check that there are several processes on GPUs to take statistics over.

    Raises:
        TrainingError: where there are not.
    """
    if device != "cuda":
        raise TrainingError(
            "batchnorm: 'sync' needs CUDA devices, but training is on the CPU; use 'frozen', or 'train' for statistics of "
            "each process"
        )
    if processes < 2:
        raise TrainingError("batchnorm: 'sync' is for several processes, but there is one; use 'train'")


@contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Inside, the batch norms of `model` take statistics over all processes; afterwards they are what they were.

    Raises:
        TrainingError: where one is of a class of its own, whose forward pass would be lost.
    """
    found = [(module, type(module)) for module in _batch_norms(model) if type(module) is not nn.SyncBatchNorm]
    for _, kind in found:
        if kind not in _PLAIN:
            raise TrainingError(f"batchnorm: 'sync' knows batch norms of torch only, not {kind.__name__}; use 'frozen'")
    # The class changes in place: `convert_sync_batchnorm` makes new modules, without the hooks that others hang on them.
    for module, _ in found:
        module.__class__, module.process_group = nn.SyncBatchNorm, None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in found:
            module.__class__ = kind
            del module.process_group


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))
