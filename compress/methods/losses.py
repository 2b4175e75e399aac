"""Losses as pure functions: logits in, a scalar out. Every loss is a mean over the batch."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def soft_label_loss(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    The factor T² keeps the gradients' magnitude when T changes. Zero where student and teacher agree; for T → ∞ it
    approaches half the mean over samples of the squared difference of centred logits, divided by the classes.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.

    Args:
        student: logits, any range.
        teacher: logits of the same shape; no gradient is needed for them.
        temperature: T > 0.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def label_loss(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, averaged over the batch.

    Args:
        logits: any range.
        labels: class indices from 0.
        smoothing: share of the target spread over all classes, 0 to 1 (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)
