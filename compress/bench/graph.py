"""An ONNX file as a list of nodes and the constants that they read, without the data of the constants.

What the constants hold is counted while the file is read, one after the other, so that a file of hundreds of megabytes
is in memory once. Functions are inlined; nodes of an If, Loop or Scan stand in the list before the node that owns them.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compress.errors import CompressError, first_line

Shape = tuple[int, ...]

SMALL_BYTES = 4096
"""Constants up to this size keep their data in the graph: they may be the shapes that others are inferred from."""

_DOMAINS = {"", "ai.onnx", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
_DATA = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


@dataclass(frozen=True, eq=False)
class Constant:
    """One tensor that a file holds; equal to no other, so that what two values share counts once."""

    shape: Shape
    size_bytes: int
    """In the file, as it is stored there."""
    bits: int
    """Of an element; 0 where it is no number."""
    is_float: bool
    nonzero: int
    """Elements that are not zero."""
    integers: NDArray[Any] | None = field(repr=False)
    """The elements of a tensor of integers up to 32 bits."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Node:
    """One node that computes; constants are none."""

    name: str
    """As the file calls it, else the name of its first output."""
    operator: str
    domain: str
    inputs: tuple[str, ...]
    """Values; '' where an optional one is left out."""
    outputs: tuple[str, ...]
    """At least one."""
    attributes: dict[str, Any]
    """Numbers and texts; tensors and graphs aside."""
    is_inner: bool
    """Whether it belongs to a branch or a loop."""
    owns_graphs: bool
    """Whether it is a branch or a loop."""

    @property
    def known(self) -> str:
        """The operator where it is one of ONNX's or ONNX Runtime's; '' where somebody made it, whatever its name."""
        return self.operator if self.domain in _DOMAINS else ""

    def has(self, slot: int) -> bool:
        """Whether an optional input is there."""
        return slot < len(self.inputs) and bool(self.inputs[slot])


@dataclass(frozen=True)
class Graph:
    """A file, taken apart."""

    proto: onnx.ModelProto
    """Without functions and without the data of large constants."""
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    """Those that a caller gives: constants may be listed as inputs too."""
    outputs: tuple[str, ...]
    constants: dict[str, Constant]
    """By value."""
    sources: dict[str, tuple[Constant, ...]]
    """By value, the constants behind it: those themselves, and what nodes make of nothing else (dequantized weights)."""
    weight_bytes: int
    """Of all constants, also those that nothing reads."""
    files: tuple[Path, ...]
    """The file, and the files of external data beside it."""

    def is_folded(self, node: Node) -> bool:
        """Whether a node only reads constants, so that a runtime computes it once, when it loads."""
        return node.outputs[0] in self.sources


