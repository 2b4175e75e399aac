"""Spatial and Tucker splits that look at what a convolution sees: at a sample of its patches. Pure functions.

A patch is a row of `whitening.convolution_rows`. With C, the covariance of patches, the error that counts is
tr((W - W') C (W - W')ᵀ), as everywhere in `whitening`; what the mean loses goes into the bias. For two or three
convolutions there is no closed form of its least value, as there is for the channel split. The splits here minimise it
as if the pixels of a patch were uncorrelated and alike: C = c ⊗ I with c the covariance of the input channels. Then it is
the squared norm of the weight with its input channels multiplied by the root of c, which the plain splits minimise (as
far as they do); the first of the factors undoes the root. How good the assumption is differs by layer, hence `lost`
measures what really happens, and whoever splits takes the better one of this and the plain split.

The same weighting for linear layers: Hsu et al. 2022, "Language model compression with weighted low-rank factorization",
arXiv:2207.00112 (by Fisher information); Wang et al. 2024, "SVD-LLM", arXiv:2403.07378 (by the root of the inputs' moment).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.methods import lowrank
from compress.methods.spatial import split_spatial
from compress.methods.tucker import higher_order, split_tucker

_RIDGE = 1e-4
"""The least variance of a direction among the channels, of the mean one: what was never seen must not get any weight."""

Tucker = tuple[Tensor, Tensor, Tensor]
"""First, core and last, as `tucker.split_tucker` gives them."""


@dataclass(frozen=True, eq=False)
class ChannelRoot:
    """The root of the covariance of a layer's input channels, and its inverse; symmetric, float64."""

    root: Float[Tensor, "inp inp"]
    inverse: Float[Tensor, "inp inp"]

    def weighed(self, weight: Float[Tensor, "out inp h w"]) -> Float[Tensor, "out inp h w"]:
        """The weight whose plain norm is the error that counts; float64."""
        found: Tensor = torch.einsum("oihw,ij->ojhw", weight.double(), self.root)
        return found

    def undone(self, first: Float[Tensor, "rank inp h w"]) -> Float[Tensor, "rank inp h w"]:
        """The first factor of a split of what `weighed` gave, for inputs as they are; float64."""
        found: Tensor = torch.einsum("rihw,ij->rjhw", first.double(), self.inverse)
        return found


def channel_root(rows: Float[Tensor, "rows features"], inp: int) -> ChannelRoot:
    """The root for a layer, from a sample of its patches.

    Args:
        rows: the patches, with inp · h · w features.
        inp: input channels. The identity stands for channels that never varied.
    """
    pixels = rows.double().reshape(len(rows), inp, -1).transpose(1, 2).flatten(0, 1)
    energies, axes = torch.linalg.eigh(torch.cov(pixels.T, correction=0).reshape(inp, inp))
    mean = energies.mean().item()
    roots = energies.clamp(min=_RIDGE * mean).sqrt() if mean > 0 else torch.ones_like(energies)
    return ChannelRoot(axes * roots @ axes.T, axes / roots @ axes.T)


def split_spatial_seen(
    weight: Float[Tensor, "out inp h w"], seen: ChannelRoot, rank: int
) -> tuple[Float[Tensor, "rank inp h 1"], Float[Tensor, "out rank 1 w"]]:
    """`split_spatial` of the weight as its inputs weigh it.

    Args:
        weight: of a convolution without groups that pads with zeros.
        seen: of its inputs.
        rank: 1 to min(out · w, in · h).

    Returns:
        Factors as from `split_spatial`, in the weight's dtype; those of a lower rank are the leading part of them.
    """
    first, second = split_spatial(seen.weighed(weight), rank)
    return seen.undone(first).to(weight.dtype).contiguous(), second.to(weight.dtype)


