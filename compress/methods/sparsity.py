"""Penalties that draw whole channels towards zero while a model trains. Pure functions, with gradients.

A channel goes through several tensors: the filter that makes it, the factors of norms, and all weights that read it. All of
them together are its group, and only a group that is zero as a whole can be cut without any change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TINY = 1e-12
"""Added to squared norms below a root, whose slope at 0 is infinite."""


def channel_squares(
    weights: Sequence[Float[Tensor, ...]],
    axes: Sequence[int],
    slices: Sequence[Int[Tensor, " _"]],
    roots: Sequence[Int[Tensor, " _"]],
    channels: int,
) -> Float[Tensor, " channels"]:
    """Squared norm of everything that each channel of a group goes through: I_k = Σ ‖w[k]‖²; in the weights' type.

    Args:
        weights: the coupled tensors, at least one, each of any shape of at least one axis.
        axes: of each tensor the axis along which slices follow the channels.
        slices: of each tensor the positions along that axis that the group touches.
        roots: of each of these slices the channel that it follows, 0 to `channels` - 1.
        channels: number of channels of the group.

    Raises:
        ValueError: where the sequences are not equally long.
    """
    total = weights[0].new_zeros(channels)
    for weight, axis, chosen, root in zip(weights, axes, slices, roots, strict=True):
        others = [other for other in range(weight.dim()) if other != axis % weight.dim()]
        squares = weight.square().sum(dim=others) if others else weight.square()
        total = total.index_add(0, root, squares[chosen])
    return total


def relative_strength(squares: Float[Tensor, " channels"], alpha: float = 4.0) -> Float[Tensor, " channels"]:
    """How strongly each channel of a group is drawn to zero, 1 (the largest) to 2^alpha (the smallest); no gradient.

    γ_k = 2^(α (I_max - I_k) / (I_max - I_min)). Channels that matter keep their weights, those that hardly do lose them
    soon. Where all are equal, all have 1.

    Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, the part on group-level
    pruning, with α = 4 as there.

    Args:
        squares: I, the squared norm of each channel.
        alpha: 0 or more; 0 draws at all alike.
    """
    squares = squares.detach()
    spread = squares.max() - squares.min()
    if spread <= 0:
        return torch.ones_like(squares)
    return torch.exp2(alpha * (squares.max() - squares) / spread)


def group_lasso(squares: Float[Tensor, " channels"], strength: Float[Tensor, " channels"]) -> Float[Tensor, ""]:
    """The sum of the channels' norms, each times its strength: Σ γ_k √I_k.

    Unlike a sum of squares it pulls at a small channel as hard as at a large one, so that small ones come to zero as a whole.
    At exactly zero there is no pull.

    Source: Wen, Wu, Wang, Chen, Li 2016, "Learning Structured Sparsity in Deep Neural Networks", arXiv:1608.03665,
    section 3.1; over everything that is coupled, as in DepGraph.

    Args:
        squares: I, the squared norm of each channel, 0 or more.
        strength: γ, 0 or more.
    """
    return (strength * (squares + _TINY).sqrt()).sum()


def growing_decay(squares: Float[Tensor, " channels"], going: Bool[Tensor, " channels"]) -> Float[Tensor, ""]:
    """Half the squared norm of the channels that are to go: ½ Σ I_k, to be multiplied by a factor that grows.

    While the factor grows, channels of equal norm move apart by the curvature of the loss, and what they did moves into those
    that stay.

    Source: Wang, Qin, Zhang, Fu 2021, "Neural Pruning via Growing Regularization", arXiv:2012.09243, section 3.2 (GReg-1).

    Args:
        squares: I, the squared norm of each channel.
        going: which are to go.
    """
    return squares[going].sum() / 2
