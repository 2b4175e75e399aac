"""The most memory that the activations of an ONNX graph take at once, by liveness over the nodes in the file's order.

An activation lives from the node that writes it to the last one that reads it; what the graph takes lives from the start,
what it gives to the end. Constants, and what is computed of nothing but constants, are none. Then

- a view (Reshape, Flatten, Squeeze, Unsqueeze, Identity, Dropout) is the memory of what it shows;
- an element-wise operator, batch normalisation among them, writes into an input of the same size that nothing reads any
  more, unless a caller owns that;
- a node between DequantizeLinear and QuantizeLinear runs as one int8 kernel, a Relu or Clip behind it included: the
  tensors between them do not exist, the kernel reads and writes the quantized ones. So do MatMul and Gemm behind
  DequantizeLinear alone. Before any other node a DequantizeLinear's output is a float tensor like any other.

Runtimes that fuse more or plan better take less; their weights, workspaces and alignment come on top.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from onnx import TensorProto

from compress.bench.graph import Graph, Node
from compress.bench.shapes import Shapes, bytes_of

_VIEWS = {"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_ELEMENTWISE = {
    *("Abs", "Add", "BatchNormalization", "BiasGelu", "Cast", "Ceil", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "FastGelu"),
    *("Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow"),
    *("QLinearAdd", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu"),
    *("Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where"),
}  # fmt: skip
_LIMITS = {"Relu", "Clip"}
_INT8_WITH_FLOAT_RESULT = {"MatMul", "Gemm"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def peak_bytes(graph: Graph, shapes: Shapes) -> int | None:
    """The most bytes alive at once for one sample; None where a shape is not known or the graph has branches or loops."""
    nodes = [node for node in graph.nodes if not graph.is_folded(node)]
    if any(node.owns_graphs for node in nodes):
        return None
    try:
        return _Memory(graph, shapes, nodes).peak() // shapes.batch
    except _UnknownSizeError:
        return None


class _UnknownSizeError(Exception):
    """The size of an activation is not known."""


class _Memory:
    """Buffers while the nodes run one after the other. A value is held by one buffer or, as a view, by several."""

    def __init__(self, graph: Graph, shapes: Shapes, nodes: list[Node]) -> None:
        self._graph, self._shapes, self._nodes = graph, shapes, nodes
        self._pairs = _Pairs(graph, shapes, nodes)
        self._reads_left = Counter(value for node in nodes for value in self._activations(node))
        self._reads_left.update(graph.outputs)  # which nobody ever reads away
        self._bytes: list[int] = []
        self._users: list[int] = []
        """By buffer, reads that are still to come."""
        self._alive: set[int] = set()
        self._owned: set[int] = set()
        """Buffers of the caller."""
        self._buffers: dict[str, tuple[int, ...]] = {}

    def peak(self) -> int:
        for value in self._graph.inputs:
            self._hold(value, (self._new(self._size(value)),))
        self._owned = set(range(len(self._bytes)))
        most = self._total(self._alive)
        for node in self._nodes:
            read = self._activations(node)
            if any(value not in self._buffers for value in read):
                raise _UnknownSizeError  # the file reads what nothing writes
            for value in read:
                self._release(value)
            written = [value for value in node.outputs if value]
            for value in written:
                self._hold(value, self._place(node, value, read))
            # What the node read still counts: it is read while the node writes.
            touched = {buffer for value in (*read, *written) for buffer in self._buffers[value]}
            most = max(most, self._total(self._alive | touched))
        return most

    def _activations(self, node: Node) -> list[str]:
        return [value for value in node.inputs if value and value not in self._graph.sources]

    def _place(self, node: Node, value: str, read: list[str]) -> tuple[int, ...]:
        """Where a node writes one of its outputs."""
        source = self._buffers.get(node.inputs[0], ()) if node.inputs else ()
        if node.known in _VIEWS and source and value == node.outputs[0]:
            return source[-1:]
        if node.known == "DequantizeLinear" and source:
            quantized = source if self._pairs.is_read_in_int8(value) else ()
            return (*quantized, self._new(self._size(value))) if self._pairs.is_read_in_float(value) else quantized
        if node.known == "QuantizeLinear" and source and node.inputs[0] in self._pairs.narrow:
            return source
        size = self._size(self._pairs.narrow.get(value, value))
        if node.known in _ELEMENTWISE:
            for other in read:
                buffer = self._buffers[other][-1]
                if self._bytes[buffer] == size and not self._users[buffer] and buffer not in self._owned:
                    return (buffer,)
        return (self._new(size),)

    def _size(self, value: str) -> int:
        size = bytes_of(self._shapes, value)
        if size is None:
            raise _UnknownSizeError
        return size

    def _new(self, size: int) -> int:
        self._bytes.append(size)
        self._users.append(0)
        return len(self._bytes) - 1

    def _hold(self, value: str, buffers: tuple[int, ...]) -> None:
        self._buffers[value] = buffers
        for buffer in buffers if self._reads_left[value] else ():
            self._users[buffer] += self._reads_left[value]
            self._alive.add(buffer)

    def _release(self, value: str) -> None:
        for buffer in self._buffers[value]:
            self._users[buffer] -= 1
            if not self._users[buffer]:
                self._alive.remove(buffer)

    def _total(self, buffers: Iterable[int]) -> int:
        return sum(self._bytes[buffer] for buffer in buffers)


class _Pairs:
    """Which nodes run in int8 because of the pairs around them."""

    def __init__(self, graph: Graph, shapes: Shapes, nodes: list[Node]) -> None:
        self._graph, self._shapes = graph, shapes
        self._readers: dict[str, list[tuple[int, Node]]] = defaultdict(list)
        self._dequantized: set[str] = set()
        for index, node in enumerate(nodes):
            for value in node.inputs:
                self._readers[value].append((index, node))
            if node.known == "DequantizeLinear":
                self._dequantized |= set(node.outputs)
        ends = self._before_quantize(nodes)
        self._int8: set[int] = set()
        self.narrow: dict[str, str] = {}
        """Float values that only exist quantized: by value, the quantized one."""
        for index, node in enumerate(nodes):
            if self._runs_in_int8(node, ends):
                self._int8.add(index)
                self.narrow |= {value: ends[value] for value in node.outputs if value in ends}

    def is_read_in_int8(self, value: str) -> bool:
        """Whether an int8 kernel reads a dequantized value, which is its quantized one, or it is quantized again."""
        return any(self._is_int8(index, node) for index, node in self._readers[value])

    def is_read_in_float(self, value: str) -> bool:
        """Whether anything else reads a dequantized value."""
        return value in self._graph.outputs or not all(self._is_int8(*reader) for reader in self._readers[value])

    def _is_int8(self, index: int, node: Node) -> bool:
        return index in self._int8 or node.known == "QuantizeLinear"

    def _before_quantize(self, nodes: list[Node]) -> dict[str, str]:
        """Values that only QuantizeLinear reads, perhaps behind a Relu or Clip: by value, the first quantized one."""
        ends: dict[str, str] = {}
        for node in reversed(nodes):
            for value in node.outputs:
                readers = [reader for _, reader in self._readers[value]]
                if not value or not readers or value in self._graph.outputs:
                    continue
                first = readers[0]
                if all(reader.known == "QuantizeLinear" for reader in readers):
                    ends[value] = first.outputs[0]
                elif len(readers) == 1 and first.known in _LIMITS and first.outputs[0] in ends:
                    ends[value] = ends[first.outputs[0]]
        return ends

    def _runs_in_int8(self, node: Node, ends: dict[str, str]) -> bool:
        if node.known in ("QuantizeLinear", "DequantizeLinear"):
            return False
        read = [value for value in node.inputs if value and value not in self._graph.sources]
        floats = [value for value in read if self._shapes.types.get(value) in _FLOATS]
        behind_kernel = node.known in _LIMITS and bool(read) and read[0] in self.narrow
        if not floats or not (behind_kernel or all(value in self._dequantized for value in floats)):
            return False
        return node.known in _INT8_WITH_FLOAT_RESULT or all(value in ends for value in filter(None, node.outputs))
