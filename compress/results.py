"""What a run measured: the typed, versioned content of `results.json`. Plain data, no torch.

Percentages run from 0 to 100, sizes are bytes, times are seconds or, where the name says so, milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from compress.errors import CompressError

VERSION: Final = 1
METRICS = "metrics.json"
"""File beside a checkpoint that holds its `Measurement`."""


class Record(BaseModel):
    """Base of all results: closed and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracy(Record):
    """Top-1 accuracy on one split, with its 95 % Wilson interval."""

    correct: int
    n: int
    percent: float
    low: float
    high: float


class SplitAccuracy(Record):
    """Accuracy on both held-out splits. Decisions read validation; test is only ever reported."""

    validation: Accuracy
    test: Accuracy


class Latency(Record):
    """Time of one call: the median of the rounds' medians with its 95 % interval (order statistics); tails of all calls."""

    device: str
    backend: str
    provider: str
    precision: str
    batch_size: int
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    p99_ms: float
    runs: int


class Measurement(Record):
    """What bench measured of one checkpoint; kept beside it as `metrics.json`."""

    key: dict[str, JsonValue]
    """All that could change it."""
    precision: Literal["fp32", "int8"]
    accuracy: SplitAccuracy
    correct: dict[str, str]
    """By split, a bit per sample, most significant first, hexadecimal: what paired comparisons need."""
    parameters: int
    macs: int
    model: str
    """The ONNX file, in the checkpoint's folder, whose size and latency count."""
    size_bytes: int
    sha256: str


class Row(Record):
    """One model of the run, measured: the source, or what a stage made of the row before it."""

    stage: str
    accuracy: SplitAccuracy
    parameters: int
    macs: int
    size_bytes: int
    """Bytes of the model as an ONNX file: fp32, or int8 once quantized."""
    sha256: str
    """Of that file, which is also the one that latency is measured of."""
    seconds: float
    """Time the stage took."""
    latency: tuple[Latency, ...] = ()
    checkpoint: str
    """Folder of the checkpoint, relative to the run's."""
    digest: str
    precision: Literal["fp32", "int8"]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class PairedDifference(Record):
    """Accuracy of the artifact minus the reference's on the same samples, points, with its 95 % paired interval."""

    points: float
    low: float
    high: float
    n: int
    only_reference_correct: int
    only_artifact_correct: int


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

    version: Literal[1] = VERSION
    name: str
    created: str
    """UTC, ISO 8601."""
    seed: int
    command: str
    settings: dict[str, JsonValue]
    """The pipeline as it ran, every default spelled out, without paths of the machine."""
    machine: Machine
    reference: str
    """Stage of the row that the others are compared with: the last `train` at the head of the pipeline, or `source`."""
    classes: tuple[str, ...]
    rows: tuple[Row, ...] = Field(min_length=1)
    difference: PairedDifference | None = None
    """The last row against the reference, on validation."""
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

    def reference_row(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.rows if row.stage == self.reference)


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
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CompressError(f"{path}: is of version {version!r}; this program reads version {VERSION}")
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CompressError(f"{path}: {key}: {first['msg'].lower()}") from None
