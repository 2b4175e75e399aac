"""`export`: the ONNX files to deploy, each run and compared with the checkpoint before it is handed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from compress.checkpoint import Checkpoint, Draft
from compress.config import ExportConfig
from compress.errors import ExportError
from compress.files import readable_json
from compress.manifest import FP32_ONNX, INT8_ONNX, METADATA, MODEL_ONNX
from compress.names import placeless
from compress.onnx_io.convert import INPUT, OUTPUT, add_metadata, serialized, to_onnx
from compress.onnx_io.session import infer, open_session
from compress.stages.base import Context

_BATCH = 64


def run(parent: Checkpoint, config: ExportConfig, context: Context) -> Draft:
    """Write `model.fp32.onnx`, `model.int8.onnx` where the checkpoint is quantized, and `metadata.json`.

    Raises:
        ExportError: where a file does not do what the checkpoint does; nothing is written then.
    """
    model = parent.build(context.trusted)
    metadata = _metadata(parent, context)
    props = {f"compress.{key}": json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    floats = serialized(add_metadata(to_onnx(model, context.data.input_shape), props))
    _check_file(floats, FP32_ONNX)
    error = _largest_error(model, floats, context)
    if not error <= config.tolerance:  # also where it is NaN
        raise ExportError(
            f"export: {FP32_ONNX} differs from the checkpoint by {error:.2e} of the outputs' magnitude, "
            f"more than export.tolerance {config.tolerance:.0e}"
        )
    context.note(f"{FP32_ONNX}: largest difference {error:.1e} of the outputs' magnitude")
    files = {FP32_ONNX: floats}
    verification: dict[str, Any] = {"fp32_max_error": error, "int8_agreement": None}
    quantized = parent.file(MODEL_ONNX)
    if quantized is not None:
        graph = add_metadata(onnx.load(quantized), props)
        files[INT8_ONNX] = serialized(graph)
        _check_file(files[INT8_ONNX], INT8_ONNX)
        agreement = _agreement(model, files[INT8_ONNX], quantized.read_bytes(), context)
        if agreement < config.agreement:
            raise ExportError(
                f"export: {INT8_ONNX} answers as its float weights on {100 * agreement:.2f} % of the validation samples, "
                f"less than export.agreement {100 * config.agreement:.2f} %"
            )
        context.note(f"{INT8_ONNX}: answers as its float weights on {100 * agreement:.2f} % of the validation samples")
        verification["int8_agreement"] = agreement
    files[METADATA] = readable_json({**metadata, "verification": verification})
    return Draft(parent.arch, parent.edits, model, form="exported", files=files)


def _metadata(parent: Checkpoint, context: Context) -> dict[str, Any]:
    """What a user of the file needs to know; no path of this machine."""
    data = context.data
    return {
        "classes": list(data.classes),
        "input": {
            "name": INPUT,
            "shape": ["batch", *data.input_shape],
            "dtype": "float32",
            "scaled_to": [0.0, 1.0],
            "mean": list(data.mean),
            "std": list(data.std),
            "normalize": "(x - mean) / std per channel, after scaling to [0, 1]" if data.mean else "none",
        },
        "output": {"name": OUTPUT, "shape": ["batch", len(data.classes)], "meaning": "logits"},
        "model": placeless(parent.arch.factory),
        "lineage": [
            *({"stage": entry.stage, "made_from": entry.parent} for entry in parent.history),
            {"stage": "export", "made_from": parent.digest},
        ],
        "accuracy": context.parent_accuracy,
    }


def _check_file(content: bytes, name: str) -> None:
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"export: {name} is no valid ONNX: {str(error).splitlines()[0]}") from error


def _runner(content: bytes, context: Context) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    session = open_session(content, context.threads)
    return lambda inputs: infer(session, inputs)


def _largest_error(model: nn.Module, content: bytes, context: Context) -> float:
    """Largest absolute difference of logits over some validation samples, batched and one by one, relative to their size."""
    run_file = _runner(content, context)
    samples = context.data.validation.take(range(min(_BATCH, len(context.data.validation))))
    inputs = next(iter(samples.batches(_BATCH))).inputs
    with torch.no_grad():
        expected = model(inputs).numpy()
    single = np.concatenate([run_file(inputs[i : i + 1].numpy()) for i in range(min(4, len(inputs)))])
    difference = max(np.abs(run_file(inputs.numpy()) - expected).max(), np.abs(single - expected[: len(single)]).max())
    return float(difference / max(np.abs(expected).max(), 1e-6))


def _agreement(model: nn.Module, content: bytes, checkpoint: bytes, context: Context) -> float:
    """Fraction of validation samples on which the int8 file answers the class that the float weights answer.

    Raises:
        ExportError: where the file and the checkpoint's own int8 graph differ in any logit: metadata changes nothing.
    """
    run_file, run_checkpoint = _runner(content, context), _runner(checkpoint, context)
    same = 0
    for batch in context.data.validation.batches(_BATCH):
        logits = run_file(batch.inputs.numpy())
        if not np.array_equal(logits, run_checkpoint(batch.inputs.numpy())):
            raise ExportError(f"export: {INT8_ONNX} computes something else than the checkpoint's {MODEL_ONNX}")
        with torch.no_grad():
            same += int((model(batch.inputs).argmax(1).numpy() == logits.argmax(1)).sum())
    return same / len(context.data.validation)
