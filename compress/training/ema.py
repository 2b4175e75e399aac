"""A copy of a model that follows it slowly and answers as the model did on average over its last steps."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from compress.training.average import follow


class MovingAverage(nn.Module):
    """A model whose weights and statistics are a moving average of another's, always in evaluation mode.

    Floating-point buffers, such as the running statistics of norms, are averaged as the weights are; others are copied.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780, eq. 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the weights of `model`; `decay` is that after many steps, above 0 to below 1."""
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay, self._steps = decay, 0
        self.eval()

    def follow(self, model: nn.Module) -> None:
        """Take in the weights of `model`, on the same device, after a step of its optimizer."""
        follow(zip(_tensors(self.model), _tensors(model), strict=True), self._steps, self._decay)
        self._steps += 1

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  # torch's signature
        """Stay in evaluation mode."""
        return super().train(mode=False)

    def get_extra_state(self) -> Tensor:
        """The number of steps so far: a part of the state that no device needs to know."""
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after that many steps."""
        self._steps = int(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
