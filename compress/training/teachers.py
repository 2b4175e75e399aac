"""Who answers for the teacher: a model, several of them, or a file that remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compress.data.base import Batch
from compress.methods.losses.ensemble import mean_logits, mean_probabilities
from compress.models.answers import logits_of
from compress.training.layers import listening


class Teacher(Protocol):
    """Answers of somebody who does not learn."""

    def to(self, device: torch.device, layout: torch.memory_format) -> None:
        """Go to a device before training, and back to the CPU after it."""

    def logits(self, batch: Batch, temperature: float) -> Tensor:
        """Logits (n, classes), float32, without gradient, for a batch on the device.

        `softmax(logits / temperature)` is what the teacher finds at that temperature: for several teachers whose
        probabilities are averaged, these are the logits that give the mean.
        """


class OneTeacher:
    """A model as teacher, in evaluation mode; a `Teacher`. However many terms ask about a batch, it answers once."""

    def __init__(self, model: nn.Module, layers: Sequence[str] = ()) -> None:
        """Take the model, and the names of the layers whose outputs will be asked for as well."""
        self.model = model.eval()
        self._layers = layers
        self._asked: Batch | None = None
        self._logits: Tensor
        self._features: Mapping[str, Tensor]

    def to(self, device: torch.device, layout: torch.memory_format) -> None:
        """See `Teacher`."""
        self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this form
        self._asked = None

    def logits(self, batch: Batch, temperature: float) -> Tensor:  # noqa: ARG002  # one teacher answers the same at any
        """See `Teacher`."""
        self._ask(batch)
        return self._logits

    def features(self, batch: Batch) -> Mapping[str, Tensor]:
        """What its layers give out for a batch, by name."""
        self._ask(batch)
        return self._features

    @torch.no_grad()
    def _ask(self, batch: Batch) -> None:
        if batch is self._asked:
            return
        with listening(self.model, self._layers) as self._features:
            self._logits = logits_of(self.model(*batch.inputs)).float()
        self._asked = batch


class Ensemble:
    """Several teachers as one; a `Teacher`."""

    def __init__(
        self, members: Sequence[Teacher], shares: Sequence[float], average: Literal["probabilities", "logits"]
    ) -> None:
        """Take the teachers, the part of each in the mean (divided by their sum), and what is averaged."""
        self._members, self._shares, self._average = members, shares, average

    def to(self, device: torch.device, layout: torch.memory_format) -> None:
        """See `Teacher`."""
        for member in self._members:
            member.to(device, layout)

    @torch.no_grad()
    def logits(self, batch: Batch, temperature: float) -> Tensor:
        """See `Teacher`."""
        answers = [member.logits(batch, temperature) for member in self._members]
        if self._average == "logits":
            return mean_logits(answers, self._shares)
        return mean_probabilities(answers, self._shares, temperature)
