"""What models answer, compared: student against teacher, and answers against labels.

A teacher is always given as logits. Averaged teachers are no exception (`ensemble.mean_probabilities`), so every loss takes
every teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from compress.methods.losses.precision import at_least_single

_LEAST_DEVIATION = 1e-3
"""Standard deviation of logits below which standardizing them would mostly magnify noise, and gradients."""
_LEAST_VARIATION = 1e-3
"""Length of what remains of probabilities less their mean, the largest being 1, below which they count as equal."""


def soft_label_loss(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    The factor T² keeps the gradients' magnitude when T changes. Zero where student and teacher agree; for T → ∞ it
    approaches half of `logit_mse`.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.

    Args:
        student: logits, any range.
        teacher: logits of the same shape; no gradient is needed for them.
        temperature: T > 0.
    """
    return _divergence(_soft_labels(teacher, temperature), _soft_labels(student, temperature)) * temperature**2


def soft_cross_entropy(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² times the cross-entropy of softmax(student / T) with the soft labels softmax(teacher / T), averaged over the batch.

    It is `soft_label_loss` plus T² times the teacher's entropy at T, which the student cannot change: the gradient is
    the same, and the least value is that entropy instead of zero.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.

    Args:
        student: logits, any range.
        teacher: logits of the same shape; no gradient is needed for them.
        temperature: T > 0.
    """
    soft_labels, answers = _soft_labels(teacher, temperature).exp(), _soft_labels(student, temperature)
    return -(soft_labels * answers).sum(1).mean() * temperature**2


def teacher_label_loss(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], smoothing: float
) -> Float[Tensor, ""]:
    """Cross-entropy with the class that the teacher finds most likely, averaged over the batch.

    The teacher's scale does not count, only its order. Of equally likely classes the lowest index may be expected, but is
    not promised.

    Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (DeiT),
    arXiv:2012.12877, section 4 (hard-label distillation).

    Args:
        student: logits, any range.
        teacher: logits of the same shape; they get no gradient.
        smoothing: share of the target spread over all classes, 0 to 1.
    """
    return label_loss(student, teacher.argmax(1), smoothing)


def logit_mse(student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """Squared difference of centred logits, averaged over batch and classes.

    Each row is centred first: a constant that is added to all logits of a sample changes no answer, so it costs nothing
    here. The papers sum over the classes and do not centre; the mean over the classes of their loss is this one plus
    the squared difference of the two rows' means. Zero where the rows differ by constants; twice the limit of
    `soft_label_loss` for T → ∞.

    Source: Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184, section 2.2; Kim, Oh, Kim, Cho, Yun
    2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", arXiv:2105.08919.

    Args:
        student: logits, any range.
        teacher: logits of the same shape; no gradient is needed for them.
    """
    difference = at_least_single(student) - at_least_single(teacher)
    return (difference - difference.mean(1, keepdim=True)).square().mean()


def standardize(logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
    """The z-score of each row: less its mean, divided by its standard deviation over the classes.

    With both sides standardized before `soft_label_loss`, whose temperature is then the paper's base temperature, the
    student need not copy the range of the teacher's logits: the loss stays the same where logits are shifted or scaled by
    a positive factor. The standard deviation divides by the number of classes, as in the paper (other code divides by one
    less, which is a slightly higher temperature).

    Rows with a standard deviation below 1/1000 are divided by that: equal logits become zeros, with finite gradients.

    Source: Sun, Ren, Li, Wang, Cao 2024, "Logit Standardization in Knowledge Distillation" (CVPR), arXiv:2403.01427,
    section 4, algorithm 1.

    Args:
        logits: any range.
    """
    wide = at_least_single(logits)
    centred = wide - wide.mean(1, keepdim=True)
    return centred * centred.square().mean(1, keepdim=True).clamp(min=_LEAST_DEVIATION**2).rsqrt()


def decoupled(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Decoupled distillation (DKD): T² · (alpha · TCKD + beta · NCKD), averaged over the batch.

    With probabilities at T, TCKD is the divergence between (p_label, 1 - p_label) of teacher and student, and NCKD the one
    between their distributions over the other classes, normalised without the label. `soft_label_loss` is the case
    alpha = 1, beta = 1 - p_label of the teacher, sample by sample: what a sure teacher knows about the other classes
    counts next to nothing there. Zero where student and teacher agree; with two classes NCKD is zero.

    Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation" (CVPR), arXiv:2203.08679, section 3.

    Args:
        student: logits, any range; at least 2 classes.
        teacher: logits of the same shape; no gradient is needed for them.
        labels: class indices from 0; mixed labels have no target class.
        alpha: weight of TCKD, at least 0.
        beta: weight of NCKD, at least 0; useful values are larger the surer the teacher is.
        temperature: T > 0.
    """
    target_teacher, others_teacher = _split_at_label(_soft_labels(teacher, temperature), labels)
    target_student, others_student = _split_at_label(_soft_labels(student, temperature), labels)
    target_class = _divergence(target_teacher, target_student)
    other_classes = _divergence(others_teacher, others_student)
    return (alpha * target_class + beta * other_classes) * temperature**2


def dist(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    beta: float,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """DIST: beta · (1 - correlation over the classes) + gamma · (1 - correlation over the samples) of probabilities at T.

    The first is Pearson's correlation of student and teacher in each row (inter-class), averaged over the batch, the second
    that in each column (intra-class), averaged over the classes. Correlation ignores a shift and a positive factor
    of either side, so the student need not be as sure as the teacher. Zero where student and teacher agree; each of
    the two lies between 0 and 2.

    There is no factor T²: the gradient of a correlation does not vanish with T. The authors' code has it; its weights times
    T² are those here. Rows and columns that hardly vary (an untrained head; every column in a batch of one) have no
    correlation: they count about 1, with finite gradients.

    Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher" (NeurIPS), arXiv:2205.10536,
    section 3.

    Args:
        student: logits, any range.
        teacher: logits of the same shape; no gradient is needed for them.
        beta: weight of the inter-class part, at least 0.
        gamma: weight of the intra-class part, at least 0.
        temperature: T > 0.
    """
    probabilities = (at_least_single(student) / temperature).softmax(1)
    wanted = (at_least_single(teacher) / temperature).softmax(1)
    inter = 1 - (_direction(probabilities, 1) * _direction(wanted, 1)).sum(1).mean()
    intra = 1 - (_direction(probabilities, 0) * _direction(wanted, 0)).sum(0).mean()
    return beta * inter + gamma * intra


def label_loss(
    logits: Float[Tensor, "n classes"], targets: Int[Tensor, " n"] | Float[Tensor, "n classes"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, averaged over the batch.

    Args:
        logits: any range.
        targets: class indices from 0, or a probability per class in rows that sum to 1 (mixed labels).
        smoothing: share of the target spread over all classes, 0 to 1 (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def entropy(logits: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """Entropy of softmax(logits) in nats, averaged over the batch: 0 (sure) to log(classes) (all equally likely).

    The confidence penalty subtracts it from the loss, with a weight, so that unsure answers are rewarded.

    Source: Pereyra, Tucker, Chorowski, Kaiser, Hinton 2017, "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", arXiv:1701.06548, section 3.

    Args:
        logits: any range.
    """
    log_probabilities = F.log_softmax(at_least_single(logits), dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()


def _soft_labels(logits: Float[Tensor, "n classes"], temperature: float) -> Float[Tensor, "n classes"]:
    """Logarithms of softmax(logits / T)."""
    return F.log_softmax(at_least_single(logits) / temperature, dim=1)


def _divergence(log_wanted: Float[Tensor, "n outcomes"], log_found: Float[Tensor, "n outcomes"]) -> Float[Tensor, ""]:
    """KL(wanted ‖ found), averaged over the batch."""
    return F.kl_div(log_found, log_wanted, reduction="batchmean", log_target=True)


def _split_at_label(
    log_probabilities: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n others"]]:
    """Logarithms of (p_label, 1 - p_label), and of the other classes' probabilities among themselves."""
    places = torch.arange(log_probabilities.shape[1] - 1, device=labels.device)
    others = log_probabilities.gather(1, places + (places >= labels[:, None]))
    rest = others.logsumexp(1, keepdim=True)  # exact where p_label rounds to 1
    return torch.cat([log_probabilities.gather(1, labels[:, None]), rest], 1), others - rest


def _direction(probabilities: Float[Tensor, "n classes"], axis: int) -> Float[Tensor, "n classes"]:
    """Probabilities less their mean along an axis, of length 1 along it: products of two are correlations."""
    # Relative to the largest, so that squares of rare classes do not vanish; a constant factor cancels in the result.
    largest = probabilities.detach().amax(axis, keepdim=True).clamp(min=1e-20)
    relative = probabilities / largest
    return F.normalize(relative - relative.mean(axis, keepdim=True), dim=axis, eps=_LEAST_VARIATION)
