"""The samples that compression cost: right in the reference, wrong in the result."""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass

from compress.report import text
from compress.report.sections.quality import class_name
from compress.results import ChangedSample, Results

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SMALL = 96
"""Pixels below which a picture is shown larger than it is, so that its pixels should stay sharp."""


@dataclass(frozen=True)
class Picture:
    """One sample."""

    image: str | None
    """PNG, base64."""
    width: int
    height: int
    is_small: bool
    alternative: str
    """The picture in words."""
    index: str
    before: str
    after: str


@dataclass(frozen=True)
class Changed:
    """The most changed samples."""

    counted: str
    """How many there are in all."""
    shown: str
    """Which of them are shown; empty where none is."""
    pictures: tuple[Picture, ...]


def changed(results: Results) -> Changed | None:
    """What was lost; None where nothing is compared."""
    difference = results.difference
    if difference is None:
        return None
    lost, gained, shown = difference.only_reference_correct, difference.only_artifact_correct, len(results.changed)
    verb = "is" if lost == 1 else "are"
    counted = (
        f"{text.plural(lost, 'validation sample')} of {difference.n:,} {verb} answered right by the reference and wrong by "
        f"the result; {gained:,} the other way round."
    )
    said = ""
    if shown:
        said = "Here they are" if shown == lost else f"Here are the {shown} of them that the two models are surest of"
        said += ", with the probability that each model gives its answer."
    return Changed(counted, said, tuple(_picture(results, sample) for sample in results.changed))


def _picture(results: Results, sample: ChangedSample) -> Picture:
    truth, answer = class_name(results, sample.truth), class_name(results, sample.answer)
    size = None if sample.image is None else png_size(sample.image)
    width, height = size or (0, 0)
    return Picture(
        image=None if size is None else sample.image,
        width=width,
        height=height,
        is_small=max(width, height) < _SMALL,
        alternative=f"Validation sample {sample.index}, class {truth}, answered as {answer}",
        index=f"Sample {sample.index}",
        before=f"{truth} ({_confidence(sample.confidence_before)})",
        after=f"{answer} ({_confidence(sample.confidence_after)})",
    )


def _confidence(probability: float) -> str:
    return f"{100 * probability:.0f}\u00a0%"  # a number keeps its unit, however narrow the column


def png_size(image: str) -> tuple[int, int] | None:
    """Width and height, pixels, of a PNG in base64; None where it is none."""
    try:
        content = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not content.startswith(_SIGNATURE) or len(content) < 24 or content[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", content[16:24])
    return (width, height) if width and height else None
