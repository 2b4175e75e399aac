"""What data looks like to the rest of the project: three splits of batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """Normalised float32 inputs of shape (n, *input_shape), and int64 labels of shape (n,)."""

    inputs: Tensor
    labels: Tensor


class Split(Protocol):
    """One split: labels known at once, inputs produced batch by batch."""

    name: str
    labels: Tensor
    """int64, shape (n,), from 0."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, batch_size: int, *, seed: int | None = None, drop_last: bool = False) -> Iterator[Batch]:
        """Batches of at most `batch_size` samples, on the CPU.

        Without a seed: in order, not augmented. With one: shuffled and (the train split only) augmented, the same
        for the same seed whatever was drawn before.
        """

    def take(self, indices: Sequence[int]) -> Split:
        """The samples at `indices`, in that order, as a split that is never augmented."""


@dataclass(frozen=True)
class DecisionData:
    """What stages see: everything but the test split."""

    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    """Shape of one sample, such as (3, 32, 32)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, for inputs scaled to [0, 1]; both empty where inputs are not normalised."""
    train: Split
    validation: Split


@dataclass(frozen=True)
class Dataset(DecisionData):
    """All three splits; only bench sees this."""

    test: Split

    def for_decisions(self) -> DecisionData:
        """The same without the test split, so that no stage can read it."""
        return DecisionData(self.classes, self.input_shape, self.mean, self.std, self.train, self.validation)
