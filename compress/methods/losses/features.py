"""What layers give out, compared: feature maps (n, channels, height, width), tokens (n, tokens, channels), vectors.

All but `hint_loss` take a student and a teacher with different numbers of channels as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from compress.methods.losses.precision import at_least_single

_LEAST_SIZE = 1e-12
"""What features are divided by at least where only their proportions count."""
_LEAST_ROW = 1e-4
"""Length below which a sample's similarities are not stretched to 1, the largest of the batch being about 1."""
_LEAST_DISTANCE = 1e-3
"""Samples nearer to each other than this, the largest distance being 1, count as one: rounding decides their direction."""


def hint_loss(adapted: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Half the squared difference of the teacher's features and the student's behind an adapter, averaged over the units.

    The mean over all of batch, channels and places keeps the weight of the loss independent of the layer's size; the paper
    sums over the units of a sample, which is this times their number. Zero where both agree.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, eq. 3.

    Args:
        adapted: the student's features, brought to the teacher's shape by a learned layer (the paper's regressor).
        teacher: the teacher's features; no gradient is needed for them.
    """
    return F.mse_loss(at_least_single(adapted), at_least_single(teacher)) / 2


def attention_transfer(
    student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."], power: float
) -> Float[Tensor, ""]:
    """Squared difference of the two attention maps, each of length 1 per sample, averaged over batch and places.

    An attention map is Σ |A|^power over the channels A. It is compared in proportion only: a positive factor per sample
    changes nothing. Zero where the maps are proportional. Of maps with different sizes the larger is average-pooled to the
    smaller, axis by axis, before it gets length 1. A map of zeros stays zero, with finite gradients.

    Eq. 2 has the norm of the difference and a factor 1/2 in the weight; the square and the mean over the places are
    those of the authors' code, for which their weight 1000 is meant.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv:1612.03928, section 3.1, eq. 2.

    Args:
        student: feature maps (n, channels, height, width), or tokens (n, tokens, channels).
        teacher: of the same kind, with as many tokens where they are tokens; channels, height and width may differ; no
            gradient is needed for them.
        power: at least 1; larger ones look at the strongest activations more.

    Raises:
        ValueError: where the two are not both maps or both tokens of one number.
    """
    both_maps = student.dim() == teacher.dim() == 4
    both_tokens = student.dim() == teacher.dim() == 3 and student.shape[1] == teacher.shape[1]
    if not (both_maps or both_tokens):
        raise ValueError(
            "attention maps need features (n, channels, height, width), or (n, tokens, channels) with equally many tokens, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    seen, wanted = _attention(student, power), _attention(teacher, power)
    if both_maps:
        size = min(seen.shape[1], wanted.shape[1]), min(seen.shape[2], wanted.shape[2])
        seen, wanted = F.adaptive_avg_pool2d(seen, size), F.adaptive_avg_pool2d(wanted, size)
    return F.mse_loss(_of_length_one(seen), _of_length_one(wanted))


def similarity_preserving(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Squared difference of the two matrices of similarities between the samples of a batch, averaged over all pairs.

    Similarities are inner products of all of two samples' features, in rows of length 1. The two sides may differ in
    everything but the batch; a factor on all features of one side changes nothing. Zero where the similarities are
    proportional in each row. A sample without features has none, with finite gradients. Memory grows with n².

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation" (ICCV), arXiv:1907.09682, eqs. 1-4.

    Args:
        student: features of any shape, one sample per row.
        teacher: features of any shape; no gradient is needed for them.
    """
    return F.mse_loss(_similarities(student), _similarities(teacher))


def relational_distance(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Huber loss (delta 1) between the distances of samples in student and teacher, averaged over pairs of two samples.

    Distances are Euclidean and divided by their mean over the batch, so shifts, rotations and a common factor change
    nothing. Zero where they are proportional, and for a single sample. The paper sums over the pairs; code that averages over
    all n² has this times (n - 1) / n. Memory grows with n², whatever the width: 1 MiB a matrix for 512 samples.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation" (CVPR), arXiv:1904.05068, section 3.2.1.

    Args:
        student: embeddings, or features of any shape, one sample per row.
        teacher: the same samples, of any width; no gradient is needed for them.
    """
    n = student.shape[0]
    pairs = max(n * (n - 1), 1)
    return F.huber_loss(_relative_distances(student), _relative_distances(teacher), reduction="sum") / pairs


def relational_angle(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Huber loss (delta 1) between the cosines of the angles that three samples form, averaged over triples of three samples.

    Angles do not change with shifts, rotations and a common factor. Zero where they agree, and for fewer than three
    samples. The paper sums over the triples; code that averages over all n³ has this times (n - 1)(n - 2) / n². An angle
    at a sample that coincides with one of the other two counts as a right one.

    Memory grows with n³, whatever the width: in float32 a cube is 8 MiB for 128 samples, 64 MiB for 256 and 512 MiB for 512,
    and about six of them live at once. Batches up to 256 fit almost everywhere.

    Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation" (CVPR), arXiv:1904.05068, section 3.2.2.

    Args:
        student: embeddings, or features of any shape, one sample per row.
        teacher: the same samples, of any width; no gradient is needed for them.
    """
    n = student.shape[0]
    triples = max(n * (n - 1) * (n - 2), 1)
    return F.huber_loss(_cosines(student), _cosines(teacher), reduction="sum") / triples


def _attention(features: Float[Tensor, "n ..."], power: float) -> Float[Tensor, "n ..."]:
    """Σ |A|^power over the channels, (n, height, width) or (n, tokens), up to a factor per sample."""
    wide = at_least_single(features)
    axes = tuple(range(1, wide.dim()))
    # Relative to the largest, so that high powers neither overflow nor vanish; a factor cancels in the result.
    relative = wide / wide.detach().abs().amax(axes, keepdim=True).clamp(min=_LEAST_SIZE)
    return relative.abs().pow(power).sum(1 if wide.dim() == 4 else 2)


def _of_length_one(maps: Float[Tensor, "n ..."]) -> Float[Tensor, "n places"]:
    return F.normalize(maps.flatten(1), dim=1, eps=_LEAST_SIZE)


def _similarities(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    rows = at_least_single(features).flatten(1)
    rows = rows / rows.detach().norm(dim=1).amax().clamp(min=_LEAST_SIZE)
    return F.normalize(_products(rows), dim=1, eps=_LEAST_ROW)


def _products(rows: Float[Tensor, "n width"]) -> Float[Tensor, "n n"]:
    """Inner products of all pairs of rows, in full precision also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.T


def _squared_distances(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """Squared distances of all pairs of samples, up to a common factor that makes the largest about 1."""
    rows = at_least_single(features).flatten(1)
    rows = rows - rows.mean(0)  # products of centred rows lose fewer digits to the difference below
    rows = rows / rows.detach().norm(dim=1).amax().clamp(min=_LEAST_SIZE)
    products = _products(rows)
    lengths = products.diagonal()
    return lengths[:, None] + lengths - 2 * products


def _inverse_distances(squared: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """1 / distance, and 0, without a gradient, where two samples coincide."""
    apart = squared > _LEAST_DISTANCE**2 * squared.detach().amax()
    return torch.where(apart, torch.where(apart, squared, 1.0).rsqrt(), 0.0)


def _relative_distances(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """Distances of all pairs, divided by the mean over pairs of two samples."""
    squared = _squared_distances(features)
    distances = squared * _inverse_distances(squared)
    n = len(distances)
    return distances / (distances.sum() / max(n * (n - 1), 1)).clamp(min=_LEAST_SIZE)


def _cosines(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n n"]:
    """Cosine of the angle that samples i and k form at sample j, as [i, j, k]; 0 where they are not three or coincide with j."""
    squared = _squared_distances(features)
    inverse = _inverse_distances(squared)
    half = (1 - torch.eye(len(squared), dtype=squared.dtype, device=squared.device)) / 2
    # Law of cosines: needs the distances only, where differences of samples would take n² times their width.
    products = (squared[:, :, None] + squared[None] - squared[:, None]) * half[:, None]
    return products * inverse[:, :, None] * inverse[None]