def split_tucker_seen(
    weight: Float[Tensor, "out inp h w"], seen: ChannelRoot, rank_out: int, rank_in: int, rounds: int = 5
) -> tuple[Float[Tensor, "rank_in inp 1 1"], Float[Tensor, "rank_out rank_in h w"], Float[Tensor, "out rank_out 1 1"]]:
    """`split_tucker` of the weight as its inputs weigh it; arguments, result and errors are those of that."""
    first, core, last = split_tucker(seen.weighed(weight), rank_out, rank_in, rounds)
    parts = seen.undone(first), core, last
    found, middle, end = (part.to(weight.dtype).contiguous() for part in parts)
    return found, middle, end


def higher_order_seen(
    weight: Float[Tensor, "out inp h w"], seen: ChannelRoot
) -> tuple[Float[Tensor, "full_in inp 1 1"], Float[Tensor, "full_out full_in h w"], Float[Tensor, "out full_out 1 1"]]:
    """`tucker.higher_order` of the weight as its inputs weigh it; float64."""
    first, core, last = higher_order(seen.weighed(weight))
    return seen.undone(first), core, last


def lost(
    weight: Float[Tensor, "out inp h w"],
    approximation: Float[Tensor, "out inp h w"],
    rows: Float[Tensor, "rows features"],
) -> float:
    """Relative squared error of the outputs for these patches, their mean kept by the bias; 0 or more.

    It is what `whitening.output_error` finds with the patches' covariance, without making that.

    Args:
        weight: of the whole convolution.
        approximation: W', of the same shape.
        rows: the patches, with in · h · w features.

    Returns:
        0 where no output changes; infinite where only the weight as it was gives the same for all patches.
    """
    centred = _centred(rows)
    change = lowrank.as_matrix(weight.double() - approximation.double())
    return _ratio(centred @ change.T, centred @ lowrank.as_matrix(weight).double().T)


def lost_by_spatial(
    weight: Float[Tensor, "out inp h w"],
    first: Float[Tensor, "most inp h 1"],
    second: Float[Tensor, "out most 1 w"],
    rows: Float[Tensor, "rows features"],
    ranks: Sequence[int],
) -> list[float]:
    """`lost` of the leading part of a spatial split, at each of these ranks, for little more than the price of one.

    Args:
        weight: of the whole convolution.
        first: of a split at the largest of the ranks, or a larger one.
        second: of the same.
        rows: the patches.
        ranks: ascending, at least 1.
    """
    centred = _centred(rows)
    whole = centred @ lowrank.as_matrix(weight).double().T
    patches = centred.reshape(len(rows), *weight.shape[1:])
    middle = torch.einsum("nihw,rih->nwr", patches, first.squeeze(3).double())
    horizontal, left = second.squeeze(2).double(), whole
    errors, done = [], 0
    for rank in ranks:
        left = left - torch.einsum("nwr,orw->no", middle[:, :, done:rank], horizontal[:, done:rank])
        errors.append(_ratio(left, whole))
        done = rank
    return errors


def lost_by_tucker(
    weight: Float[Tensor, "out inp h w"],
    parts: Tucker,
    rows: Float[Tensor, "rows features"],
    pairs: Sequence[tuple[int, int]],
) -> list[float]:
    """`lost` of the leading part of a higher-order SVD, at each of these pairs of ranks.

    Args:
        weight: of the whole convolution.
        parts: of `higher_order` or `higher_order_seen`.
        rows: the patches.
        pairs: ranks of outputs and of inputs.
    """
    first, core, last = (part.double() for part in parts)
    centred = _centred(rows)
    whole = centred @ lowrank.as_matrix(weight).double().T
    patches = centred.reshape(len(rows), weight.shape[1], -1)
    inner: Tensor = torch.einsum("nix,pi->npx", patches, first.flatten(1))
    errors = []
    for rank_out, rank_in in pairs:
        found = inner[:, :rank_in].flatten(1) @ core[:rank_out, :rank_in].flatten(1).T
        errors.append(_ratio(whole - found @ last[:, :rank_out].flatten(1).T, whole))
    return errors


def _centred(rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
    return rows.double() - rows.double().mean(0)


def _ratio(change: Tensor, whole: Tensor) -> float:
    below, above = whole.square().sum().item(), change.square().sum().item()
    if above == 0.0:
        return 0.0
    return above / below if below else math.inf
