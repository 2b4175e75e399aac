"""`export`: the ONNX files to deploy, each run and compared with the checkpoint before it is handed over."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import nn

from compress.checkpoint import Checkpoint, Draft
from compress.config import ExportConfig
from compress.data.base import Input
from compress.errors import ExportError, first_line
from compress.files import readable_json
from compress.manifest import FP32_ONNX, INT8_ONNX, METADATA, MODEL_ONNX
from compress.models.answers import LOGITS, logits_of, outputs_of
from compress.names import placeless
from compress.onnx_io.convert import BATCH, add_metadata, serialized
from compress.onnx_io.float_graph import float_graph
from compress.onnx_io.session import infer_all, open_session
from compress.stages.base import Context

_BATCH, _SINGLE = 64, 4


def run(parent: Checkpoint, config: ExportConfig, context: Context) -> Draft:
    """Write `model.fp32.onnx`, `model.int8.onnx` where the checkpoint is quantized, and `metadata.json`.

    Raises:
        ExportError: where a file does not do what the checkpoint does; nothing is written then.
    """
    model = parent.build(context.trusted)
    graph = float_graph(parent, model, context.data.inputs)
    metadata = _metadata(parent, graph, context)
    props = {f"compress.{key}": json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    floats = serialized(add_metadata(graph, props))
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
        files[INT8_ONNX] = serialized(add_metadata(onnx.load(quantized), props))
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


def _metadata(parent: Checkpoint, graph: onnx.ModelProto, context: Context) -> dict[str, Any]:
    """What a user of the file needs to know; no path of this machine."""
    return {
        "classes": list(context.data.classes),
        "inputs": [_input(each) for each in context.data.inputs],
        "outputs": [_output(value) for value in graph.graph.output],
        "model": placeless(parent.arch.factory),
        "lineage": [
            *({"stage": entry.stage, "made_from": entry.parent} for entry in parent.history),
            {"stage": "export", "made_from": parent.digest},
        ],
        "accuracy": context.parent_accuracy,
    }


def _input(described: Input) -> dict[str, Any]:
    is_image = described.is_image
    return {
        "name": described.name,
        "shape": [BATCH, *described.shape],
        "dtype": described.dtype,
        "scaled_to": [0.0, 1.0] if is_image else None,
        "mean": list(described.mean),
        "std": list(described.std),
        "normalize": "(x - mean) / std per channel, after scaling to [0, 1]" if is_image else "none",
    }


def _output(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    return {
        "name": value.name,
        "shape": [axis.dim_param or axis.dim_value for axis in kind.shape.dim],
        "dtype": helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
    }


def _check_file(content: bytes, name: str) -> None:
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"export: {name} is no valid ONNX: {first_line(error)}") from error


def _largest_error(model: nn.Module, content: bytes, context: Context) -> float:
    """Largest absolute difference over some validation samples, of each output relative to its own magnitude.

    The file is run on all of them at once and on some one by one.
    """
    session = open_session(content, context.threads)
    samples = context.data.validation.take(range(min(_BATCH, len(context.data.validation))))
    batch = next(iter(samples.batches(_BATCH)))
    n = len(batch.labels)
    with torch.no_grad():
        expected = {name: tensor.detach().numpy() for name, tensor in outputs_of(model(*batch.inputs)).items()}
    together = infer_all(session, batch.arrays())
    single = [infer_all(session, [array[i : i + 1] for array in batch.arrays()]) for i in range(min(_SINGLE, n))]
    errors = []
    for name, values in expected.items():
        pairs = [(together[name], values)]
        if values.shape[:1] == (n,):  # an output without a batch axis depends on which samples come together
            pairs += [(alone[name], values[i : i + 1]) for i, alone in enumerate(single)]
        errors.append(_relative_error(pairs))
    return float(np.max(errors))  # NaN where any is


def _relative_error(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """Largest difference in any of (found, expected), relative to the largest number in the first expected."""
    if any(found.shape != expected.shape for found, expected in pairs):
        return math.inf
    if not pairs[0][1].size:
        return 0.0
    differences = [np.abs(found.astype(np.float64) - expected).max() for found, expected in pairs]
    return float(np.max(differences) / max(np.abs(pairs[0][1]).max(), 1e-6))


def _agreement(model: nn.Module, content: bytes, checkpoint: bytes, context: Context) -> float:
    """Fraction of validation samples on which the int8 file answers the class that the float weights answer.

    Raises:
        ExportError: where the file and the checkpoint's own int8 graph differ in any output: metadata changes nothing.
    """
    file, own = (open_session(each, context.threads) for each in (content, checkpoint))
    same = 0
    for batch in context.data.validation.batches(_BATCH):
        found, expected = infer_all(file, batch.arrays()), infer_all(own, batch.arrays())
        if not all(np.array_equal(found[name], expected[name]) for name in expected):
            raise ExportError(f"export: {INT8_ONNX} computes something else than the checkpoint's {MODEL_ONNX}")
        with torch.no_grad():
            answers = logits_of(model(*batch.inputs)).argmax(1).numpy()
        same += int((answers == found[LOGITS].argmax(1)).sum())
    return same / len(context.data.validation)
