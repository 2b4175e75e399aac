"""Measure a checkpoint, every one the same way: accuracy, parameters, MACs and the bytes of its ONNX file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from compress.bench.accuracy import accuracy, correct_in_onnx, correct_in_torch, pack
from compress.checkpoint import Checkpoint
from compress.data.base import Dataset
from compress.events import Progress
from compress.files import readable_json, sha256_of, write_file
from compress.manifest import FP32_ONNX, INT8_ONNX, MODEL_ONNX
from compress.models.cost import macs, parameters
from compress.onnx_io.convert import serialized
from compress.onnx_io.float_graph import float_graph
from compress.results import METRICS, Measurement, SplitAccuracy

MEASURED_ONNX = "measured.onnx"


@dataclass(frozen=True)
class Bench:
    """What measuring needs besides the checkpoint."""

    data: Dataset
    device: str
    threads: int
    batch_size: int
    trusted: Collection[str]
    progress: Progress


def measure(checkpoint: Checkpoint, key: dict[str, JsonValue], bench: Bench) -> Measurement:
    """Measure a checkpoint and keep the result beside it.

    A float checkpoint is evaluated in torch in float32 and converted to ONNX for its size and latency; a quantized or
    exported one is evaluated as its file, in ONNX Runtime.

    Args:
        checkpoint: what to measure.
        key: all that could change the result.
        bench: data and device.

    Raises:
        ExportError: where the model cannot be converted to ONNX or does not run there.
    """
    model = checkpoint.build(bench.trusted)
    example = tuple(each.zeros(1) for each in bench.data.inputs)
    file = deployed_file(checkpoint)
    splits = {"validation": bench.data.validation, "test": bench.data.test}
    if file is None:
        file = checkpoint.path / MEASURED_ONNX
        write_file(file, serialized(float_graph(checkpoint, model, bench.data.inputs)))
        correct = {
            name: correct_in_torch(model, split, bench.batch_size, bench.device, bench.progress)
            for name, split in splits.items()
        }
    else:
        correct = {
            name: correct_in_onnx(file, split, bench.batch_size, bench.threads, bench.progress)
            for name, split in splits.items()
        }
    measurement = Measurement(
        key=key,
        precision="fp32" if checkpoint.file(MODEL_ONNX) is None and "int8" not in file.name else "int8",
        accuracy=SplitAccuracy(validation=accuracy(correct["validation"]), test=accuracy(correct["test"])),
        correct={name: pack(hits) for name, hits in correct.items()},
        parameters=parameters(model),
        macs=macs(model, example),
        model=file.name,
        size_bytes=file.stat().st_size,
        sha256=sha256_of(file),
    )
    write_file(checkpoint.path / METRICS, readable_json(measurement.model_dump(mode="json")))
    return measurement


def deployed_file(checkpoint: Checkpoint) -> Path | None:
    """The ONNX file that a checkpoint itself brings, the int8 one where there are two; None for float checkpoints."""
    for name in (MODEL_ONNX, INT8_ONNX, FP32_ONNX):
        path = checkpoint.file(name)
        if path is not None:
            return path
    return None
