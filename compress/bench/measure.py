"""Measure a checkpoint, every one the same way: its answers on both held-out splits, MACs, and the size of its ONNX file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from compress.bench.accuracy import (
    Evaluation,
    accuracy,
    check_classes,
    evaluate_in_onnx,
    evaluate_in_torch,
    quality,
)
from compress.bench.sensitivity import Asked, measure_sensitivity
from compress.bench.size import measure_size, precision_of
from compress.checkpoint import Checkpoint
from compress.data.base import Dataset, Split
from compress.events import Progress
from compress.files import readable_json, sha256_of, write_file
from compress.manifest import FP32_ONNX, INT8_ONNX, MODEL_ONNX
from compress.measured import METRICS, Measurement, SplitAccuracy, SplitQuality
from compress.models.cost import macs, parameters
from compress.onnx_io.convert import serialized
from compress.onnx_io.float_graph import float_graph
from compress.packed import pack_answers, pack_confidences

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
        key: all that could change the result. What stands there under `sensitivity`, `Asked` as JSON or None, decides
            whether each int8 layer is tried alone, so that no key can forget it.
        bench: data and device.

    Raises:
        CompressError: where the data has more classes than answers can be kept of.
        ExportError: where the model cannot be converted to ONNX or does not run there.
        ModelError: where it does not answer one logit per class.
    """
    data = bench.data
    check_classes(len(data.classes))
    model = checkpoint.build(bench.trusted)
    deployed = deployed_file(checkpoint)
    file = deployed or checkpoint.path / MEASURED_ONNX
    if deployed is None:
        write_file(file, serialized(float_graph(checkpoint, model, data.inputs)))

    def evaluate(split: Split) -> Evaluation:
        if deployed is None:
            return evaluate_in_torch(model, split, len(data.classes), bench.batch_size, bench.device, bench.progress)
        return evaluate_in_onnx(deployed, split, len(data.classes), bench.batch_size, bench.threads, bench.progress)

    validation, test = evaluate(data.validation), evaluate(data.test)
    size = measure_size(file)
    asked = key.get("sensitivity")
    sensitivity = None
    if asked is not None:
        sensitivity = measure_sensitivity(
            checkpoint,
            model,
            size.layers,
            data.for_decisions(),
            Asked.model_validate(asked),
            threads=bench.threads,
            batch_size=bench.batch_size,
            progress=bench.progress,
        )
    found = {"validation": validation.answers, "test": test.answers}
    measurement = Measurement(
        key=key,
        precision=precision_of(file),
        accuracy=SplitAccuracy(
            validation=accuracy(validation.answers.classes == data.validation.labels.numpy()),
            test=accuracy(test.answers.classes == data.test.labels.numpy()),
        ),
        quality=SplitQuality(
            validation=quality(validation, data.validation.labels.numpy(), len(data.classes)),
            test=quality(test, data.test.labels.numpy(), len(data.classes)),
        ),
        answers={name: pack_answers(answers.classes) for name, answers in found.items()},
        confidences={name: pack_confidences(answers.confidences) for name, answers in found.items()},
        parameters=parameters(model),
        macs=macs(model, tuple(each.zeros(1) for each in data.inputs)),
        model=file.name,
        size=size,
        sha256=sha256_of(file),
        sensitivity=sensitivity,
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
