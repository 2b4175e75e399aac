"""Size of any ONNX file: bytes, parameters, multiply-accumulates and memory of activations, in all and per layer."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from compress.bench.activations import peak_bytes
from compress.bench.graph import Constant, Graph, Node, graphs_in, parse, read_graph
from compress.bench.macs import PRODUCTS, macs
from compress.bench.shapes import Shapes, infer
from compress.errors import CompressError
from compress.measured import Layer, Precision, Size

GZIP_LEVEL: Final = 6
_CHUNK_BYTES = 1 << 20
_GZIP = 31
"""zlib's number for the largest window in gzip's format; the header it writes has no name and no time."""

_ZERO_POINTS: dict[str, dict[int, int]] = {
    "ConvInteger": {0: 2, 1: 3},
    "DequantizeLinear": {0: 2},
    "DynamicQuantizeLSTM": {1: 9, 2: 11},
    "DynamicQuantizeMatMul": {1: 3},
    "MatMulInteger": {0: 2, 1: 3},
    "MatMulIntegerToFloat": {0: 4, 1: 5},
    "QAttention": {1: 7},
    "QGemm": {0: 2, 3: 5},
    "QLinearAdd": {0: 2, 3: 5},
    "QLinearConv": {0: 2, 3: 5},
    "QLinearMatMul": {0: 2, 3: 5},
    "QLinearMul": {0: 2, 3: 5},
    "QuantizeLinear": {},
}
"""Operators on quantized tensors: the slot of each that has a zero point, and the slot of that."""

_SETTINGS: dict[str, Collection[int]] = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "ConvInteger": (2, 3),
    "DequantizeLinear": (1, 2),
    "Dropout": (1, 2),
    "DynamicQuantizeLSTM": range(8, 12),
    "DynamicQuantizeMatMul": (2, 3),
    "GatherBlockQuantized": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "MatMulNBits": (2, 3, 4),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "QAttention": (3, 4, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearWhere": (2, 3, 5, 6, 7, 8),
    "QuantizeLinear": (1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}
"""Slots whose constants are scales, zero points, limits and running statistics: no parameters."""

_ARITHMETIC = {"Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Pow", "Sub", "Where"}
"""Operators whose constants of one element are numbers of a formula, such as the factor of attention: no parameters.

Add is none of them: what it adds may be the bias of a layer with one output.
"""

_MOVES = {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose result has the zero point of their first input."""

_INT8_OPERATORS = {"ConvInteger", "MatMulInteger", "QAttention", "QEmbedLayerNormalization", "QGemm", "QuantizeLinear"}
_INT8_PREFIXES = ("QLinear", "DynamicQuantize", "MatMulIntegerTo")


_FLOATS: Final[dict[int, Precision]] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT: "fp32",
    TensorProto.DOUBLE: "fp32",
}
_HALVES: Final[tuple[Precision, ...]] = ("fp16", "bf16")


def measure_size(path: Path) -> Size:
    """Measure an ONNX file, anybody's: float or quantized by pairs (QDQ), by operators (QLinear…), or dynamically.

    - `size_bytes` and `gzip_bytes` are those of the file and of all files of external data beside it.
    - Parameters are elements of constants that nodes read as weights or biases, wherever they stand (initializers,
      Constant nodes, branches, functions); where several read one, it counts once. Aside are scales and zero points,
      running statistics of BatchNormalization, single numbers (tensors without an axis, and those of one element that
      Mul, Div and such read), limits of Clip, Resize, Pad and such, integers of 64 bits (shapes, axes, indices), integers
      of 16 and 32 bits that no quantized operator reads, truth values, texts and what nothing reads. A constant mask or
      table of floats counts: the file does not tell it from a weight.
    - Non-zero are those that differ from 0 or, quantized, from their zero point. Weights that MatMulNBits packs are not
      unpacked and count as non-zero.
    - Layers are nodes as the file has them. Constants behind nodes that read nothing else, such as the DequantizeLinear of
      a weight, belong to the first node that computes with them; such nodes are no layers.
    - MACs are counted as `compress.bench.macs` says. Those of a product whose shapes are not known, or in a branch or loop,
      which run nobody knows how often, are None, and with one such layer so is their sum.
    - Shapes are those at batch size 1: the open first size of an input is the batch. A file that fixes another batch size is
      taken as it is, and MACs, shapes and peak are divided by it. Where a size besides the batch is open, shapes that
      depend on it are unknown.
    - The peak of activations is defined in `compress.bench.activations`.

    Raises:
        CompressError: as `compress.bench.graph.read_graph`.
    """
    graph = read_graph(path)
    shapes = infer(graph)
    layers = tuple(_layers(graph, shapes))
    try:
        size_bytes = sum(file.stat().st_size for file in graph.files)
        gzip_bytes = sum(_gzip_bytes(file) for file in graph.files)
    except OSError as error:
        raise CompressError(f"{path}: cannot be read: {error.strerror or error}") from error
    return Size(
        size_bytes=size_bytes,
        gzip_bytes=gzip_bytes,
        weight_bytes=graph.weight_bytes,
        parameters=sum(layer.record.parameters for layer in layers),
        nonzero_parameters=sum(layer.nonzero for layer in layers),
        macs=_sum(layer.record.macs for layer in layers),
        activation_peak_bytes=peak_bytes(graph, shapes),
        layers=tuple(layer.record for layer in layers),
    )


