"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from compress.config import TrainingConfig
from compress.errors import TrainingError

# _NormBase is what batch and instance norms of torch share; its own public name does not exist.
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_BETA_2 = 0.999


def optimizer_of(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer for what can be trained, in the order of the parameters; what decays comes first.

    Raises:
        TrainingError: where nothing can be trained.
    """
    spared = set(_without_decay(model))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p not in spared], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("no parameter of the model can be trained: each has requires_grad False")
    rate, momentum = config.learning_rate, config.momentum
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
        case "adam":
            return torch.optim.Adam(groups, lr=rate, betas=(momentum, _BETA_2))
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=(momentum, _BETA_2))
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=momentum)


def _without_decay(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of norms, whatever their shape; biases; and every other vector or number."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias" or parameter.dim() <= 1:
                yield parameter
