"""A split over arrays in memory or mapped from disk; samples become tensors only batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.config.data import Augment
from compress.data.augment import Moves, draw_moves, move
from compress.data.base import Batch, Input
from compress.data.normalise import normalise
from compress.data.splits import Indices, Part

Decode = Callable[[npt.NDArray[Any]], Tensor]
"""From rows of the stored array to a tensor: images (n, c, h, w) in [0, 1], or anything passed through."""


@dataclass(frozen=True)
class Rows:
    """One input of one set of samples, as stored, and how it becomes tensors."""

    input: Input
    stored: npt.NDArray[Any]
    """Shape (n, ...): uint8 stays uint8, a mapped file stays mapped."""
    decode: Decode
    is_image: bool
    """Whether it holds (c, h, w) images in [0, 1], to be normalised and augmented."""

    def tensor(self, indices: Indices, moves: Moves | None) -> Tensor:
        """The samples at `indices`, normalised, and moved where there are moves."""
        # Indexing with an array copies, so that a read-only mapped file never backs a tensor.
        found = self.decode(self.stored[indices])
        if self.input.mean:
            found = normalise(found, self.input.mean, self.input.std)
        return move(found, moves) if moves is not None and self.is_image else found


@dataclass(frozen=True)
class MemorySource:
    """Checked sets of samples, not yet laid out as splits."""

    classes: tuple[str, ...]
    labels: Mapping[str, Indices]
    """Per set, int64, shape (n,)."""
    rows: Mapping[str, tuple[Rows, ...]]
    """Per set, its inputs; the same ones in every set."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a sample consists of, not yet normalised."""
        return tuple(rows.input for rows in self.rows["train"])

    @property
    def images(self) -> frozenset[str]:
        """Names of the inputs that are images in [0, 1]."""
        return frozenset(rows.input.name for rows in self.rows["train"] if rows.is_image)

    def split(self, name: str, part: Part, inputs: Sequence[Input], augment: Augment) -> MemorySplit:
        """One split with these of the inputs, normalised as they say."""
        stored = {rows.input.name: rows for rows in self.rows[part.origin]}
        rows = tuple(replace(stored[given.name], input=given) for given in inputs)
        return MemorySplit(name, rows, self.labels[part.origin], part.indices, augment)


class MemorySplit:
    """Samples `indices` of arrays; a `compress.data.base.Split`."""

    def __init__(self, name: str, rows: tuple[Rows, ...], labels: Indices, indices: Indices, augment: Augment) -> None:
        self.name = name
        self.labels = torch.from_numpy(labels[indices])
        self._rows, self._all_labels, self._indices, self._augment = rows, labels, indices, augment

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def batches(self, batch_size: int, *, seed: int | None = None, drop_last: bool = False) -> Iterator[Batch]:
        """See `compress.data.base.Split`; a sample is augmented the same for a seed whatever the batch size.

        All images of a sample are moved alike, so that what lies at the same place in two of them still does.
        """
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
            indices, of_these = self._indices[chosen.numpy()], moves.of(chosen) if moves is not None else None
            yield Batch(tuple(rows.tensor(indices, of_these) for rows in self._rows), self.labels[chosen])

    def take(self, indices: Sequence[int]) -> MemorySplit:
        """The samples at `indices`, in that order, never augmented."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        return MemorySplit(self.name, self._rows, self._all_labels, chosen, Augment())


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
    """Numbers of any shape (n, ...), unchanged: int32 and int64 as int64, everything else as float32."""
    kind = np.int64 if is_whole(rows.dtype) else np.float32
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=kind))


def is_whole(dtype: np.dtype[Any]) -> bool:
    """Whether an array of this type holds numbers that stand for something, such as tokens, and must stay whole."""
    return dtype.kind == "i" and dtype.itemsize >= 4
