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
from compress.data.base import WHOLE, Batch, Input, Shard
from compress.data.normalise import normalise
from compress.data.order import grouped, shuffled, view_seed
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
    drawn: frozenset[str] = frozenset()
    """Sets whose samples the user's own code makes, one by one: it may make others the next time."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a sample consists of, not yet normalised."""
        return tuple(rows.input for rows in self.rows["train"])

    @property
    def images(self) -> frozenset[str]:
        """Names of the inputs that are images in [0, 1]."""
        return frozenset(rows.input.name for rows in self.rows["train"] if rows.is_image)

    def split(self, name: str, part: Part, inputs: Sequence[Input], augment: Augment, seed: int) -> MemorySplit:
        """One split with these of the inputs, normalised as they say; the seed draws its augmented views."""
        stored = {rows.input.name: rows for rows in self.rows[part.origin]}
        rows = tuple(replace(stored[given.name], input=given) for given in inputs)
        repeats = part.origin not in self.drawn
        return MemorySplit(name, rows, self.labels[part.origin], part.indices, augment, seed, repeats=repeats)


class MemorySplit:
    """Samples `indices` of arrays; a `compress.data.base.Split`."""

    def __init__(
        self,
        name: str,
        rows: tuple[Rows, ...],
        labels: Indices,
        indices: Indices,
        augment: Augment,
        seed: int,
        *,
        repeats: bool,
    ) -> None:
        self.name, self.repeats = name, repeats
        self.labels = torch.from_numpy(labels[indices])
        self._rows, self._all_labels, self._indices, self._augment = rows, labels, indices, augment
        self._seed = seed

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        view: int | None = None,
        shard: Shard = WHOLE,
    ) -> Iterator[Batch]:
        """See `compress.data.base.Split`; a sample is augmented the same for a seed or view whatever the batch size.

        All images of a sample are moved alike, so that what lies at the same place in two of them still does.
        """
        order, generator = shuffled(len(self), seed)
        is_moved = self._augment != Augment()
        if view is not None:
            generator.manual_seed(view_seed(self._seed, view))
        drawn = is_moved and (view is not None or seed is not None)
        moves = draw_moves(len(self), self._augment, generator) if drawn else None
        for chosen in grouped(order, batch_size, drop_last=drop_last, shard=shard):
            indices, of_these = self._indices[chosen.numpy()], moves.of(chosen) if moves is not None else None
            inputs = tuple(rows.tensor(indices, of_these) for rows in self._rows)
            yield Batch(inputs, self.labels[chosen], chosen, view if is_moved else 0)

    def take(self, indices: Sequence[int]) -> MemorySplit:
        """The samples at `indices`, in that order, never augmented."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        return MemorySplit(self.name, self._rows, self._all_labels, chosen, Augment(), self._seed, repeats=self.repeats)


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
