"""Shapes and types of all values of an ONNX graph at batch size 1, by ONNX's own inference.

It knows no operators of ONNX Runtime (com.microsoft). For the inference alone, each of the common ones is replaced by the
standard operator whose result has the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from compress.bench.graph import Graph, Shape

_MICROSOFT = "com.microsoft"

_ALIKE: dict[str, tuple[str, tuple[int, ...]]] = {
    "BiasGelu": ("Identity", (0,)),
    "DequantizeLinear": ("DequantizeLinear", (0, 1, 2)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "FastGelu": ("Identity", (0,)),
    "FusedConv": ("Conv", (0, 1, 2)),
    "FusedGemm": ("Gemm", (0, 1, 2)),
    "Gelu": ("Identity", (0,)),
    "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "QGemm": ("Gemm", (0, 3)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearLeakyRelu": ("Identity", (0,)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearReduceMean": ("ReduceMean", (0,)),
    "QLinearSigmoid": ("Identity", (0,)),
    "QLinearSoftmax": ("Identity", (0,)),
    "QLinearWhere": ("Where", (0, 1, 4)),
    "QuantizeLinear": ("QuantizeLinear", (0, 1, 2)),
    "QuickGelu": ("Identity", (0,)),
    "SkipLayerNormalization": ("Identity", (0,)),
}
"""Operator of ONNX Runtime: the standard operator of the same shape, and which inputs that takes."""

_CHANNELS_LAST = {
    "NhwcMaxPool": "MaxPool",
    "QLinearAveragePool": "AveragePool",
    "QLinearConv": "QLinearConv",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
}
"""Operators of ONNX Runtime that can have their channels last: the standard operator that has them second."""

_RECURRENT = {"DynamicQuantizeLSTM", "GRU", "LSTM", "RNN"}
"""Operators whose input has its steps first, and the batch second, unless `layout` says otherwise."""


@dataclass(frozen=True)
class Shapes:
    """What is known of the values of a graph; of inner graphs nothing is."""

    shapes: dict[str, Shape]
    """By value, without those of which any size is open."""
    types: dict[str, int]
    """By value, the type of an element (`onnx.TensorProto.DataType`)."""
    batch: int
    """How many samples the shapes are for: 1, or the batch size that the file fixes."""

    def one(self, value: str) -> Shape | None:
        """A shape at batch size 1; None where it is not known."""
        shape = self.shapes.get(value)
        if shape and self.batch > 1 and shape[0] % self.batch == 0:
            return (shape[0] // self.batch, *shape[1:])
        return shape


def infer(graph: Graph) -> Shapes:
    """Infer all shapes with the batch set to 1.

    The open first size of an input is the batch, and so is every size of the same name; other open sizes stay open. A file
    whose inputs of two axes or more all begin with one fixed size is fixed to that batch size, unless an output, as far as
    its shape is known or inferred, begins with another, or a recurrent operator takes that size for its steps.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    given = [value for value in proto.graph.input if value.name in set(graph.inputs)]
    _close_batch(given, [*proto.graph.output, *proto.graph.value_info])
    shapes = {value: constant.shape for value, constant in graph.constants.items()}
    _replace_nodes(proto, shapes)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        inferred = proto
    batch = 1 if _has_steps_first(graph) else _fixed_batch(given, inferred.graph.output)
    types: dict[str, int] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        if not value.type.HasField("tensor_type"):
            continue
        types[value.name] = value.type.tensor_type.elem_type
        shape = _sizes(value)
        if shape is not None and all(size is not None for size in shape):
            shapes[value.name] = tuple(size for size in shape if size is not None)
    return Shapes(shapes, types, batch)


