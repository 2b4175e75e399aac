"""A convolution as three: fewer inputs, a smaller convolution, more outputs again. Pure functions.

Tucker-2 of a weight of shape (out, in, h, w): a core of shape (rank_out, rank_in, h, w) between two 1x1 convolutions
(Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
arXiv:1511.06530). There is no closed form for the best one. The truncated higher-order SVD is a start whose squared error
is at most twice the least; alternating between the two sides never worsens it (higher-order orthogonal iteration: De
Lathauwer, De Moor & Vandewalle 2000, "On the Best Rank-1 and Rank-(R1, R2, ..., RN) Approximation of Higher-Order
Tensors", SIAM Journal on Matrix Analysis and Applications 21(4)).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def split_tucker(
    weight: Float[Tensor, "out inp h w"], rank_out: int, rank_in: int, rounds: int = 5
) -> tuple[Float[Tensor, "rank_in inp 1 1"], Float[Tensor, "rank_out rank_in h w"], Float[Tensor, "out rank_out 1 1"]]:
    """Weights of three convolutions that approximate one, close to the least error in the Frobenius norm.

    The core takes stride, padding and dilation, the last takes the bias. The rows of the first and the columns of the
    last are orthonormal.

    Args:
        weight: of a convolution without groups that pads with zeros.
        rank_out: channels between core and last, 1 to min(out, rank_in · h · w).
        rank_in: channels between first and core, 1 to min(inp, rank_out · h · w).
        rounds: how often each side is improved with the other held, 0 or more; 0 leaves the higher-order SVD.

    Returns:
        `first`, `core` and `last`, in the weight's dtype.

    Raises:
        ValueError: where one rank is more than the weight or the other rank has use for.
    """
    out, inp, height, width = weight.shape
    most_out, most_in = min(out, rank_in * height * width), min(inp, rank_out * height * width)
    if not (1 <= rank_out <= most_out and 1 <= rank_in <= most_in):
        raise ValueError(
            f"ranks of {rank_out} outputs and {rank_in} inputs do not fit a weight of shape {tuple(weight.shape)}: "
            f"beside each other they are 1 to {most_out} and 1 to {most_in}"
        )
    tensor = weight.double()
    outputs, inputs = _basis(tensor, rank_out), _basis(tensor.transpose(0, 1), rank_in)
    for _ in range(rounds):
        outputs = _basis(torch.einsum("oihw,ip->ophw", tensor, inputs), rank_out)
        inputs = _basis(torch.einsum("oihw,oq->iqhw", tensor, outputs), rank_in)
    core = torch.einsum("oihw,oq,ip->qphw", tensor, outputs, inputs)
    weights = inputs.T[:, :, None, None], core, outputs[:, :, None, None]
    first, middle, last = (part.to(weight.dtype).contiguous() for part in weights)
    return first, middle, last


def higher_order(
    weight: Float[Tensor, "out inp h w"],
) -> tuple[Float[Tensor, "full_in inp 1 1"], Float[Tensor, "full_out full_in h w"], Float[Tensor, "out full_out 1 1"]]:
    """The whole higher-order SVD, which is exact: what `split_tucker` makes at full ranks without any rounds.

    `first[:b]`, `core[:a, :b]` and `last[:, :a]` are the truncated one of ranks a and b, so that all pairs of ranks cost one
    decomposition.
    """
    out, inp, height, width = weight.shape
    area = height * width
    return split_tucker(weight, min(out, inp * area), min(inp, out * area), rounds=0)


def errors_by_ranks(core: Float[Tensor, "full_out full_in h w"]) -> Float[Tensor, "full_out full_in"]:
    """Relative squared error, 0 to 1, of each truncated higher-order SVD: at [a - 1, b - 1] that of a outputs and b inputs.

    What is kept is a projection of the weight on orthonormal directions, so that what is lost is what the kept part of the
    core does not hold; the sum of both sides' discarded singular values, the usual bound, is never less.

    Args:
        core: of `higher_order`.
    """
    held = core.double().square().sum((2, 3)).cumsum(0).cumsum(1)
    return 1 - held / held[-1, -1].clamp(min=torch.finfo(torch.float64).tiny)


def _basis(tensor: Float[Tensor, "channels ..."], rank: int) -> Float[Tensor, "channels rank"]:
    """Orthonormal directions among the channels that hold most of the tensor."""
    # By the squares: a fraction of an SVD's time, and the digits that it costs are those of directions that hold nothing.
    matrix = tensor.flatten(1)
    axes: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return axes.flip(1)[:, :rank]


def merged_tucker(
    first: Float[Tensor, "rank_in inp 1 1"],
    core: Float[Tensor, "rank_out rank_in h w"],
    last: Float[Tensor, "out rank_out 1 1"],
) -> Float[Tensor, "out inp h w"]:
    """The weight of the one convolution that does what the three do."""
    return torch.einsum("pi,qphw,oq->oihw", first.flatten(1), core, last.flatten(1))


def tucker_cost(
    out: int, inp: int, h: int, w: int, positions_in: int, positions_out: int, rank_out: int, rank_in: int
) -> tuple[int, int]:
    """Multiply-accumulates of a convolution as it is, and as three.

    Args:
        out: output channels.
        inp: input channels.
        h: height of the kernel.
        w: width of the kernel.
        positions_in: input height times input width, where the first of the three is applied.
        positions_out: output height times output width.
        rank_out: channels between core and last.
        rank_in: channels between first and core.

    Returns:
        Multiply-accumulates of the whole convolution and of the three.
    """
    three = inp * rank_in * positions_in + rank_out * (rank_in * h * w + out) * positions_out
    return out * inp * h * w * positions_out, three
