"""Post-training int8: ranges from streamed data, then ONNX Runtime's QDQ quantizer.

`quantize_static` is taken apart because its calibration holds everything in memory; the range collector and the
quantizer inside it are called directly, chunk by chunk.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from compress.machine import has_vnni, is_arm
from compress.onnx_io.convert import cleaned

Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """What a CPU wants of an int8 file."""

    name: str
    activations: Literal["uint8", "int8"]
    reduce_range: bool
    """Weights use 7 of 8 bits, so that int16 accumulators cannot saturate."""


TARGETS: Mapping[str, Target] = {
    # ONNX Runtime's x86 kernels are fast for unsigned activations only: int8 ones run slower than fp32.
    "x86-vnni": Target("x86-vnni", "uint8", reduce_range=False),
    "x86-avx2": Target("x86-avx2", "uint8", reduce_range=True),
    "arm64": Target("arm64", "int8", reduce_range=False),
}


def resolved_target(name: str) -> Target:
    """The target of that name; 'auto' is the one that suits this machine."""
    if name != "auto":
        return TARGETS[name]
    if is_arm():
        return TARGETS["arm64"]
    return TARGETS["x86-vnni" if has_vnni() else "x86-avx2"]


def quantizable_operators() -> list[str]:
    """Operators that ONNX Runtime's static quantizer handles."""
    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def collect_ranges(proto: onnx.ModelProto, chunks: Iterable[Sequence[NDArray[Any]]]) -> Ranges:
    """Smallest and largest value of each float activation over all chunks; one chunk is in memory at a time.

    Args:
        proto: fp32 graph.
        chunks: batches: an array (n, ...) for each of the graph's inputs, in that order.
    """
    names = [value.name for value in proto.graph.input]
    with tempfile.TemporaryDirectory(prefix="compress-") as folder, _quiet():
        path = Path(folder) / "float.onnx"
        onnx.save_model(proto, path)
        calibrator = create_calibrator(
            path,
            quantizable_operators(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for chunk in chunks:
            calibrator.collect_data(_OneChunk(dict(zip(names, chunk, strict=True))))
        found = calibrator.compute_data()
    return {
        name: (float(np.min(data.range_value[0])), float(np.max(data.range_value[1])))
        for name, data in sorted(found.items())
    }


def quantize(proto: onnx.ModelProto, ranges: Ranges, target: Target, keep_float: Sequence[str]) -> onnx.ModelProto:
    """The graph with quantize/dequantize pairs, per-channel symmetric int8 weights and int32 biases.

    The result depends on nothing but the arguments: it can be made again from the float weights and the ranges.

    Args:
        proto: fp32 graph.
        ranges: smallest and largest value per activation, from `collect_ranges`.
        target: the CPU it is for.
        keep_float: names of nodes that stay in float.
    """
    signed = target.activations == "int8"
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    with _quiet():
        quantizer = QDQQuantizer(
            onnx.shape_inference.infer_shapes(proto),
            per_channel=True,
            reduce_range=target.reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if signed else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=[],
            nodes_to_exclude=list(keep_float),
            op_types_to_quantize=quantizable_operators(),
            extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # it appends pairs at the end
    return cleaned(quantizer.model.model)


def activation_scales(proto: onnx.ModelProto) -> dict[str, dict[str, float | int]]:
    """Scale and zero point of each quantized activation in a graph."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in constants:
            scale = numpy_helper.to_array(constants[node.input[1]])
            zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros(())
            if scale.size == 1:
                found[node.input[0]] = {"scale": float(scale.reshape(())), "zero_point": int(zero.reshape(()))}
    return found


def matching_nodes(proto: onnx.ModelProto, patterns: Sequence[str]) -> list[str]:
    """Names of the nodes that any of the patterns, with * and ?, matches."""
    names = [node.name for node in proto.graph.node]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class _OneChunk:
    """A calibration reader that gives one batch and ends."""

    def __init__(self, chunk: dict[str, NDArray[Any]]) -> None:
        self._pending: dict[str, NDArray[Any]] | None = chunk

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        chunk, self._pending = self._pending, None
        return chunk


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantization tools print to stdout and log advice that does not apply here."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
