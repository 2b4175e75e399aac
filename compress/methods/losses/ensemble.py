"""Several teachers as one: logits in, logits out, for any loss of `logits`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from compress.methods.losses.precision import at_least_single


def mean_logits(teachers: Sequence[Float[Tensor, "n classes"]], weights: Sequence[float]) -> Float[Tensor, "n classes"]:
    """Weighted mean of the teachers' logits; its softmax is the normalised geometric mean of theirs, at any temperature.

    A class that one teacher rules out stays unlikely, and a teacher with large logits counts for more than its weight.

    Source: both means are named in Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531, section 1.

    Args:
        teachers: logits, at least one of them.
        weights: one per teacher, at least 0 and not all 0; they are divided by their sum.

    Raises:
        ValueError: where numbers of teachers and weights differ, or no weight is positive.
    """
    shares = _shares(weights, teachers)
    return (torch.stack([at_least_single(each) for each in teachers]) * shares).sum(0)


def mean_probabilities(
    teachers: Sequence[Float[Tensor, "n classes"]], weights: Sequence[float], temperature: float
) -> Float[Tensor, "n classes"]:
    """Logits whose softmax at T is the weighted mean of the teachers' probabilities at T: T · log Σ w · softmax(z / T).

    They fit losses at that temperature only. One teacher gives its own logits, up to a constant per row.

    Source: both means are named in Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531, section 1.

    Args:
        teachers: logits, at least one of them.
        weights: one per teacher, at least 0 and not all 0; they are divided by their sum.
        temperature: T > 0, that of the loss.

    Raises:
        ValueError: where numbers of teachers and weights differ, or no weight is positive.
    """
    shares = _shares(weights, teachers)
    stacked = torch.stack([at_least_single(each) for each in teachers])
    return temperature * (F.log_softmax(stacked / temperature, dim=2) + shares.log()).logsumexp(0)


def _shares(weights: Sequence[float], teachers: Sequence[Tensor]) -> Float[Tensor, "teachers 1 1"]:
    """The weights divided by their sum, to be multiplied with stacked logits."""
    if len(weights) != len(teachers):
        raise ValueError(f"{len(teachers)} teachers need as many weights, got {len(weights)}")
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be at least 0 and one of them positive, got {list(weights)}")
    like = at_least_single(teachers[0])
    return torch.tensor([weight / total for weight in weights], dtype=like.dtype, device=like.device)[:, None, None]
