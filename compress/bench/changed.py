"""The samples on which compression changed a right answer into a wrong one, with a thumbnail of each."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.data.base import DecisionData, Input
from compress.measured import Measurement
from compress.packed import unpack_answers, unpack_confidences
from compress.results import ChangedSample

MOST = 24
THUMBNAIL = 96
"""Longest side, pixels; smaller images stay as they are."""


def changed_samples(reference: Measurement, last: Measurement, data: DecisionData) -> tuple[ChangedSample, ...]:
    """Validation samples that the reference answers right and the last model wrong, at most `MOST`.

    They are ranked by the product of both confidences, which is large only where both are: a sample on which either
    wavered could have gone the other way, one on which both are sure shows what the compressed model has unlearned.

    Args:
        reference: what was measured of it.
        last: of the other model, on the same samples.
        data: of which only validation is read.

    Raises:
        DataError: where an image can no longer be read.
    """
    labels = data.validation.labels.numpy()
    before, after = (unpack_answers(one.answers["validation"]) for one in (reference, last))
    sure_before, sure_after = (unpack_confidences(one.confidences["validation"]) for one in (reference, last))
    changed = np.flatnonzero((before == labels) & (after != labels))
    order = np.argsort(-(sure_before * sure_after)[changed], kind="stable")[:MOST]
    chosen = [int(index) for index in changed[order]]
    return tuple(
        ChangedSample(
            index=index,
            truth=int(labels[index]),
            answer=int(after[index]),
            confidence_before=float(sure_before[index]),
            confidence_after=float(sure_after[index]),
            image=image,
        )
        for index, image in zip(chosen, _images(chosen, data), strict=True)
    )


def _images(indices: Sequence[int], data: DecisionData) -> Iterator[str | None]:
    """The first image of each sample as a PNG in base64."""
    # Only images in [0, 1] have a mean.
    position = next((at for at, given in enumerate(data.inputs) if given.is_image), None)
    if position is None or not indices:
        yield from (None for _ in indices)
        return
    for batch in data.validation.take(indices).batches(len(indices)):
        for sample in batch.arrays()[position]:
            yield base64.b64encode(_thumbnail(sample, data.inputs[position])).decode()


def _thumbnail(normalised: NDArray[np.float32], given: Input) -> bytes:
    """An image (c, h, w) as a PNG: grey with one channel or two, else red, green and blue from the first three."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (given.mean, given.std))
    pixels = np.rint(255 * (normalised * std + mean).clip(0, 1)).astype(np.uint8)
    grey = len(pixels) < 3
    image = Image.fromarray(pixels[0] if grey else np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
