"""Truncated singular value decomposition of layer weights, and the choice of ranks. Pure functions.

The best approximation of rank r in the Frobenius norm is the truncated SVD (Eckart & Young 1936). Applied to the
(out, in · h · w) matrix of a convolution it gives r filters of the original size followed by a 1x1 convolution
(Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks", arXiv:1505.06798, section 3.1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out rest"]:
    """A linear or convolutional weight as the matrix whose rank matters: outputs by everything else."""
    return weight.flatten(1)


def singular_values(weight: Float[Tensor, "out ..."]) -> Float[Tensor, " k"]:
    """Singular values of the weight's matrix, descending, float64; k = min(out, rest)."""
    values: Tensor = torch.linalg.svdvals(as_matrix(weight).double())
    return values


def split(weight: Float[Tensor, "out ..."], rank: int) -> tuple[Float[Tensor, "rank ..."], Float[Tensor, "out rank"]]:
    """Factors of the best approximation of rank `rank`: `second @ first.flatten(1)` ≈ `weight.flatten(1)`.

    The singular values are shared evenly (square roots on both sides), which keeps both factors in a similar range
    and so suits a later quantization.

    Args:
        weight: (out, in) or (out, in, h, w).
        rank: 1 to min(out, rest).

    Returns:
        `first` of shape (rank, *weight.shape[1:]) and `second` of shape (out, rank), in the weight's dtype.
    """
    left, values, right = torch.linalg.svd(as_matrix(weight).double(), full_matrices=False)
    roots = values[:rank].sqrt()
    first = (roots[:, None] * right[:rank]).reshape(rank, *weight.shape[1:])
    second = left[:, :rank] * roots
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def rank_for_energy(values: Float[Tensor, " k"], energy: float) -> int:
    """Smallest rank whose squared singular values hold the fraction `energy` (0 to 1) of their sum; at least 1."""
    held = values.double().square().cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(values))


def errors_by_rank(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Share of the squared singular values, 0 to 1, that is lost at each of the ranks 1 to k; float64."""
    left = values.double().square().flip(0).cumsum(0).flip(0)
    return torch.cat([left[1:], left.new_zeros(1)]) / left[0].clamp(min=torch.finfo(torch.float64).tiny)


def rounded_rank(rank: int, multiple: int, limit: int) -> int:
    """`rank` rounded up to a multiple, but not above `limit`; at least 1."""
    return max(1, min(-(-rank // multiple) * multiple, limit))


def factor_cost(out: int, rest: int, per_position: int, rank: int) -> tuple[int, int]:
    """Multiply-accumulates of a layer as it is, and as two factors of a rank.

    Args:
        out: output channels.
        rest: input channels times kernel area.
        per_position: output positions (1 for a linear layer on a vector).
        rank: channels between the factors.

    Returns:
        Multiply-accumulates of the whole layer and of the two factors.
    """
    return out * rest * per_position, rank * (out + rest) * per_position
