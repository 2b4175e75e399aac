"""Every loss with tensors of its own, for what must hold for all of them. Imported by tests, also outside of pytest."""

from dataclasses import dataclass

import torch

from compress.methods.losses import features, logits

N, CLASSES = 5, 7
LABELS = torch.tensor([0, 6, 3, 3, 1])


def normal(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@dataclass(frozen=True)
class Case:
    """A loss as a function of student, teacher and labels, and the shapes of the first two."""

    loss: object
    student: tuple[int, ...] = (N, CLASSES)
    teacher: tuple[int, ...] = (N, CLASSES)
    scale: float = 3.0
    least: float | None = 0.0
    """Value where student and teacher are the same; None where it depends on them."""

    def tensors(self):
        return normal(0, *self.student, scale=self.scale), normal(1, *self.teacher, scale=self.scale)


MAPS = {"student": (N, 3, 6, 4), "teacher": (N, 8, 6, 4), "scale": 1.0}
CASES = {
    "soft_label_loss": Case(lambda s, t, y: logits.soft_label_loss(s, t, 3.0)),
    "soft_cross_entropy": Case(lambda s, t, y: logits.soft_cross_entropy(s, t, 3.0), least=None),
    "teacher_label_loss": Case(lambda s, t, y: logits.teacher_label_loss(s, t, 0.1), least=None),
    "logit_mse": Case(lambda s, t, y: logits.logit_mse(s, t)),
    "standardized": Case(
        lambda s, t, y: logits.soft_label_loss(logits.standardize(s), logits.standardize(t), 2.0),
    ),
    "decoupled": Case(lambda s, t, y: logits.decoupled(s, t, y, 1.0, 8.0, 4.0)),
    "dist": Case(lambda s, t, y: logits.dist(s, t, 1.0, 2.0, 4.0)),
    "label_loss": Case(lambda s, t, y: logits.label_loss(s, y, 0.1), least=None),
    "label_loss_probabilities": Case(lambda s, t, y: logits.label_loss(s, t.softmax(1).to(s.dtype), 0.1), least=None),
    "entropy": Case(lambda s, t, y: logits.entropy(s), least=None),
    "hint": Case(lambda s, t, y: features.hint_loss(s, t), student=(N, 3, 6, 4), teacher=(N, 3, 6, 4)),
    "attention": Case(lambda s, t, y: features.attention_transfer(s, t, 2.0), **MAPS),
    "attention_pooled": Case(
        lambda s, t, y: features.attention_transfer(s, t, 3.0), student=(N, 3, 6, 4), teacher=(N, 8, 3, 5), scale=1.0
    ),
    "attention_tokens": Case(
        lambda s, t, y: features.attention_transfer(s, t, 2.0), student=(N, 9, 3), teacher=(N, 9, 4), scale=1.0
    ),
    "similarity": Case(lambda s, t, y: features.similarity_preserving(s, t), **MAPS),
    "distance": Case(lambda s, t, y: features.relational_distance(s, t), student=(N, 6), teacher=(N, 9), scale=1.0),
    "angle": Case(lambda s, t, y: features.relational_angle(s, t), student=(N, 6), teacher=(N, 9), scale=1.0),
}
FEATURES = ("hint", "attention", "attention_pooled", "attention_tokens", "similarity", "distance", "angle")
