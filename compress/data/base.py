"""What data looks like to the rest of the project: three splits of batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
"""What a model is called with, positionally, in the order of the data set's inputs; each of shape (n, ...)."""


class Batch(NamedTuple):
    """Inputs as `Input` describes them, images normalised; and int64 labels of shape (n,)."""

    inputs: Inputs
    labels: Tensor
    indices: Tensor
    """int64, shape (n,), on the CPU: positions in the split that the samples come from."""
    view: int | None = None
    """Which of the augmented versions these are, where the epochs take them in turn: 0 where there is but one, None where
    they are drawn anew."""

    def to(self, device: str | torch.device) -> Batch:
        """Inputs and labels on a device."""
        inputs = tuple(tensor.to(device, non_blocking=True) for tensor in self.inputs)
        return self._replace(inputs=inputs, labels=self.labels.to(device, non_blocking=True))

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """The inputs as ONNX Runtime takes them; the batch is on the CPU."""
        return tuple(tensor.numpy() for tensor in self.inputs)


@dataclass(frozen=True)
class Input:
    """One of the tensors that a model takes."""

    name: str
    shape: tuple[int, ...]
    """Shape of one sample, such as (3, 32, 32)."""
    dtype: Literal["float32", "int64"] = "float32"
    """int64 holds numbers that stand for something, such as tokens."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Per channel, for images scaled to [0, 1]; both empty where the input is not normalised."""

    @property
    def is_image(self) -> bool:
        """Whether it holds images: these, and nothing else, are normalised."""
        return bool(self.mean)

    def zeros(self, n: int) -> Tensor:
        """A batch of `n` samples of zeros: where only shapes and types matter."""
        return torch.zeros(n, *self.shape, dtype=torch.int64 if self.dtype == "int64" else torch.float32)


class Shard(NamedTuple):
    """Process `rank` (from 0) of `world`."""

    rank: int
    world: int


WHOLE = Shard(0, 1)
"""One process alone."""


class Split(Protocol):
    """One split: labels known at once, inputs produced batch by batch."""

    name: str
    labels: Tensor
    """int64, shape (n,), from 0."""

    def __len__(self) -> int:
        """Number of samples."""

    @property
    def repeats(self) -> bool:
        """Whether the same seed, or view, gives the same inputs each time: not where the user's own code draws."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        view: int | None = None,
        shard: Shard = WHOLE,
    ) -> Iterator[Batch]:
        """Batches of at most `batch_size` samples, on the CPU.

        Without a seed: in order, not augmented. With one: shuffled and (the train split only) augmented, the same
        for the same seed whatever was drawn before. With a view, its number alone decides how each sample is augmented,
        and the seed only the order. Of a shard, each batch is that process's equal part of the batch of all processes,
        what does not divide going to the first ones; augmentation does not depend on it.
        """

    def take(self, indices: Sequence[int]) -> Split:
        """The samples at `indices`, in that order, as a split that is never augmented."""


@dataclass(frozen=True)
class DecisionData:
    """What stages see: everything but the test split."""

    classes: tuple[str, ...]
    inputs: tuple[Input, ...]
    """In the order in which the model takes them; at least one."""
    train: Split
    validation: Split

    def example(self) -> Inputs:
        """Two training samples, as the model gets them."""
        return next(iter(self.train.take([0, len(self.train) - 1]).batches(2))).inputs


@dataclass(frozen=True)
class Dataset(DecisionData):
    """All three splits; only bench sees this."""

    test: Split

    def for_decisions(self) -> DecisionData:
        """The same without the test split, so that no stage can read it."""
        return DecisionData(self.classes, self.inputs, self.train, self.validation)
