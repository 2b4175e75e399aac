"""The moving average of a model's weights, which is what is validated and kept where the settings ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                mine.append(self.tensors[name])
                theirs.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        get_ema_multi_avg_fn(decay_after(step, self._decay))(mine, theirs, 0)  # type: ignore[no-untyped-call]

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


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
