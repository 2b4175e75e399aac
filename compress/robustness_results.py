"""What `compress robustness` ends in: accuracy under corruptions and attacks, of several models on the same samples.

Plain data, no torch. Percentages run from 0 to 100.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.measured import Accuracy, PairedDifference, Precision, Record
from compress.results import VERSION, Machine


class Level(Record):
    """Answers at one strength of a corruption or an attack."""

    level: float
    """Severity, 1 to 5; of an attack the largest change of a pixel, 255ths of its range."""
    accuracy: Accuracy
    difference: PairedDifference | None
    """Against the first model at the same level; None for the first itself."""


class Mean(Record):
    """Accuracy averaged over several levels, percent, with its 95 % interval.

    The samples are counted once, however many levels there are: the answers to one image resemble each other.
    """

    percent: float
    low: float
    high: float
    relative_drop: float | None
    """How much of the clean accuracy is lost, percent of it; None where that is 0."""
    points: float | None
    """Against the first model, with the 95 % paired interval; all three None for the first itself."""
    points_low: float | None
    points_high: float | None


class UnderCorruption(Record):
    """A model under one family of corruptions."""

    family: str
    levels: tuple[Level, ...] = Field(min_length=1)
    """By severity."""
    mean: Mean
    """Over the severities."""


class UnderAttack(Record):
    """A model under one attack."""

    attack: Literal["fgsm", "pgd"]
    crafted_on: str
    """The model whose gradients found the images."""
    is_transfer: bool
    """Whether that is another model than the one that answers, or its weights before they were quantized: the images are
    then not the worst for this one, and its accuracy is flattered."""
    levels: tuple[Level, ...] = Field(min_length=1)
    """By strength."""


class Robustness(Record):
    """One model."""

    name: str
    file: str
    """Name of its ONNX file, which gave all answers."""
    sha256: str
    precision: Precision
    clean: Accuracy
    """On the same samples as they are."""
    difference: PairedDifference | None
    """There, against the first model; None for the first itself."""
    corruptions: tuple[UnderCorruption, ...] = ()
    mean: Mean | None = None
    """Over all families and severities; None without corruptions."""
    attacks: tuple[UnderAttack, ...] = ()


class NotAttacked(Record):
    """An attack that could not be made, and why."""

    name: str
    reason: str


class CorruptionInfo(Record):
    """What a family does to the samples of this data."""

    family: str
    what: str
    unit: str
    """What a strength is."""
    strengths: tuple[float, ...]
    """By severity as measured."""
    source: str
    """Where the strengths come from."""


class RobustnessResults(Record):
    """Everything that one `compress robustness` measured. Every model answered exactly the same corrupted samples."""

    kind: Literal["robustness"] = "robustness"
    version: Literal[2] = VERSION
    created: str
    """UTC, ISO 8601."""
    command: str
    git_revision: str | None
    """Commit of the working directory, '+changes' where files differ from it; None outside of git."""
    machine: Machine
    split: Literal["test", "validation"]
    samples: int
    """Of that split, stratified by class."""
    seed: int
    """Of the samples, the corruptions and the starts of attacks."""
    classes: tuple[str, ...]
    severities: tuple[int, ...]
    epsilons: tuple[float, ...]
    """Of the attacks, 255ths of a pixel's range."""
    steps: int
    """Of PGD."""
    restarts: int
    """Of PGD."""
    families: tuple[CorruptionInfo, ...]
    targets: tuple[Robustness, ...] = Field(min_length=1)
    missing: tuple[NotAttacked, ...] = ()
    warnings: tuple[str, ...] = ()
