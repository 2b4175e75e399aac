"""Loss and accuracy on a split while training goes on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compress.data.base import Split
from compress.models.answers import logits_of

_BATCH = 256


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: str) -> tuple[float, int]:
    """Mean cross-entropy and number of correct answers on a split, in float32; `model` must be on `device`."""
    model.eval()
    # Sums on the device: reading each batch would make a GPU wait.
    loss, correct = (
        torch.zeros((), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    for batch in split.batches(_BATCH):
        inputs, labels, *_ = batch.to(device)
        logits = logits_of(model(*inputs)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return float(loss) / len(split), int(correct)
