"""The one conversion from a torch module to ONNX, and the cleaning that every file goes through.

torch's exporter notes on each node the stack trace of whoever exported, local paths and source lines included: an
artifact carries none of it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from compress.errors import ExportError

INPUT, OUTPUT, BATCH = "input", "logits", "batch"
OPSET = 20
IR_VERSION = 10
PRODUCER = "compress"


def to_onnx(model: nn.Module, input_shape: Sequence[int]) -> onnx.ModelProto:
    """Convert a float model to a clean fp32 ONNX graph with a dynamic batch axis.

    Args:
        model: takes (n, *input_shape) and gives (n, classes); left as it is.
        input_shape: shape of one sample.

    Raises:
        ExportError: where torch cannot export the model, with its reason.
    """
    example = torch.zeros(2, *input_shape)
    try:
        plain = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
        with _quiet():
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; each means the same to the user
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(
            f"torch cannot export the model to ONNX: {reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    return cleaned(program.model_proto)


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without anything the exporter left behind, and with pooling that int8 kernels exist for."""
    clean = onnx.ModelProto()
    clean.CopyFrom(proto)
    _strip(clean)
    clean.producer_name, clean.producer_version, clean.domain = PRODUCER, "", ""
    clean.ir_version = IR_VERSION
    graph = clean.graph
    graph.name = "model"
    graph.ClearField("value_info")
    _pool_globally(clean)
    return clean


def _strip(message: Any) -> None:
    """Clear comments and metadata at every depth, in the branches of an `If` and in functions too."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _strip(part)


def add_metadata(proto: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """A copy with the given key-value pairs in the file's metadata."""
    described = onnx.ModelProto()
    described.CopyFrom(proto)
    helper.set_model_props(described, metadata)
    return described


def serialized(proto: onnx.ModelProto) -> bytes:
    """The bytes of a file; equal graphs give equal bytes."""
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _pool_globally(proto: onnx.ModelProto) -> None:
    """Turn means over height and width into GlobalAveragePool: the exporter takes it apart, int8 kernels need it whole."""
    graph, spatial = proto.graph, _spatial_means(proto)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.output[0] not in spatial:
            nodes.append(node)
        elif attributes.get("keepdims", 1):
            nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], name=node.name))
        else:
            pooled = f"{node.output[0]}_pooled"
            nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flatten", axis=1))
    graph.ClearField("node")
    graph.node.extend(nodes)
    used = set(_read_names(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _read_names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read_names(attribute.g)


def _spatial_means(proto: onnx.ModelProto) -> set[str]:
    """Outputs of the nodes that average over the last two of four axes."""
    if not any(node.op_type == "ReduceMean" for node in proto.graph.node):
        return set()
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*inferred.value_info, *inferred.input)}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = set()
    for node in proto.graph.node:
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]) % 4
            if ranks.get(node.input[0]) == 4 and np.array_equal(np.sort(axes), [2, 3]):
                found.add(node.output[0])
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks to stdout, to loggers and through warnings; none of it is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
