"""Low-rank factors that keep a layer's outputs, not its weights, as close as possible. Pure functions.

What a layer sees is described by the moments of its inputs x: the rows of `convolution_rows` for a convolution, tokens
or samples for a linear layer. With C = E[x xᵀ] the error that counts is E‖(W - W')x‖² = ‖(W - W')S‖² for any S with
C = S Sᵀ. Let U hold the left singular vectors of W S that belong to the r largest singular values: W' = U Uᵀ W leaves
exactly the squares of the others, which no W' of rank r can undercut (Eckart & Young 1936). U are also the principal
directions of the outputs, since W C Wᵀ = E[y yᵀ] for y = W x, so that nothing here inverts C or decomposes it.

Sources: Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks", arXiv:1505.06798, section 3.1 (principal
directions of the responses, and the bias that takes their mean). Chen et al. 2021, "DRONE", NeurIPS 2021, and Wang et
al. 2024, "SVD-LLM", arXiv:2403.07378, minimise the same error by way of S and its inverse; Parkina & Rakhuba 2025,
"COALA", arXiv:2507.07580, say why to do without the inverse, and add a ridge where inputs were hardly seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from compress.methods import lowrank

_ROWS_AT_ONCE = 16384
_RIDGE = 1e-10
"""Weight of directions never seen, and the most it can add to the relative output error."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and spread of the inputs that were seen so far; float64."""

    count: int
    """How many inputs: samples, tokens or positions."""
    mean: Float[Tensor, " features"]
    scatter: Float[Tensor, "features features"]
    """Sum of (x - mean)(x - mean)ᵀ."""

    @property
    def covariance(self) -> Float[Tensor, "features features"]:
        """E[(x - E[x])(x - E[x])ᵀ], of these inputs themselves: divided by their number."""
        return self.scatter / max(1, self.count)

    @property
    def moment(self) -> Float[Tensor, "features features"]:
        """E[x xᵀ]."""
        return self.covariance + torch.outer(self.mean, self.mean)


