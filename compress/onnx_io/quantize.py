"""Post-training int8: ranges from streamed data, then ONNX Runtime's QDQ quantizer.

`quantize_static` is taken apart because its calibration holds everything in memory; the range collector and the
quantizer inside it are called directly, chunk by chunk.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
import math
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

from compress.errors import StageError, listed
from compress.machine import has_vnni, is_arm
from compress.onnx_io.convert import cleaned

Ranges = dict[str, tuple[float, float]]

LARGEST = 1e6
"""Larger values stay in float: they say "nothing here" (-1e9, the smallest float, -inf), and one of them takes all 256 steps.

Activations stay below 65504 wherever a network was trained in half precision; 16-bit samples do too, or nearly.
"""
WIDEST_SCORES = 255.0
"""A wider range that a Softmax reads stays in float: with int8 steps over 1, scores that differ by a factor of e become equal."""

_MOVES = {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_MASKS = {"Add", "Sub", "Where"}
_BOUNDS_ONLY = {"Clip"}
"""Operators whose constants are limits, which are not quantized."""


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

    Values that are not finite show in the ranges: a mask may well be -inf.

    Args:
        proto: fp32 graph.
        chunks: batches: an array (n, ...) for each of the graph's inputs, in that order.

    Raises:
        StageError: where what the model answers is not finite.
    """
    names = [value.name for value in proto.graph.input]
    answers = {value.name for value in proto.graph.output}
    seen: dict[str, tuple[float, float]] = {}
    broken: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="compress-") as folder, _quiet():
        path = Path(folder) / "float.onnx"
        onnx.save_model(proto, path)
        calibrator = create_calibrator(
            path,
            quantizable_operators(),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        # Run here and not by its collect_data, which throws the answers away and every NaN with them.
        session = calibrator.infer_session
        outputs = [output.name for output in session.get_outputs()]
        for chunk in chunks:
            found = session.run(None, dict(zip(names, chunk, strict=True)))
            for name, array in zip(outputs, found, strict=True):
                if name not in answers:
                    low, high = seen.get(name, (math.inf, -math.inf))
                    seen[name] = float(np.minimum(low, array.min())), float(np.maximum(high, array.max()))
                elif array.dtype.kind == "f" and not np.isfinite(array).all():
                    broken.add(name)
    tensors = sorted({name.rpartition("_Reduce")[0] for name in seen})
    ranges = {name: (seen[f"{name}_ReduceMin"][0], seen[f"{name}_ReduceMax"][1]) for name in tensors}
    if broken:
        raise StageError(_not_finite(proto, ranges, broken))
    return ranges


def _not_finite(proto: onnx.ModelProto, ranges: Ranges, broken: set[str]) -> str:
    """Which answers are not finite, and where in the graph it begins."""
    made = [name for node in proto.graph.node for name in node.output]
    order = [*(value.name for value in proto.graph.input), *made]
    early = [name for name in order if name in ranges and name not in broken and not _is_finite(ranges[name])]
    text = f"quantize: not finite on calibration samples: what the model answers ({listed(sorted(broken))})"
    return f"{text}; before it, {listed(early, 5)}" if early else text


def _is_finite(limits: tuple[float, float]) -> bool:
    return math.isfinite(limits[0]) and math.isfinite(limits[1])


def beyond_int8(proto: onnx.ModelProto, ranges: Ranges) -> Ranges:
    """Activations and constants of which int8 would keep next to nothing, with their ranges.

    They hold values that are not finite or larger than `LARGEST`, are scores wider than `WIDEST_SCORES` on their way into
    a Softmax, or may be NaN because the graph asks whether they are.

    Args:
        proto: fp32 graph.
        ranges: from `collect_ranges`.
    """
    limits = {**_constant_ranges(proto), **ranges}
    found = {name for name, pair in limits.items() if not (_is_finite(pair) and max(map(abs, pair)) <= LARGEST)}
    scores: set[str] = set()
    for node in reversed(proto.graph.node):
        into_softmax = node.op_type in _MOVES | _MASKS and not scores.isdisjoint(node.output)
        if node.op_type == "Softmax" or into_softmax:
            scores |= {name for name in node.input if name in limits and not _is_narrow(limits[name])}
        if node.op_type == "IsNaN":
            found |= {name for name in node.input if name in limits}
    return {name: pair for name, pair in limits.items() if name in found | scores}


def _is_narrow(limits: tuple[float, float]) -> bool:
    return limits[1] - limits[0] <= WIDEST_SCORES


def _constant_ranges(proto: onnx.ModelProto) -> Ranges:
    """Smallest and largest value of each float constant that quantization would reach."""
    kinds = set(quantizable_operators()) - _BOUNDS_ONLY
    read = {name for node in proto.graph.node if node.op_type in kinds for name in node.input}
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.name in read and tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if array.size:
                found[tensor.name] = float(array.min()), float(array.max())
    return found


def nodes_at(proto: onnx.ModelProto, tensors: Iterable[str]) -> dict[str, str]:
    """Names of the nodes that quantization would reach and that read or write one of these tensors, with its name."""
    wanted, kinds = set(tensors), set(quantizable_operators())
    found = {}
    for node in proto.graph.node:
        touched = [name for name in (*node.output, *node.input) if name in wanted]
        if touched and node.op_type in kinds:
            found[node.name] = touched[0]
    return found


def quantize(proto: onnx.ModelProto, ranges: Ranges, target: Target, keep_float: Sequence[str]) -> onnx.ModelProto:
    """The graph with quantize/dequantize pairs, per-channel symmetric int8 weights and int32 biases.

    The result depends on nothing but the arguments: it can be made again from the float weights and the ranges.

    Args:
        proto: fp32 graph.
        ranges: smallest and largest value per activation, from `collect_ranges`, without those `beyond_int8`.
        target: the CPU it is for.
        keep_float: names of nodes that stay in float, those at tensors without a range among them.
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
