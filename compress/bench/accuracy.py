"""Accuracy of what is deployed: float models in torch, float32; quantized ones as their file in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data.base import Split
from compress.events import Progress
from compress.methods.statistics import wilson
from compress.models.answers import logits_of
from compress.onnx_io.session import infer, open_session
from compress.results import Accuracy


def correct_in_torch(
    model: nn.Module, split: Split, batch_size: int, device: str, progress: Progress
) -> NDArray[np.bool_]:
    """For each sample of a split, in order, whether a float32 model answers its class."""
    model.eval().to(device)
    found = []
    with torch.no_grad():
        for batch in split.batches(batch_size):
            logits = logits_of(model(*batch.to(device).inputs))
            found.append((logits.argmax(1).cpu() == batch.labels).numpy())
            progress.work(f"accuracy on {split.name}", sum(map(len, found)), len(split))
    model.cpu()
    return np.concatenate(found)


def correct_in_onnx(path: Path, split: Split, batch_size: int, threads: int, progress: Progress) -> NDArray[np.bool_]:
    """For each sample of a split, in order, whether an ONNX file answers its class in ONNX Runtime on the CPU."""
    session = open_session(path, threads)
    found = []
    for batch in split.batches(batch_size):
        found.append(infer(session, batch.arrays()).argmax(1) == batch.labels.numpy())
        progress.work(f"accuracy on {split.name}", sum(map(len, found)), len(split))
    return np.concatenate(found)


def accuracy(correct: NDArray[np.bool_]) -> Accuracy:
    """Top-1 accuracy with its 95 % Wilson interval, percent."""
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    return Accuracy(correct=hits, n=n, percent=100.0 * hits / n, low=100.0 * low, high=100.0 * high)


def pack(correct: NDArray[np.bool_]) -> str:
    """A bit per sample, most significant first, hexadecimal."""
    return np.packbits(correct).tobytes().hex()


def unpack(packed: str, n: int) -> NDArray[np.bool_]:
    """The first `n` bits of what `pack` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))[:n].astype(bool)
