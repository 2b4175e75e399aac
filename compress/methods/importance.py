"""Scores of channels as pure functions: a weight in, one number per channel out. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def l1_norm(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Sum of the absolute weights of each channel along `axis`.

    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710,
    section 3.1 (the filter's l1-norm).

    Args:
        weight: any shape of at least one axis.
        axis: the channels' axis, 0 for a layer's output channels, 1 for its input channels.
    """
    others = [other for other in range(weight.dim()) if other != axis]
    magnitudes = weight.abs()
    return magnitudes.sum(dim=others) if others else magnitudes


def sum_by_root(
    scores: Sequence[Float[Tensor, " _"]], roots: Sequence[Int[Tensor, " _"]], channels: int
) -> Float[Tensor, " channels"]:
    """Add up the scores of coupled tensors per channel of the group they belong to.

    Args:
        scores: for each tensor, one score per slice that the group touches.
        roots: for each tensor, the group's channel that each of its slices follows, 0 to `channels` - 1; several
            slices may follow one channel, as after a flattened feature map.
        channels: number of channels of the group.
    """
    total = torch.zeros(channels, dtype=torch.float64)
    for score, root in zip(scores, roots, strict=True):
        total.index_add_(0, root, score.double())
    return total


def lowest(scores: Float[Tensor, " channels"], count: int, blocks: int = 1) -> list[int]:
    """Indices of the `count` lowest scores, ascending; of equal scores the lower index goes first.

    Args:
        scores: one per channel.
        count: how many; a multiple of `blocks`.
        blocks: equal parts of the channels, such as heads of attention, that give equally many each.
    """
    rows = scores.reshape(blocks, -1)
    order = torch.sort(rows, dim=1, stable=True).indices[:, : count // blocks]
    starts = torch.arange(blocks).unsqueeze(1) * rows.shape[1]
    return sorted(int(index) for index in (order + starts).flatten())