def add_moments(total: Moments | None, inputs: Float[Tensor, "*positions features"]) -> Moments:
    """The moments of all inputs that `total` covers and of these.

    Means and scatters are merged, not sums of squares, so that a mean far from 0 costs no digits (Chan, Golub & LeVeque
    1983, "Algorithms for Computing the Sample Variance", The American Statistician 37). The result takes 8 · features²
    bytes.

    Args:
        total: what was seen before; None for nothing. It stays as it is.
        inputs: what a linear layer is given; the rows of `convolution_rows` for a convolution. There may be none.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if total is None:
        features = rows.shape[1]
        mean = torch.zeros(features, dtype=torch.float64, device=rows.device)
        total = Moments(0, mean, torch.zeros(features, features, dtype=torch.float64, device=rows.device))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        total = _merged(total, rows[start : start + _ROWS_AT_ONCE].double())
    return total


def _merged(total: Moments, rows: Float[Tensor, "rows features"]) -> Moments:
    mean, count = rows.mean(0), total.count + len(rows)
    centred, gap = rows - mean, mean - total.mean
    return Moments(
        count,
        total.mean + gap * (len(rows) / count),
        total.scatter + centred.T @ centred + torch.outer(gap, gap) * (total.count * len(rows) / count),
    )


def convolution_rows(
    inputs: Float[Tensor, "n channels height width"],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: str | tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Float[Tensor, "positions features"]:
    """What a convolution multiplies with its weight's matrix, one row for each output position of each sample.

    `rows @ weight.flatten(1).T` are the outputs of a convolution without groups, without its bias, sample by sample and
    row by row. One row of zeros stands for an output that sees only padding.

    Args:
        inputs: what the convolution is given; zeros are padded.
        kernel: height and width of the kernel.
        stride: as `nn.Conv2d` holds it.
        padding: as `nn.Conv2d` holds it: "valid", "same", or rows and columns on each side.
        dilation: as `nn.Conv2d` holds it.

    Returns:
        (n · output height · output width, channels · kernel height · kernel width), in the inputs' dtype.
    """
    columns: Tensor = F.unfold(_padded(inputs, kernel, padding, dilation), kernel, dilation=dilation, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1)


def sampled_rows(
    inputs: Float[Tensor, "n channels height width"],
    at: Int[Tensor, " positions"],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: str | tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Float[Tensor, "rows features"]:
    """Some rows of `convolution_rows`, without making the others: of each sample those at some output positions.

    Args:
        inputs: as for `convolution_rows`, and so are the arguments of the same names.
        at: output positions, counted row by row, from 0.
        kernel: height and width of the kernel.
        stride: as `nn.Conv2d` holds it.
        padding: as `nn.Conv2d` holds it.
        dilation: as `nn.Conv2d` holds it.

    Returns:
        (n · positions, channels · kernel height · kernel width), sample by sample, in the inputs' dtype.
    """
    padded = _padded(inputs, kernel, padding, dilation)
    columns = (padded.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    rows = (at // columns * stride[0])[:, None] + dilation[0] * torch.arange(kernel[0])
    across = (at % columns * stride[1])[:, None] + dilation[1] * torch.arange(kernel[1])
    windows = padded[:, :, rows[:, :, None], across[:, None, :]]  # n, channels, positions, kernel height and width
    return windows.transpose(1, 2).flatten(2).flatten(0, 1)


def _padded(
    inputs: Float[Tensor, "n channels height width"],
    kernel: tuple[int, int],
    padding: str | tuple[int, int],
    dilation: tuple[int, int],
) -> Float[Tensor, "n channels padded_height padded_width"]:
    sides: list[int] = []
    for axis in (1, 0):  # F.pad begins with the last axis
        if padding == "same":  # of an odd number, the larger half comes after
            whole = dilation[axis] * (kernel[axis] - 1)
            sides += [whole // 2, whole - whole // 2]
        else:
            sides += [0, 0] if isinstance(padding, str) else [padding[axis], padding[axis]]
    return F.pad(inputs, sides)


def output_moment(weight: Float[Tensor, "out ..."], moment: Float[Tensor, "rest rest"]) -> Float[Tensor, "out out"]:
    """E[y yᵀ] of the outputs y = W x without bias, from E[x xᵀ]; or their covariance, from that of the inputs.

    Args:
        weight: (out, in) or (out, in, h, w), where rest = in · h · w.
        moment: of the inputs.

    Returns:
        In float64. `add_moments` over the outputs finds the same without ever making the larger matrix of the inputs.
    """
    matrix = lowrank.as_matrix(weight).double()
    found: Tensor = matrix @ moment.double() @ matrix.T
    return found


def output_values(weight: Float[Tensor, "out ..."], moment: Float[Tensor, "rest rest"]) -> Float[Tensor, " k"]:
    """Singular values of W S, descending, float64; k = min(out, rest).

    The squares from rank r on add up to the least E‖(W - W')x‖² at that rank, so `lowrank.rank_for_energy` and
    `lowrank.errors_by_rank` mean the energy of the outputs when given these.

    Args:
        weight: (out, in) or (out, in, h, w), where rest = in · h · w.
        moment: E[x xᵀ]; or the covariance, where a bias takes the mean.
    """
    return values_of_outputs(weight, output_moment(weight, moment))


def values_of_outputs(weight: Float[Tensor, "out ..."], outputs: Float[Tensor, "out out"]) -> Float[Tensor, " k"]:
    """`output_values`, told what comes out of the layer instead of what goes in.

    Args:
        weight: (out, in) or (out, in, h, w); only its shape counts.
        outputs: as for `split_by_outputs`.
    """
    energies: Tensor = torch.linalg.eigvalsh(outputs.double()).clamp(min=0)  # rounding leaves some below 0
    return energies.flip(0)[: min(lowrank.as_matrix(weight).shape)].sqrt()


def split_whitened(
    weight: Float[Tensor, "out ..."], moment: Float[Tensor, "rest rest"], rank: int
) -> tuple[Float[Tensor, "rank ..."], Float[Tensor, "out rank"]]:
    """Factors of the approximation W' of rank `rank` with the least output error E‖(W - W')x‖².

    Its output error is never above that of `lowrank.split`, and its approximation is the same where `moment` is a
    multiple of the identity. For the treatment of inputs never seen, see `split_by_outputs`.

    Args:
        weight: (out, in) or (out, in, h, w), where rest = in · h · w.
        moment: E[x xᵀ], singular or not. Where the layer has a bias, or can be given one, `split_with_shift` uses the
            covariance instead and is never worse.
        rank: 1 to min(out, rest).

    Returns:
        `first` of shape (rank, *weight.shape[1:]) and `second` of shape (out, rank), in the weight's dtype.
    """
    return split_by_outputs(weight, output_moment(weight, moment), rank)


def split_by_outputs(
    weight: Float[Tensor, "out ..."], outputs: Float[Tensor, "out out"], rank: int
) -> tuple[Float[Tensor, "rank ..."], Float[Tensor, "out rank"]]:
    """`split_whitened`, told what comes out of the layer instead of what goes in: a far smaller matrix for convolutions.

    Directions of the inputs that were never seen cost nothing, so they would be left to chance once the rank exceeds
    what is needed for those seen. A ridge gives them a little weight: E[x xᵀ] is raised by δ = 1e-10 · E‖y‖² / ‖W‖²
    times the identity. The ranks left over then go to the truncated SVD of what is left of the weight, at a price in
    relative output error of at most 1e-10. Whatever δ is, the output error stays no larger than that of the plain
    truncated SVD, which could be better in the ridge's part of the sum only. A layer that never had an output other
    than 0 is split as by `lowrank.split`.

    Args:
        weight: (out, in) or (out, in, h, w).
        outputs: E[y yᵀ] of y = W x, without the bias; or the covariance of the outputs, which knows of no bias.
        rank: 1 to min(out, rest).

    Returns:
        Factors as `lowrank.split` gives them, the singular values of their product shared evenly.
    """
    matrix = lowrank.as_matrix(weight).double()
    directions = _principal(matrix, outputs.double(), rank)
    first, second = lowrank.split(directions.T @ matrix, rank)
    first = first.reshape(rank, *weight.shape[1:])
    return first.to(weight.dtype).contiguous(), (directions @ second).to(weight.dtype).contiguous()


def _principal(
    matrix: Float[Tensor, "out rest"], outputs: Float[Tensor, "out out"], rank: int
) -> Float[Tensor, "out rank"]:
    """Orthonormal directions that hold most of the outputs, then most of the rest of the matrix."""
    seen, whole = outputs.trace().item(), matrix.square().sum().item()
    energies, axes = torch.linalg.eigh(outputs)
    # What rounding left of the energies that are 0 must not outweigh the ridge.
    noise = len(outputs) * torch.finfo(torch.float64).eps * energies[-1].clamp(min=0)
    roots = torch.where(energies > noise, energies, 0.0).sqrt()
    ridge = _RIDGE * seen / whole if seen > 0 and whole > 0 else 1.0
    joined = torch.cat([axes * roots, matrix * math.sqrt(ridge)], dim=1)
    left: Tensor = torch.linalg.svd(joined, full_matrices=False).U
    return left[:, :rank]


def split_with_shift(
    weight: Float[Tensor, "out ..."], inputs: Moments, rank: int
) -> tuple[Float[Tensor, "rank ..."], Float[Tensor, "out rank"], Float[Tensor, " out"]]:
    """The best approximation of rank `rank` together with the best change of the bias: what to use where it can change.

    For any W' the best shift is that of `bias_correction`, and what it leaves is E‖(W - W')(x - E[x])‖², so the best W'
    is that of the covariance: no rank is spent on the mean. But for the price of the ridge, the output error is never
    above that of `split_whitened`, with or without a shift.

    Args:
        weight: (out, in) or (out, in, h, w), where the inputs have in · h · w features.
        inputs: of the layer.
        rank: 1 to min(out, in · h · w).

    Returns:
        `first` and `second` as from `split_whitened`, and what to add to the bias, all in the weight's dtype.
    """
    first, second = split_whitened(weight, inputs.covariance, rank)
    approximation = second.double() @ lowrank.as_matrix(first).double()  # of the rounded factors, which will be used
    shift = bias_correction(lowrank.as_matrix(weight).double(), approximation, inputs.mean)
    return first, second, shift.to(weight.dtype)


def shift_by_outputs(second: Float[Tensor, "out rank"], mean: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """`bias_correction` of what `split_by_outputs` made, told the mean of the outputs instead of that of the inputs.

    The approximation is W' = P W with P the orthogonal projection onto the columns of the second factor, so that
    (W - W') E[x] is what P leaves of the mean output.

    Args:
        second: the second factor.
        mean: E[W x], float64, without the bias.

    Returns:
        In float64.
    """
    basis: Tensor = torch.linalg.qr(second.double()).Q
    return mean - basis @ (basis.T @ mean)


def bias_correction(
    weight: Float[Tensor, "*weight"], approximation: Float[Tensor, "*weight"], mean: Float[Tensor, " features"]
) -> Float[Tensor, " out"]:
    """What to add to a layer's bias so that its mean output survives a change of its weight: (W - W') E[x].

    Of all constant shifts this one leaves the least output error: the covariance's part of it. It holds for any
    approximation, not only one of low rank.

    Args:
        weight: (out, in) or (out, in, h, w).
        approximation: W', of the same shape.
        mean: E[x] of the in · h · w features.

    Returns:
        In float64.
    """
    return lowrank.as_matrix(weight.double() - approximation.double()) @ mean.double()


def output_error(
    weight: Float[Tensor, "*weight"],
    moment: Float[Tensor, "features features"],
    approximation: Float[Tensor, "*weight"],
) -> float:
    """E‖(W - W')x‖² / E‖Wx‖²: the share of the outputs' energy that a change of the weight costs, 0 or more.

    Args:
        weight: (out, in) or (out, in, h, w).
        moment: E[x xᵀ] of the in · h · w features. With their covariance, the error that is left after
            `bias_correction` over the variance of the outputs.
        approximation: W', of the same shape as the weight; of any kind.

    Returns:
        0 where no output changes; infinite where only the weight as it was gives zeros.
    """
    whole, lost = (
        max(0.0, output_moment(change, moment).trace().item()) for change in (weight, weight.double() - approximation)
    )
    if lost == 0.0:
        return 0.0
    return lost / whole if whole else math.inf
