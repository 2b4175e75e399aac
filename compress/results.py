"""What a run, and `compress bench`, end in: the typed, versioned content of `results.json`. Plain data, no torch.

Percentages run from 0 to 100, sizes are bytes, times are seconds or, where the name says so, milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from compress.errors import CompressError
from compress.measured import (
    Latency,
    NotMeasured,
    PairedDifference,
    Precision,
    Profile,
    PruningSensitivity,
    Record,
    Repeat,
    Sensitivity,
    Size,
    SplitAccuracy,
    SplitQuality,
)

VERSION: Final = 2
RESULTS: Final = "results.json"
"""File of a run that holds its `Results`."""


class Comparison(Record):
    """A row against the reference on both splits."""

    validation: PairedDifference
    test: PairedDifference


class Epoch(Record):
    """One epoch of a stage's training."""

    epoch: int
    loss: float
    learning_rate: float
    validation_loss: float
    validation_percent: float
    seconds: float


class Row(Record):
    """One model of the run, measured: the source, or what a stage made of the row before it."""

    stage: str
    accuracy: SplitAccuracy
    quality: SplitQuality
    comparison: Comparison | None
    """Against the reference; None for the reference itself and the rows before it."""
    parameters: int
    macs: int
    size: Size
    """Of the model as an ONNX file: fp32, or int8 once quantized."""
    sha256: str
    """Of that file, which is also the one that latency is measured of."""
    seconds: float
    """Time the stage took."""
    training: tuple[Epoch, ...] = ()
    latency: tuple[Latency, ...] = ()
    profile: Profile | None = None
    sensitivity: Sensitivity | None = None
    """What each layer costs in int8 alone; of a quantized row and the one that exports it, where it was asked for."""
    pruning: PruningSensitivity | None = None
    """What each group of channels costs alone; of a pruned row, where that decided how much each group lost."""
    checkpoint: str
    """Folder of the checkpoint, relative to the run's."""
    digest: str
    precision: Precision
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the ONNX file."""
        return self.size.size_bytes


class ChangedSample(Record):
    """A validation sample that the reference answers right and the last row wrong."""

    index: int
    """In the validation split."""
    truth: int
    answer: int
    """Of the last row."""
    confidence_before: float
    """Probability that the reference gives the right class, 0 to 1."""
    confidence_after: float
    """Probability that the last row gives its wrong one."""
    image: str | None
    """PNG, base64; None where no input is an image."""


class Budget(Record):
    """What the result may cost and what it cost, on validation."""

    accuracy_drop: float
    difference: PairedDifference
    met: bool


class Artifact(Record):
    """The files to deploy, in `dist/`."""

    files: dict[str, int]
    """File name and bytes."""
    sha256: dict[str, str]
    model: str
    """The file that the last row measures."""
    max_error: float | None
    """Largest difference of the fp32 file's outputs from the checkpoint's, relative to their magnitude."""
    agreement: float | None
    """Fraction of validation samples on which the int8 file answers as its float weights."""


class Machine(Record):
    """Where it was measured."""

    host: str
    """Hash of the host's name and id, so that equal machines are told apart without naming any."""
    cpu: str
    cores: int
    architecture: str
    instruction_sets: tuple[str, ...]
    cuda_device: str | None
    system: str
    python: str
    versions: dict[str, str]


class Results(Record):
    """Everything a run measured. The first row is the source, the last the exported artifact."""

    kind: Literal["run"] = "run"
    version: Literal[2] = VERSION
    name: str
    created: str
    """UTC, ISO 8601."""
    seed: int
    command: str
    git_revision: str | None
    """Commit of the folder of the pipeline file, '+changes' where files differ from it; None outside of git."""
    settings: dict[str, JsonValue]
    """The pipeline as it ran, every default spelled out, without paths of the machine."""
    machine: Machine
    reference: str
    """Stage of the row that the others are compared with: the last `train` at the head of the pipeline, or `source`."""
    classes: tuple[str, ...]
    rows: tuple[Row, ...] = Field(min_length=1)
    repeats: tuple[Repeat, ...] = ()
    """What latency measures of the reference against itself, per setting."""
    changed: tuple[ChangedSample, ...] = ()
    """Those of which the reference was surest and the last row is surest of the opposite, at most 24."""
    budget: Budget | None = None
    artifact: Artifact | None = None
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stages = [row.stage for row in self.rows]
        if len(set(stages)) != len(stages):
            raise ValueError("rows must have different stages")
        if self.reference not in stages:
            raise ValueError(f"reference '{self.reference}' is none of the rows ({', '.join(stages)})")
        return self

    @property
    def difference(self) -> PairedDifference | None:
        """The last row against the reference, on validation."""
        last = self.rows[-1].comparison
        return None if last is None else last.validation

    def reference_row(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.stage == self.reference)


class Target(Record):
    """One model that `compress bench` was given, or a row of a run that it was given."""

    name: str
    file: str
    """Name of its ONNX file."""
    sha256: str
    precision: str
    """One of `compress.measured.Precision`."""
    size: Size
    accuracy: SplitAccuracy | None = None
    """None where no data was given."""
    quality: SplitQuality | None = None
    comparison: Comparison | None = None
    """Against the first target."""
    latency: tuple[Latency, ...] = ()
    """Ratios are against the first target in the same setting."""
    profile: Profile | None = None


class BenchResults(Record):
    """Everything that one `compress bench` measured."""

    kind: Literal["bench"] = "bench"
    version: Literal[2] = VERSION
    created: str
    """UTC, ISO 8601."""
    command: str
    git_revision: str | None
    """Commit of the working directory, '+changes' where files differ from it; None outside of git."""
    machine: Machine
    rounds: int
    seconds: float
    """Least time measured per variant and round."""
    targets: tuple[Target, ...] = Field(min_length=1)
    repeats: tuple[Repeat, ...] = ()
    """The first target against itself, per setting."""
    missing: tuple[NotMeasured, ...] = ()
    warnings: tuple[str, ...] = ()


def load_results(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        CompressError: where it is missing, damaged, or of a version this program does not know.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CompressError(f"{path}: no such file; is this the folder of a finished run?") from None
    except OSError as error:
        raise CompressError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CompressError(f"{path}: is not UTF-8 text") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CompressError(f"{path}: is not valid JSON: {error}") from None
    kind = content.get("kind", "run") if isinstance(content, dict) else "run"
    if kind != "run":
        raise CompressError(f"{path}: is what `compress {kind}` wrote, not the results of a run")
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CompressError(f"{path}: is of version {version!r}; this program reads version {VERSION}")
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CompressError(f"{path}: {key}: {first['msg'].lower()}") from None