def parse(path: Path) -> onnx.ModelProto:
    """The content of an ONNX file, external data aside.

    Raises:
        CompressError: where the file cannot be read or is no ONNX file; it names the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CompressError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's errors come from a module of its own
        raise CompressError(f"{path}: is no ONNX file, or only a part of one") from error
    # Text may happen to be a valid message of unknown fields.
    if not proto.ir_version or not proto.HasField("graph"):
        raise CompressError(f"{path}: is no ONNX file: it holds no graph")
    if any(isinstance(text, bytes) for text in _texts(proto)):
        raise CompressError(f"{path}: is damaged: a name in it is no text")
    return proto


def read_graph(path: Path) -> Graph:
    """Read a file and the external data that it names.

    Raises:
        CompressError: where the file cannot be read or is no ONNX file, where its external data is missing or outside of
            its folder, and where a constant does not hold what its type and shape say; it names the file.
    """
    proto = parse(path)
    taker = _Taker(path)
    taker.take_graph(proto.graph)
    for function in proto.functions:
        taker.take_nodes(function.node)
    # Memory of a message is only freed with the whole message.
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    if proto.functions:
        try:
            proto = onnx.inliner.inline_local_functions(proto)
        except Exception as error:  # its errors have no common base but this
            raise CompressError(f"{path}: its functions cannot be inlined: {first_line(error)}") from error
    flat = _Flat(taker.found)
    flat.add(proto.graph, ChainMap(), "", is_inner=False)
    initialized = {tensor.name for tensor in proto.graph.initializer}
    return Graph(
        proto=proto,
        nodes=tuple(flat.nodes),
        inputs=tuple(value.name for value in proto.graph.input if value.name not in initialized),
        outputs=tuple(value.name for value in proto.graph.output),
        constants=flat.constants,
        sources=_sources(flat.nodes, flat.constants),
        weight_bytes=taker.total_bytes,
        files=(path, *sorted(taker.files)),
    )


def _texts(message: Any) -> Iterator[str | bytes]:
    """All names and texts of a message, those that are not UTF-8 as bytes."""
    for field_, value in message.ListFields():
        if field_.type == field_.TYPE_STRING:
            yield from (value,) if isinstance(value, (str, bytes)) else value
        elif field_.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                yield from _texts(part)


def graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Branches and bodies of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


class _Taker:
    """Counts what the tensors of a file hold, and takes the data of large ones out of the message.

    Each tensor gets a number in place of its comment, by which it is found again after functions were inlined.
    """

    def __init__(self, path: Path) -> None:
        self.found: list[Constant] = []
        self.total_bytes = 0
        self.files: set[Path] = set()
        self._path = path

    def take_graph(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._take(tensor)
        for sparse in graph.sparse_initializer:
            self._take_sparse(sparse)
        self.take_nodes(graph.node)

    def take_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            if node.op_type == "Constant":
                _as_tensor(node)
            for attribute in node.attribute:
                for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                    self._take(tensor)
                if attribute.HasField("sparse_tensor"):
                    self._take_sparse(attribute.sparse_tensor)
            for inner in graphs_in(node):
                self.take_graph(inner)

    def _take(self, tensor: onnx.TensorProto) -> None:
        constant = self._counted(tensor)
        tensor.doc_string = str(len(self.found))
        self.found.append(constant)
        self.total_bytes += constant.size_bytes

    def _take_sparse(self, sparse: onnx.SparseTensorProto) -> None:
        values, indices = self._counted(sparse.values), self._counted(sparse.indices)
        sparse.values.doc_string = str(len(self.found))
        stored = values.size_bytes + indices.size_bytes
        self.found.append(Constant(tuple(sparse.dims), stored, values.bits, values.is_float, values.nonzero, None))
        self.total_bytes += stored

    def _counted(self, tensor: onnx.TensorProto) -> Constant:
        """What a tensor holds; its data stays only where it is small or made of shapes."""
        try:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._bring_in(tensor)
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            shape = tuple(tensor.dims)
            if kind == "STRING":
                return Constant(shape, sum(map(len, tensor.string_data)), 0, False, 0, None)
            array = numpy_helper.to_array(tensor)
            if array.shape != shape:
                raise ValueError(f"{array.size} elements do not make the shape {shape}")
        except (ValueError, TypeError, KeyError) as error:
            raise CompressError(
                f"{self._path}: constant '{tensor.name}' cannot be read: {first_line(error)}"
            ) from error
        stored = _stored_bytes(tensor)
        if stored > SMALL_BYTES and tensor.data_type != onnx.TensorProto.INT64:
            _clear_data(tensor)
        is_float = "FLOAT" in kind or kind == "DOUBLE"
        is_native = array.dtype.kind in "fiu"
        bits = _bits(kind, array)
        if not is_float and 0 < bits <= 32:
            integers = array if is_native else array.astype(np.int8)  # of 2 or 4 bits
            return Constant(shape, stored, bits, False, int(np.count_nonzero(integers)), integers)
        nonzero = int(np.count_nonzero(array if is_native else array.astype(np.float32))) if bits else 0
        return Constant(shape, stored, bits, is_float, nonzero, None)

    def _bring_in(self, tensor: onnx.TensorProto) -> None:
        """Move data from a file beside the model into the message."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(entries.get("location", ""))
        if not location.parts or location.is_absolute() or ".." in location.parts or "\\" in str(location):
            raise ValueError(f"its data is said to be in '{location}', which is not in the folder of the file")
        file = self._path.parent / location
        offset = int(entries.get("offset", 0))
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                length = int(entries.get("length", size - offset))
                if offset < 0 or length < 0 or offset + length > size:
                    raise ValueError(f"its data is said to be bytes {offset} to {offset + length} of '{location}'")
                stream.seek(offset)
                content = stream.read(length)
        except OSError as error:
            raise ValueError(f"its data is in '{location}': {error.strerror or error}") from error
        self.files.add(file)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = content


