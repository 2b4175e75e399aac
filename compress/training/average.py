"""The moving average of a model's weights, which is what is validated and kept where the settings ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from compress.methods.averages import decay_after


class Average:
    """An exponential moving average of weights and buffers, on the model's device.

    Whole numbers, such as how many batches a norm has seen, are no averages: they are the model's last.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the weights of `model`."""
        self.tensors: dict[str, Tensor] = _copied(model)
        self._decay = decay

    def follow(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after training step `step` (from 0)."""
        follow(((self.tensors[name], tensor) for name, tensor in model.state_dict().items()), step, self._decay)

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights; afterwards its own again, to the bit."""
        # A copy of the model would also copy hooks, and what they hold.
        own = _copied(model)
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)


@torch.no_grad()
def follow(pairs: Iterable[tuple[Tensor, Tensor]], steps: int, decay: float) -> None:
    """Take one step's tensors into their averages, in place; what is no fraction is copied.

    Args:
        pairs: average and tensor, on one device.
        steps: how many were taken in before, from 0.
        decay: that after many steps, above 0 to below 1.
    """
    averages: list[Tensor] = []
    tensors: list[Tensor] = []
    for average, tensor in pairs:
        if average.is_floating_point():
            averages.append(average)
            tensors.append(tensor)
        else:
            average.copy_(tensor)
    get_ema_multi_avg_fn(decay_after(steps, decay))(averages, tensors, 0)  # type: ignore[no-untyped-call]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
