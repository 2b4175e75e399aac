"""A split over arrays in memory or mapped from disk; samples become floats only batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.config.data import Augment
from compress.data.augment import draw_moves, move
from compress.data.base import Batch
from compress.data.normalise import normalise
from compress.data.splits import Indices, Part

Decode = Callable[[npt.NDArray[Any]], Tensor]
"""From rows of the stored array to float32 inputs: images (n, c, h, w) in [0, 1], or anything passed through."""


@dataclass(frozen=True)
class MemorySource:
    """Checked sets of samples, not yet laid out as splits."""

    classes: tuple[str, ...]
    labels: Mapping[str, Indices]
    """Per set, int64, shape (n,)."""
    rows: Mapping[str, npt.NDArray[Any]]
    """Per set, shape (n, ...), as stored: uint8 stays uint8, a mapped file stays mapped."""
    decode: Decode
    input_shape: tuple[int, ...]
    is_image: bool
    """Whether inputs are (c, h, w) images in [0, 1], to be normalised and augmented."""

    def split(
        self, name: str, part: Part, mean: tuple[float, ...], std: tuple[float, ...], augment: Augment
    ) -> MemorySplit:
        """One split; `mean` and `std` empty: not normalised."""
        return MemorySplit(
            name, self.rows[part.origin], self.labels[part.origin], part.indices, self.decode, (mean, std), augment
        )


class MemorySplit:
    """Samples `indices` of an array; a `compress.data.base.Split`."""

    def __init__(
        self,
        name: str,
        rows: npt.NDArray[Any],
        labels: Indices,
        indices: Indices,
        decode: Decode,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        augment: Augment,
    ) -> None:
        self.name = name
        self.labels = torch.from_numpy(labels[indices])
        self._rows, self._all_labels, self._indices, self._decode = rows, labels, indices, decode
        self._statistics, self._augment = statistics, augment

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def batches(self, batch_size: int, *, seed: int | None = None, drop_last: bool = False) -> Iterator[Batch]:
        """See `compress.data.base.Split`; a sample is augmented the same for a seed whatever the batch size."""
        assert batch_size >= 1
        order, moves = torch.arange(len(self)), None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self), generator=generator)
            if self._augment != Augment():
                moves = draw_moves(len(self), self._augment, generator)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if drop_last and len(chosen) < batch_size:
                return
            # Indexing with an array copies, so that a read-only mapped file never backs a tensor.
            inputs = self._decode(self._rows[self._indices[chosen.numpy()]])
            if self._statistics[0]:
                inputs = normalise(inputs, *self._statistics)
            if moves is not None:
                inputs = move(inputs, moves.of(chosen))
            yield Batch(inputs, self.labels[chosen])

    def take(self, indices: Sequence[int]) -> MemorySplit:
        """The samples at `indices`, in that order, never augmented."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        return MemorySplit(
            self.name, self._rows, self._all_labels, chosen, self._decode, self._statistics, augment=Augment()
        )


def decode_nhwc(rows: npt.NDArray[Any]) -> Tensor:
    """Images (n, h, w, c) as float32 (n, c, h, w) in [0, 1]."""
    return decode_nchw(rows.transpose(0, 3, 1, 2))


def decode_nhw(rows: npt.NDArray[Any]) -> Tensor:
    """Grey images (n, h, w) as float32 (n, 1, h, w) in [0, 1]."""
    return decode_nchw(rows[:, None])


def decode_nchw(rows: npt.NDArray[Any]) -> Tensor:
    """Images (n, c, h, w), uint8 or float in [0, 1], as contiguous float32 in [0, 1]."""
    images = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    return images.div_(255) if rows.dtype == np.uint8 else images


def decode_any(rows: npt.NDArray[Any]) -> Tensor:
    """Numbers of any shape (n, ...) as float32, unchanged."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