def _sizes(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    """Sizes of a value's axes, None for an open one; None where even their number is open."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(size.dim_value if _is_closed(size) else None for size in tensor.shape.dim)


def _is_closed(size: onnx.TensorShapeProto.Dimension) -> bool:
    # Some exporters write -1 for an open size.
    return size.HasField("dim_value") and size.dim_value >= 0


def _has_steps_first(graph: Graph) -> bool:
    """Whether a recurrent node reads an input of the graph as a sequence of batches."""
    recurrent = [node for node in graph.nodes if node.known in _RECURRENT and not node.attributes.get("layout", 0)]
    return any(node.has(0) and node.inputs[0] in graph.inputs for node in recurrent)


def _fixed_batch(inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]) -> int:
    """The batch size that a file is fixed to, 1 where it is not.

    Args:
        inputs: Those that a caller gives, an open batch set to 1.
        outputs: With what was inferred of them.
    """
    taken = {shape[0] if shape else None for shape in map(_sizes, inputs) if shape is None or len(shape) > 1}
    if len(taken) != 1:
        return 1
    batch = taken.pop() or 1
    for shape in map(_sizes, outputs):
        if shape is not None and (not shape or shape[0] not in (None, batch)):
            return 1  # what does not come once per sample
    return batch


def _close_batch(inputs: Iterable[onnx.ValueInfoProto], others: Iterable[onnx.ValueInfoProto]) -> None:
    """Set the batch to 1, wherever its name stands."""
    values, names = list(inputs), set()
    for value in values:
        sizes = value.type.tensor_type.shape.dim
        if sizes and (not _is_closed(sizes[0]) or sizes[0].dim_value == 0):
            names.add(sizes[0].dim_param)
            sizes[0].dim_value = 1
    names.discard("")
    for value in (*values, *others):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_value = 1
            elif size.HasField("dim_value") and size.dim_value < 0:
                size.ClearField("dim_value")


def _replace_nodes(proto: onnx.ModelProto, constants: dict[str, Shape]) -> None:
    """Put standard operators in the place of ONNX Runtime's."""
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        try:
            made = _standard(node, proto.graph, constants) if node.domain == _MICROSOFT else None
        except (IndexError, KeyError, TypeError, ValueError):  # it lacks what its operator needs
            made = None
        nodes += [node] if made is None else made
    if any(not node.domain for node in nodes) and all(each.domain for each in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("", onnx.defs.onnx_opset_version()))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    proto.graph.ClearField("node")
    proto.graph.node.extend(kept)


def _standard(node: onnx.NodeProto, graph: onnx.GraphProto, constants: dict[str, Shape]) -> list[onnx.NodeProto] | None:
    """Standard nodes whose outputs have the shape of one of ONNX Runtime's; None where it has no such likeness."""
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    inputs, output = list(node.input), node.output[:1]
    if attributes.get("channels_last", 0) or node.op_type == "NhwcMaxPool":
        return _with_channels_last(node, constants)
    if node.op_type in _ALIKE:
        operator, slots = _ALIKE[node.op_type]
        made = helper.make_node(operator, [inputs[slot] for slot in slots if slot < len(inputs)], output)
        made.attribute.extend(node.attribute)
        is_float = node.op_type == "MatMulIntegerToFloat" or (node.op_type == "QGemm" and len(inputs) < 8)
        return _in_float(made) if is_float else [made]
    if node.op_type == "QLinearConcat":
        return [helper.make_node("Concat", inputs[2::3], output, axis=attributes.get("axis", 0))]
    if node.op_type == "FusedMatMul":
        if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
            return None
        left = "...ji" if attributes.get("transA", 0) else "...ij"
        right = "...kj" if attributes.get("transB", 0) else "...jk"
        return [helper.make_node("Einsum", inputs[:2], output, equation=f"{left},{right}->...ik")]
    if node.op_type == "MatMulNBits":
        return _times_matrix(graph, inputs[0], (attributes["K"], attributes["N"]), output)
    if node.op_type in ("Attention", "QAttention") and len(constants.get(inputs[1], ())) == 2:
        rows, columns = constants[inputs[1]]
        sizes: Sequence[int] = attributes.get("qkv_hidden_sizes", ())
        return _times_matrix(graph, inputs[0], (rows, sizes[2] if sizes else columns // 3), output)
    # Without packed or cached keys and values: those come in other shapes.
    if node.op_type == "MultiHeadAttention" and len(inputs) in range(3, 7) and all(inputs[:3]):
        return [helper.make_node("Identity", inputs[:1], output)]
    return None


def _with_channels_last(node: onnx.NodeProto, constants: dict[str, Shape]) -> list[onnx.NodeProto] | None:
    """The standard operator, which wants channels second, between two transpositions."""
    operator = _CHANNELS_LAST.get(node.op_type)
    if operator is None:
        return None
    weight = constants.get(node.input[3]) if operator == "QLinearConv" else None
    rank = len(weight) if weight else 4  # of pools too: those of images
    before, after = f"{node.output[0]}\0before", f"{node.output[0]}\0after"
    inputs = [before, *(node.input[1:] if operator == "QLinearConv" else [])]
    made = helper.make_node(operator, inputs, [after])
    made.attribute.extend(each for each in node.attribute if each.name != "channels_last")
    return [
        helper.make_node("Transpose", node.input[:1], [before], perm=[0, rank - 1, *range(1, rank - 1)]),
        made,
        helper.make_node("Transpose", [after], node.output[:1], perm=[0, *range(2, rank), 1]),
    ]


def _in_float(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node, and its result in float32."""
    result = node.output[0]
    node.output[0] = f"{result}\0integer"
    return [node, helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.FLOAT)]


def _times_matrix(graph: onnx.GraphProto, left: str, shape: Shape, output: Sequence[str]) -> list[onnx.NodeProto]:
    """A product with a matrix of that shape."""
    name = f"{output[0]}\0matrix"
    graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
    return [helper.make_node("MatMul", [left, name], output)]


def bytes_of(shapes: Shapes, value: str) -> int | None:
    """Bytes of a value in memory, elements of less than a byte packed; None where type or shape is not known."""
    shape, kind = shapes.shapes.get(value), shapes.types.get(value, 0)
    name = TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else ""
    if shape is None or name in ("", "UNDEFINED", "STRING"):
        return None
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(name)
    if bits is None:
        bits = helper.tensor_dtype_to_np_dtype(kind).itemsize * 8
    return (math.prod(shape) * bits + 7) // 8