def _bits(kind: str, array: NDArray[Any]) -> int:
    """Bits of an element: of types smaller than a byte the name tells; 0 for truth values and complex numbers."""
    if kind in ("BOOL", "COMPLEX64", "COMPLEX128"):
        return 0
    for prefix in ("UINT", "INT", "FLOAT"):
        digits = "".join(itertools.takewhile(str.isdigit, kind.removeprefix(prefix)))
        if kind.startswith(prefix) and digits:
            return int(digits)
    return array.dtype.itemsize * 8


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's data in the file: numbers in typed fields may take fewer or more than in memory."""
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    _clear_data(bare)
    return int(tensor.ByteSize() - bare.ByteSize())


def _clear_data(tensor: onnx.TensorProto) -> None:
    for name in _DATA:
        tensor.ClearField(name)


def _as_tensor(node: onnx.NodeProto) -> None:
    """Write a constant that is given as numbers as the tensor that it stands for."""
    kinds: dict[str, Any] = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    for attribute in node.attribute:
        if attribute.name in kinds:
            array = np.asarray(helper.get_attribute_value(attribute), dtype=kinds[attribute.name])
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))


class _Flat:
    """The nodes of a graph and all graphs inside; values inside are renamed, because branches may use a name twice."""

    def __init__(self, found: list[Constant]) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}
        self._found = found
        self._graphs = itertools.count()

    def add(self, graph: onnx.GraphProto, scope: ChainMap[str, str], prefix: str, *, is_inner: bool) -> None:
        here = scope.new_child()
        for value in graph.input:
            here[value.name] = prefix + value.name
        held = [(tensor.name, tensor) for tensor in graph.initializer]
        held += [(sparse.values.name, sparse.values) for sparse in graph.sparse_initializer]
        for name, tensor in held:
            here[name] = prefix + name
            self.constants[prefix + name] = self._found[int(tensor.doc_string)]
        for node in graph.node:
            inner = list(graphs_in(node))
            for each in inner:
                self.add(each, here, f"{next(self._graphs)}\0", is_inner=True)
            if not node.output:
                continue  # invalid, and of no use to anybody
            for name in node.output:
                here[name] = prefix + name if name else ""
            if node.op_type == "Constant":
                self._add_constant(node, prefix)
                continue
            self.nodes.append(
                Node(
                    name=node.name or next(filter(None, node.output), node.op_type),
                    operator=node.op_type,
                    domain=node.domain,
                    inputs=tuple(here.get(name, name) for name in node.input),
                    outputs=tuple(here[name] for name in node.output),
                    attributes=_plain_attributes(node),
                    is_inner=is_inner,
                    owns_graphs=bool(inner),
                )
            )

    def _add_constant(self, node: onnx.NodeProto, prefix: str) -> None:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                self.constants[prefix + node.output[0]] = self._found[int(attribute.t.doc_string)]
            elif attribute.HasField("sparse_tensor"):
                values = attribute.sparse_tensor.values
                self.constants[prefix + node.output[0]] = self._found[int(values.doc_string)]


def _plain_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    plain = onnx.AttributeProto
    kinds = (plain.FLOAT, plain.INT, plain.STRING, plain.FLOATS, plain.INTS)
    return {each.name: helper.get_attribute_value(each) for each in node.attribute if each.type in kinds}


def _sources(nodes: Iterable[Node], constants: dict[str, Constant]) -> dict[str, tuple[Constant, ...]]:
    """For each value that only depends on constants, those behind it, in the order in which they are read."""
    sources: dict[str, tuple[Constant, ...]] = {value: (constant,) for value, constant in constants.items()}
    for node in nodes:
        read = [value for value in node.inputs if value]
        if not read or node.owns_graphs or node.known in _RANDOM:
            continue
        if all(value in sources for value in read):
            behind = tuple(dict.fromkeys(itertools.chain.from_iterable(sources[value] for value in read)))
            sources |= dict.fromkeys(filter(None, node.outputs), behind)
    return sources