def precision_of(path: Path) -> Precision:
    """'int8' where the file quantizes activations, so that it computes in integers, else the type of most of its weights.

    Elements of constants of floats count, in the type in which they are computed with: behind Cast in that of its result,
    behind DequantizeLinear in that of its scale. Weights that are only stored in int8 are therefore no 'int8'. Halves that
    are not the most, doubles and files without weights are 'fp32'.

    Raises:
        CompressError: where the file cannot be read or is no ONNX file; it names the file.
    """
    proto = parse(path)
    nodes = list(itertools.chain(_nodes_in(proto.graph.node), *(_nodes_in(each.node) for each in proto.functions)))
    if any(_computes_in_int8(node.op_type) for node in nodes):
        return "int8"
    graphs = [proto.graph, *itertools.chain.from_iterable(map(graphs_in, nodes))]
    held = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            held |= {name: each.t for name in node.output for each in node.attribute if each.HasField("t")}
    types = {name: tensor.data_type for name, tensor in held.items()}
    for node in nodes:
        if node.op_type == "Cast":
            types |= {
                name: each.i for name in node.input if name in held for each in node.attribute if each.name == "to"
            }
        elif node.op_type == "DequantizeLinear" and len(node.input) > 1 and node.input[1] in held:
            types |= {name: held[node.input[1]].data_type for name in node.input[:1] if name in held}
    elements: Counter[Precision] = Counter()
    for name, tensor in held.items():
        if tensor.dims and types[name] in _FLOATS:  # a number without an axis is no weight
            elements[_FLOATS[types[name]]] += math.prod(tensor.dims)
    halves = max(_HALVES, key=lambda half: elements[half])
    return halves if 2 * elements[halves] > elements.total() else "fp32"


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one is not known: a sum with a hole looks like a small number."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _nodes_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes at every depth."""
    for node in nodes:
        yield node
        for graph in graphs_in(node):
            yield from _nodes_in(graph.node)


def _computes_in_int8(operator: str) -> bool:
    return operator in _INT8_OPERATORS or operator.startswith(_INT8_PREFIXES)


def _gzip_bytes(file: Path) -> int:
    """Bytes of a file compressed by gzip, a piece in memory at a time."""
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP)
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total += len(compressor.compress(chunk))
    return total + len(compressor.flush())


@dataclass(frozen=True)
class _Measured:
    """A layer, and how many of its parameters are not zero."""

    record: Layer
    nonzero: int


def _layers(graph: Graph, shapes: Shapes) -> Iterator[_Measured]:
    weights = _Weights(graph).found
    taken: set[Constant] = set()
    for node in graph.nodes:
        if graph.is_folded(node):
            continue
        behind = itertools.chain.from_iterable(graph.sources.get(value, ()) for value in node.inputs)
        held = [constant for constant in dict.fromkeys(behind) if constant not in taken]
        taken.update(held)
        counts = [weights[constant] for constant in held if constant in weights]
        if not counts and node.known not in PRODUCTS:
            continue
        products = 0 if node.known not in PRODUCTS else None if node.is_inner else macs(node, shapes.shapes.get)
        record = Layer(
            name=node.name,
            operator=node.operator,
            parameters=sum(count.parameters for count in counts),
            size_bytes=sum(constant.size_bytes for constant in held),
            macs=None if products is None else products // shapes.batch,
            output=None if node.is_inner else shapes.one(node.outputs[0]),
        )
        yield _Measured(record, sum(count.nonzero for count in counts))


@dataclass(frozen=True)
class _Count:
    """Parameters that one constant holds."""

    parameters: int
    nonzero: int


@dataclass(frozen=True)
class _ZeroPoint:
    """Which number of a quantized constant means zero."""

    values: NDArray[Any]
    axis: int
    """Along which the values run, where there are several."""
    block_size: int
    """Elements along the axis that share a value, where values have as many axes as the constant; else 0."""


