"""Loss and accuracy on a split, without ONNX Runtime: while training goes on, and to decide by."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from compress.data.base import Split
from compress.distributed import ALONE, Group
from compress.models.answers import logits_of

_BATCH = 256


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: str, group: Group = ALONE) -> tuple[float, int]:
    """Mean cross-entropy and number of correct answers on a split, in float32; `model` must be on `device`.

    Of a group each process asks its own model about its part of the split, and all get the same result.
    """
    model.eval()
    # Sums on the device: reading each batch would make a GPU wait.
    loss, correct = (
        torch.zeros((), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    for batch in split.batches(_BATCH, shard=group.shard):
        if len(batch.labels) == 0:
            continue  # fewer samples than processes
        inputs, labels, *_ = batch.to(device)
        logits = logits_of(model(*inputs)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return float(group.sum(loss)) / len(split), int(group.sum(correct))


@torch.no_grad()
def answered_correctly(model: nn.Module, split: Split, device: str) -> NDArray[np.bool_]:
    """Whether each sample of a split is answered correctly, shape (n,); `model` must be on `device`."""
    model.eval()
    found = [np.empty(0, dtype=np.bool_)]
    for batch in split.batches(_BATCH):
        inputs, labels, *_ = batch.to(device)
        found.append((logits_of(model(*inputs)).argmax(1) == labels).cpu().numpy())
    return np.concatenate(found)
