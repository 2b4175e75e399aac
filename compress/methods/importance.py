"""Scores of channels as pure functions: a weight in, one number per channel out. The lowest scores go first.

Scores are 0 or more. All but `l1_norm`, which keeps the weight's type, are computed in float64 and given so, since sums over
many small squares decide the order. `axis` is the channels' axis everywhere: 0 for a layer's output channels, 1 for its
input channels, negative from the end. How scores are brought together and compared stands in `methods.ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.methods.losses.precision import at_least_single

_ROWS_AT_ONCE = 1024
"""Channels whose distances to all others are held at once."""


def l1_norm(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Sum of the absolute weights of each channel along `axis`.

    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710,
    section 3.1 (the filter's l1-norm).

    Args:
        weight: any shape of at least one axis.
        axis: the channels' axis, 0 for a layer's output channels, 1 for its input channels.
    """
    others = [other for other in range(weight.dim()) if other != axis % weight.dim()]
    magnitudes = weight.abs()
    return magnitudes.sum(dim=others) if others else magnitudes


def l2_norm(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Euclidean norm of the weights of each channel along `axis`.

    Beside the sum of magnitudes it counts one large weight for more than many small ones.

    Source: He, Kang, Dong, Fu, Yang 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
    arXiv:1808.06866, section 3.2 (filter selection, with p = 2).

    Args:
        weight: any shape of at least one axis.
        axis: the channels' axis.
    """
    norms: Tensor = torch.linalg.vector_norm(_rows(weight, axis), dim=1, dtype=torch.float64)
    return norms


def geometric_median(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Sum of the Euclidean distances from a channel's weights to those of all others: low where others can replace it.

    A shift of all channels by the same weights changes nothing, and a channel of zeros is worth as much as its place among
    the others. Distances come from products of matrices, so that of two equal channels may be off by about 1e-8 of the
    largest distance. Takes channels² × weights per channel products: 2 s on one core for 2048 × 4608, and for those
    0.2 GB beside the weight.

    Source: He, Liu, Wang, Hu, Yang 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration" (FPGM), arXiv:1811.00250, eqs. 5 and 6.

    Args:
        weight: any shape of at least one axis.
        axis: the channels' axis; a single channel has the score 0.
    """
    rows = _rows(weight, axis)
    rows = rows - rows.mean(0, dtype=torch.float64)  # products of centred rows lose fewer digits
    return torch.cat([torch.cdist(some, rows).sum(1) for some in torch.split(rows, _ROWS_AT_ONCE)])


def lamp(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Squared norm of a channel over the sum of those that would be left with it: ‖w_j‖² / Σ ‖w_k‖², over k not below j.

    Scores are 0 to 1. The largest channel gets 1, so that one ranking over several tensors empties none before the others
    have come to their last channel. The order is that of `l2_norm`; of equal channels the lower index counts as the smaller
    one, as it does in `lowest`. A tensor of zeros gets zeros.

    The paper scores single weights; here a channel's squared norm takes the place of a squared weight.

    Source: Lee, Park, Mo, Ahn, Shin 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv:2010.07611,
    section 2 (the LAMP score).

    Args:
        weight: any shape of at least one axis.
        axis: the channels' axis.
    """
    norms, order = torch.sort(l2_norm(weight, axis), stable=True)
    squares = norms.square()
    left = squares.flip(0).cumsum(0).flip(0)  # summed from the largest down: nothing cancels
    scores = torch.empty_like(squares)
    scores[order] = squares / left.clamp(min=torch.finfo(left.dtype).tiny)
    return scores


def taylor(weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"], axis: int) -> Float[Tensor, " channels"]:
    """Squared change of the loss, to first order, that removing a channel's weights would bring: (Σ w · g)².

    The sum over the channel comes before the square, as for weights that go together. Over several batches take the mean of
    the results: in the mean of the gradients batches of opposite signs would cancel, and at a minimum nothing be left. Each
    of several tensors of a group is scored as if it went alone.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, "Importance Estimation for Neural Network Pruning",
    arXiv:1906.10771, eq. 8.

    Args:
        weight: any shape of at least one axis.
        gradient: of the mean loss of one batch with respect to `weight`, not scaled for mixed precision.
        axis: the channels' axis.
    """
    return _rows(weight.double() * gradient.double(), axis).sum(1).square()


def obd(
    weight: Float[Tensor, "*shape"], squared_gradient: Float[Tensor, "*shape"], axis: int
) -> Float[Tensor, " channels"]:
    """Rise of the loss, to second order, that removing a channel's weights would bring: ½ Σ h · w².

    The paper has the diagonal of the Hessian as h and a network at a minimum, where the first order is nothing. In place of
    the Hessian this takes the diagonal of the empirical Fisher matrix, the mean of squared gradients, which is never negative
    and comes near it only for a negative log-likelihood (cross-entropy) and a network that fits its data. Near a minimum,
    squared gradients of batches instead of single samples are smaller by about the batch size, for all channels alike.

    Sources: LeCun, Denker, Solla 1990, "Optimal Brain Damage" (NIPS 2), the saliency s = h u² / 2; Theis, Korshunova, Tejani,
    Huszár 2018, "Faster gaze prediction with dense networks and Fisher pruning", arXiv:1801.05787, for the Fisher matrix.

    Args:
        weight: any shape of at least one axis.
        squared_gradient: mean over samples, or over batches of one size, of the squared gradient of the loss with respect
            to `weight`; 0 or more.
        axis: the channels' axis.
    """
    return _rows(squared_gradient.double() * weight.double().square(), axis).sum(1) / 2


def scale(weight: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    """Size of the factor that a normalisation layer multiplies each channel by: |γ|.

    Says much where training drew the factors towards 0, as in the paper, and less where it did not.

    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, "Learning Efficient Convolutional Networks through Network Slimming",
    arXiv:1708.06519, section 3.

    Args:
        weight: the layer's factors, one per channel.
    """
    return weight.double().abs()


def mean_magnitude(output: Float[Tensor, ...], axis: int) -> Float[Tensor, " channels"]:
    """Mean absolute output of each channel, over samples and places: low where a channel is hardly ever active.

    The paper takes the mean behind a ReLU, where the two are the same; without one, large outputs of both signs would cancel.
    Over batches of different sizes the means count by their numbers of samples. Summed in float32 at least, not float64, for
    the memory of large outputs.

    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", arXiv:1611.06440, section 2.2 (mean activation).

    Args:
        output: a batch of what the layer gives out: (n, channels, ...) or (n, ..., channels).
        axis: the channels' axis, 1 or -1.
    """
    magnitudes = at_least_single(output).abs().unsqueeze(-1)  # so that there is an axis besides the channels'
    others = [other for other in range(magnitudes.dim()) if other != axis % output.dim()]
    return magnitudes.mean(dim=others).double()


def random(channels: int, seed: int) -> Float[Tensor, " channels"]:
    """Uniform scores from 0 to below 1: what any other score has to beat. Reads and changes no global random state.

    Args:
        channels: how many, 0 or more.
        seed: the same one gives the same scores, so groups of one size need different ones.
    """
    return torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def _rows(weight: Float[Tensor, ...], axis: int) -> Float[Tensor, "channels weights"]:
    """A channel's weights in each row."""
    return weight.movedim(axis, 0).unsqueeze(-1).flatten(1)