@dataclass
class _Weights:
    """Which constants are parameters, told from where they are read."""

    graph: Graph
    found: dict[Constant, _Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read: set[str] = set()
        self._quantized: set[str] = set()
        self._zeros: dict[str, _ZeroPoint] = {}
        packed: dict[Constant, int] = {}
        # Backwards: what a constant is follows from the nodes behind those that only pass it on.
        for node in reversed(self.graph.nodes):
            self._look_at(node)
            if node.known == "MatMulNBits" and node.has(1) and {"K", "N"} <= set(node.attributes):
                of = self.graph.sources.get(node.inputs[1], ())
                packed |= dict.fromkeys(of, node.attributes["K"] * node.attributes["N"])
        for value, constant in self.graph.constants.items():
            if constant in packed:
                self.found[constant] = _Count(packed[constant], packed[constant])
            elif value in self._read and self._is_parameter(value, constant):
                self.found[constant] = _Count(constant.elements, self._nonzero(value, constant))

    def _look_at(self, node: Node) -> None:
        zero_slots = _ZERO_POINTS.get(node.known)
        passes_on = self.graph.is_folded(node)
        is_read = not passes_on or not self._read.isdisjoint(node.outputs)
        is_quantized = zero_slots is not None or (passes_on and not self._quantized.isdisjoint(node.outputs))
        for slot, value in enumerate(node.inputs):
            behind = self.graph.sources.get(value, ())
            if behind and is_read and not _is_setting(node, slot) and not _is_number(node, behind):
                self._read.add(value)
                if is_quantized:
                    self._quantized.add(value)
            if zero_slots is not None and slot in zero_slots:
                self._set_zero(node, slot, zero_slots[slot])
        if node.known in _MOVES and node.has(0) and node.outputs[0] in self._zeros:
            zero = self._zeros[node.outputs[0]]
            # Its axis may have moved.
            if (zero.values == zero.values.flat[0]).all():
                self._zeros[node.inputs[0]] = _ZeroPoint(zero.values.flat[:1], 0, 0)

    def _set_zero(self, node: Node, slot: int, zero_slot: int) -> None:
        constant = self.graph.constants.get(node.inputs[zero_slot]) if node.has(zero_slot) else None
        if constant is not None and constant.integers is not None and constant.elements:
            axis, block_size = _zero_axis(node)
            self._zeros[node.inputs[slot]] = _ZeroPoint(constant.integers, axis, block_size)
        else:
            self._zeros.pop(node.inputs[slot], None)

    def _is_parameter(self, value: str, constant: Constant) -> bool:
        if not constant.shape or not constant.bits:
            return False
        if constant.is_float or constant.bits <= 8:
            return True
        return constant.bits <= 32 and value in self._quantized

    def _nonzero(self, value: str, constant: Constant) -> int:
        zero = self._zeros.get(value)
        if zero is None or constant.integers is None or not zero.values.any():
            return constant.nonzero
        return int(np.count_nonzero(constant.integers != _spread(zero, constant.integers.shape)))


def _is_setting(node: Node, slot: int) -> bool:
    if node.known == "QLinearConcat":
        return slot < 2 or (slot - 2) % 3 != 0
    if node.known.startswith("QLinear") and node.known not in _SETTINGS:
        return slot > 0
    return slot in _SETTINGS.get(node.known, ())


def _is_number(node: Node, constants: Iterable[Constant]) -> bool:
    return node.known in _ARITHMETIC and all(constant.elements == 1 for constant in constants)


def _zero_axis(node: Node) -> tuple[int, int]:
    """The axis along which zero points run, and how many elements share one where they come in blocks."""
    if node.known == "DequantizeLinear":
        return int(node.attributes.get("axis", 1)), int(node.attributes.get("block_size", 0))
    if node.known in ("QLinearConv", "ConvInteger"):
        return 0, 0
    if node.known == "QGemm" and node.attributes.get("transB", 0):
        return 0, 0
    return -1, 0


def _spread(zero: _ZeroPoint, shape: tuple[int, ...]) -> NDArray[Any]:
    """Zero points in a shape that can be compared with the constant's; a single 0 where they do not fit it."""
    values = zero.values
    if values.size == 1:
        return values.reshape(())
    fits = -len(shape) <= zero.axis < len(shape)
    if fits and values.ndim == 1 and values.size == shape[zero.axis]:
        sizes = [1] * len(shape)
        sizes[zero.axis] = -1
        return values.reshape(sizes)
    if fits and zero.block_size > 0 and values.ndim == len(shape):
        blocks = np.repeat(values, zero.block_size, axis=zero.axis)
        spread = blocks[(*[slice(None)] * (zero.axis % len(shape)), slice(shape[zero.axis]))]
        if spread.shape == shape:
            return spread
    return np.zeros((), values.dtype)
