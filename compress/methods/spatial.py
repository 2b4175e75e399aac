"""A convolution as a vertical one followed by a horizontal one. Pure functions.

A weight of shape (out, in, h, w) becomes `rank` filters of h x 1 over all inputs and `out` filters of 1 x w over those
(Jaderberg, Vedaldi & Zisserman 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions",
arXiv:1405.3866, scheme 2). Such a pair is a matrix of rank `rank` with one row for each output and column of the
kernel, and one column for each input and row of the kernel, so that the truncated SVD gives the best pair in the
Frobenius norm.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compress.methods import lowrank


def spatial_values(weight: Float[Tensor, "out inp h w"]) -> Float[Tensor, " k"]:
    """Singular values of the rearranged weight, descending, float64; k = min(out · w, in · h), the largest rank."""
    return lowrank.singular_values(_rearranged(weight))


def split_spatial(
    weight: Float[Tensor, "out inp h w"], rank: int
) -> tuple[Float[Tensor, "rank inp h 1"], Float[Tensor, "out rank 1 w"]]:
    """Weights of the best pair of a vertical and a horizontal convolution with `rank` channels between them.

    The first takes the vertical part of stride, padding and dilation: (s, 1), (p, 0), (d, 1); the second takes the
    horizontal part. The bias goes to the second. The singular values are shared evenly, as by `lowrank.split`.

    Args:
        weight: of a convolution without groups that pads with zeros.
        rank: 1 to min(out · w, in · h).

    Returns:
        `first` and `second`, in the weight's dtype.
    """
    out, inp, height, width = weight.shape
    first, second = lowrank.split(_rearranged(weight), rank)
    horizontal = second.reshape(out, width, rank).transpose(1, 2)
    return first.reshape(rank, inp, height, 1), horizontal.reshape(out, rank, 1, width).contiguous()


def _rearranged(weight: Float[Tensor, "out inp h w"]) -> Float[Tensor, "rows columns"]:
    """Outputs and columns of the kernel by inputs and rows of the kernel."""
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def merged_spatial(
    first: Float[Tensor, "rank inp h 1"], second: Float[Tensor, "out rank 1 w"]
) -> Float[Tensor, "out inp h w"]:
    """The weight of the one convolution that does what the pair does."""
    merged: Tensor = torch.einsum("rih,orw->oihw", first.squeeze(3), second.squeeze(2))
    return merged


def spatial_cost(
    out: int, inp: int, h: int, w: int, positions_middle: int, positions_out: int, rank: int
) -> tuple[int, int]:
    """Multiply-accumulates of a convolution as it is, and as a vertical and a horizontal one.

    Args:
        out: output channels.
        inp: input channels.
        h: height of the kernel.
        w: width of the kernel.
        positions_middle: output positions of the vertical convolution: output height times input width.
        positions_out: output positions of the whole convolution: output height times output width.
        rank: channels between the two.

    Returns:
        Multiply-accumulates of the whole convolution and of the pair.
    """
    return out * inp * h * w * positions_out, rank * (inp * h * positions_middle + out * w * positions_out)
