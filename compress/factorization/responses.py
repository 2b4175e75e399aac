"""What layers give out for calibration samples: the moments that activation-aware truncation needs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from compress.data.base import Batch
from compress.methods.whitening import Moments, add_moments
from compress.models.modes import in_evaluation


@torch.no_grad()
def responses(model: nn.Module, layers: Sequence[str], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Moments of the outputs of linear and convolutional layers, over samples and positions, bias included.

    Outputs instead of inputs: of a 3x3 convolution they are nine times fewer numbers, and say the same (see `whitening`).

    Args:
        model: float32, on the CPU.
        layers: names of its layers; one that is called several times adds up.
        batches: calibration samples.

    Returns:
        By name; a layer that is never called has none.
    """
    found: dict[str, Moments] = {}

    def listen(name: str, module: nn.Module, given: object, output: Tensor) -> None:  # noqa: ARG001  # torch's signature
        channels_last = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
        found[name] = add_moments(found.get(name), channels_last)

    with ExitStack() as hooks, in_evaluation(model):
        for name in layers:
            hook = functools.partial(listen, name)
            hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for batch in batches:
            model(*batch.inputs)
    return found
