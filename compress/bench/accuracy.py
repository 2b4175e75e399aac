"""What a model answers, and what that is worth: float models in torch, ONNX files in ONNX Runtime on the CPU.

Of each sample only the answer, its confidence and whether the label is among the five likeliest classes are kept, never
the logits of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data.base import Batch, Split
from compress.errors import CompressError, ModelError
from compress.events import Progress
from compress.measured import Accuracy, ClassScore, PairedDifference, Quality
from compress.methods.quality import (
    TOP,
    Answers,
    agreement,
    answers_of,
    calibration_error,
    class_scores,
    confusion_cells,
    mcnemar_p_value,
)
from compress.methods.statistics import paired_difference, wilson
from compress.models.answers import logits_of
from compress.onnx_io.session import infer, open_session
from compress.packed import MOST_CLASSES

_MAX_CONFUSED = 100


@dataclass(frozen=True)
class Evaluation:
    """The answers on one split, in its order, and the time it took to get them, reading the data included."""

    answers: Answers
    seconds: float


def evaluate_in_torch(
    model: nn.Module, split: Split, classes: int, batch_size: int, device: str, progress: Progress
) -> Evaluation:
    """Answers of a float32 model on a split.

    Raises:
        ModelError: where it does not answer one logit per class.
    """
    model.eval().to(device)

    def logits(batch: Batch) -> NDArray[Any]:
        with torch.no_grad():
            # Through float64, which holds every float type, bfloat16 too, which NumPy lacks.
            return logits_of(model(*batch.to(device).inputs)).cpu().double().numpy()

    found = _evaluate(logits, split, classes, batch_size, progress)
    model.cpu()
    return found


def evaluate_in_onnx(
    path: Path, split: Split, classes: int, batch_size: int, threads: int, progress: Progress
) -> Evaluation:
    """Answers of an ONNX file on a split.

    A file that takes one batch size only is given that many samples at a time, the last of them repeated where the
    split does not come out even.

    Raises:
        ExportError: where ONNX Runtime does not take the file.
        ModelError: where it does not run on the data's inputs, or does not answer one logit per class.
    """
    session = open_session(path, threads)
    sizes = {given.shape[0] for given in session.get_inputs() if given.shape and isinstance(given.shape[0], int)}
    fixed = sizes.pop() if len(sizes) == 1 else None

    def logits(batch: Batch) -> NDArray[Any]:
        inputs, n = batch.arrays(), len(batch.labels)
        if fixed is not None and n < fixed:
            inputs = tuple(np.concatenate([array, np.repeat(array[-1:], fixed - n, axis=0)]) for array in inputs)
        try:
            return infer(session, inputs)[:n]
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            told = " ".join(str(error).split())  # which index has what size stands in later lines
            raise ModelError(f"{path}: does not run on the data's inputs: {told}") from error

    return _evaluate(logits, split, classes, fixed or batch_size, progress)


def _evaluate(
    logits_of_batch: Callable[[Batch], NDArray[Any]], split: Split, classes: int, batch_size: int, progress: Progress
) -> Evaluation:
    found: list[Answers] = []
    done = 0
    started = time.perf_counter()
    for batch in split.batches(batch_size):
        logits = logits_of_batch(batch)
        if logits.shape != (len(batch.labels), classes):
            raise ModelError(
                f"the model answers {logits.shape} for {len(batch.labels)} samples, but the data has {classes} classes"
            )
        found.append(answers_of(logits, batch.labels.numpy()))
        done += len(batch.labels)
        progress.work(f"accuracy on {split.name}", done, len(split))
    seconds = time.perf_counter() - started
    answers = Answers(
        np.concatenate([one.classes for one in found]),
        np.concatenate([one.confidences for one in found]),
        np.concatenate([one.in_top for one in found]),
    )
    return Evaluation(answers, seconds)


def accuracy(correct: NDArray[np.bool_]) -> Accuracy:
    """Share of hits, (n,), with its 95 % Wilson interval, percent."""
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    return Accuracy(correct=hits, n=n, percent=100.0 * hits / n, low=100.0 * low, high=100.0 * high)


def quality(evaluation: Evaluation, labels: NDArray[np.int64], classes: int) -> Quality:
    """What the answers on a split with these labels, (n,), are worth beyond their top-1 accuracy."""
    answers = evaluation.answers
    scores = class_scores(labels, answers.classes, classes)
    precision, recall, f1 = (100.0 * mean for mean in scores.macro)
    columns = (scores.precision, scores.recall, scores.f1, scores.counts)
    return Quality(
        top5=accuracy(answers.in_top) if classes > TOP else None,
        precision=precision,
        recall=recall,
        f1=f1,
        classes=tuple(
            ClassScore(precision=100.0 * float(p), recall=100.0 * float(r), f1=100.0 * float(f), n=int(n))
            for p, r, f, n in zip(*columns, strict=True)
        ),
        confusion=confusion_cells(labels, answers.classes, classes) if classes <= _MAX_CONFUSED else None,
        calibration_error=100.0 * calibration_error(answers.confidences, answers.classes == labels),
        samples_per_second=len(labels) / evaluation.seconds,
    )


def compare(labels: NDArray[np.int64], reference: NDArray[np.int64], other: NDArray[np.int64]) -> PairedDifference:
    """Accuracy of `other`'s answers minus the reference's, on the same samples; all of shape (n,)."""
    n = len(labels)
    first, second = reference == labels, other == labels
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    _, low, high = paired_difference(first, second)
    return PairedDifference(
        points=100.0 * (gained - lost) / n,  # in this order: 7 of 1,000 are 0.7 points, not a rounding error more
        low=100.0 * low,
        high=100.0 * high,
        n=n,
        only_reference_correct=lost,
        only_artifact_correct=gained,
        p_value=mcnemar_p_value(lost, gained),
        agreement=100.0 * agreement(reference, other),
    )


def check_classes(classes: int) -> None:
    """Check that answers can be packed.

    Raises:
        CompressError: where there are too many classes.
    """
    if classes > MOST_CLASSES:
        raise CompressError(f"the data has {classes:,} classes; at most {MOST_CLASSES:,} can be measured")
