"""From scores of single tensors to an order of channels, within a group and across groups. Pure functions.

The way of a score: `methods.importance` makes one per tensor, `reduced` one per channel of a group, `normalised` lets
groups of different size and kind be compared, and a threshold on the result decides how many channels each group loses.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.methods.importance import sum_by_root

_LEAST_SPREAD = 1e-6
"""Scores that differ by less than this, the largest being 1, count as equal: weights in float32 say no more."""


def reduced(
    scores: Sequence[Float[Tensor, " _"]],
    roots: Sequence[Int[Tensor, " _"]],
    channels: int,
    how: Literal["sum", "mean", "max", "product"],
) -> Float[Tensor, " channels"]:
    """One score per channel of a group from the scores of its coupled tensors; float64.

    Where several slices of one tensor follow a channel, as after a flattened feature map, their scores are always added up
    first; `how` then combines the tensors. A tensor with no slice that follows a channel has no say about it, and a channel
    that no tensor says anything about gets 0.

    Args:
        scores: for each tensor, one score per slice that the group touches, 0 or more.
        roots: for each tensor, the group's channel that each of its slices follows, 0 to `channels` - 1.
        channels: number of channels of the group.
        how: `sum` is `sum_by_root`; `mean` divides that by the number of tensors that say something, so that a group of
            many tensors does not stand out for it; with `max` one tensor that needs the channel is enough, and with
            `product` one that does not. `product` gives the product's root of that number (the geometric mean): where all
            tensors follow all channels the order is the same, and scores of a hundred tensors stay within the range of
            float64.

    Raises:
        ValueError: where `scores` and `roots` are not equally many.
    """
    if how == "sum" or not scores:
        return sum_by_root(scores, roots, channels)
    pairs = list(zip(scores, roots, strict=True))
    added = torch.stack([sum_by_root([score], [root], channels) for score, root in pairs])
    silent = torch.stack([torch.bincount(root, minlength=channels) == 0 for _, root in pairs])
    tensors = (~silent).sum(0)
    if how == "max":
        combined = added.amax(0)  # no score is below the 0 of those that say nothing
    elif how == "mean":
        combined = added.sum(0) / tensors
    else:
        combined = (added.log().masked_fill(silent, 0.0).sum(0) / tensors).exp()
    return combined.masked_fill(tensors == 0, 0.0)


def normalised(
    scores: Float[Tensor, " channels"], how: Literal["none", "mean", "max", "sum", "standardize"]
) -> Float[Tensor, " channels"]:
    """Scores of a group, in the same order, on a scale that other groups share; float64.

    Scores that are all 0 stay 0, and scores that are all equal become equal ones: 1 with `mean` and `max`, 1 / channels
    with `sum`, 0 with `standardize`.

    Args:
        scores: of at least one channel, 0 or more and finite.
        how: `none` leaves them; `mean`, `max` and `sum` divide by the group's, so that a factor on all scores changes
            nothing; `standardize` takes the mean off and divides by the standard deviation (of all channels, not of a
            sample), so that a shift changes nothing either. With `sum` channels of large groups are worth less.
    """
    scores = scores.double()
    if how == "none":
        return scores
    if how == "standardize":
        if scores.max() - scores.min() <= _LEAST_SPREAD * scores.abs().max():
            return torch.zeros_like(scores)
        return (scores - scores.mean()) / scores.std(correction=0)
    whole = {"mean": scores.mean(), "max": scores.max(), "sum": scores.sum()}[how]
    return scores / whole if whole > 0 else scores


def below(scores: Float[Tensor, " channels"], threshold: float) -> int:
    """How many channels of a group score strictly below `threshold`: those that `lowest` gives for this number.

    Source: Liu et al. 2017, "Network Slimming", arXiv:1708.06519, section 3, for one threshold over all layers.

    Args:
        scores: normalised, one per channel.
        threshold: in float64, one of the scores of any group, or infinite.
    """
    return int((scores.double() < threshold).sum())  # in float64: a threshold must not be rounded to the scores' type


def isomorphic(signatures: Mapping[str, Hashable]) -> list[list[str]]:
    """Names with equal signatures together, in the order in which they are first seen: what may be ranked as one.

    Groups that differ in their kinds of layers have scores of different kinds, so that one ranking over all would empty
    some and spare others for no reason of their own.

    Source: Fang, Ma, Mi, Wang 2024, "Isomorphic Pruning for Vision Models", arXiv:2407.04616, section 3.

    Args:
        signatures: for each group's name, what must be equal: the kinds of layers and the axes of its tensors.
    """
    alike: dict[Hashable, list[str]] = {}
    for name, signature in signatures.items():
        alike.setdefault(signature, []).append(name)
    return list(alike.values())
