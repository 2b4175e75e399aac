"""The one conversion from a torch module to ONNX, and the cleaning that every file goes through.

torch's exporter notes on each node the stack trace of whoever exported, local paths and source lines included: an
artifact carries none of it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from compress.data.base import Input
from compress.errors import CompressError, ExportError, first_line
from compress.models.answers import outputs_of

BATCH = "batch"
OPSET = 20
IR_VERSION = 10
PRODUCER = "compress"
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(sysconfig.get_path("stdlib")), Path(__file__).parent)


def to_onnx(model: nn.Module, inputs: Sequence[Input]) -> onnx.ModelProto:
    """Convert a float model to a clean fp32 ONNX graph with a dynamic batch axis on each input.

    Args:
        model: takes one tensor (n, *shape) for each input, in that order, and answers logits (n, classes), perhaps among
            other outputs (`compress.models.answers`); left as it is.
        inputs: what it takes; the graph's inputs are called the same, its outputs as the model's.

    Raises:
        ExportError: where torch cannot export the model, with its reason; where an input and an output have one name.
    """
    example = tuple(each.zeros(2) for each in inputs)
    try:
        plain = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
        with _quiet():
            with torch.no_grad():
                answer = plain(*example)
            outputs = list(outputs_of(answer))
            _check_names([each.name for each in inputs], outputs)
            is_plain = isinstance(answer, torch.Tensor)
            exported = plain if is_plain else _InOrder(plain)
            program = torch.onnx.export(
                exported,
                example,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_dynamic_shapes(exported, example),
                input_names=[_placeholder("input", i) for i in range(len(inputs))],
                output_names=[_placeholder("output", i) for i in range(len(outputs))],
                verbose=False,
            )
    except CompressError as error:
        raise ExportError(f"the model cannot be exported to ONNX: {error}") from error
    except Exception as error:  # the exporter raises many kinds; each means the same to the user
        raise ExportError(f"torch cannot export the model to ONNX: {_reason(error.__cause__ or error)}") from error
    assert program is not None
    proto = program.model_proto
    names = {_placeholder("input", i): each.name for i, each in enumerate(inputs)}
    names |= {_placeholder("output", i): name for i, name in enumerate(outputs)}
    _rename(proto.graph, names)
    return cleaned(proto)


def _dynamic_shapes(model: nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """The first axis of each input is the batch; what `*inputs` takes is one argument, a tuple."""
    batch = {0: torch.export.Dim(BATCH)}
    signature = inspect.signature(model.forward)
    gathered = {p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL}
    given = signature.bind(*example).arguments
    return tuple((batch,) * len(value) if name in gathered else batch for name, value in given.items())


def _reason(error: BaseException) -> str:
    """Why the exporter refused, in one line."""
    reason = first_line(error)
    if "data-dependent" not in reason:
        return reason
    reason = "forward depends on the values of its inputs in Python, which cannot be exported"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if not any(file.is_relative_to(folder) for folder in _NOT_THE_USERS):
            return f"{reason} ({file.name}:{frame.lineno})"
    return reason


class _InOrder(nn.Module):
    """A model whose outputs are a plain tuple, which is what the exporter gives names to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(outputs_of(self.model(*inputs)).values())


def _check_names(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for name in outputs:
        if name in inputs:
            raise ExportError(f"an input and an output are both called '{name}'; rename one of them")


def _placeholder(kind: str, position: int) -> str:
    """A name that no value has: the exporter gives names without looking whether another value has them."""
    return f"compress.{kind}.{position}"


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call values of a graph as `names` says; values that happen to be called so already get another name."""
    made = set(_made_names(graph))
    taken = made | set(names.values())
    names = dict(names)
    for name in sorted(made & set(names.values())):
        other = next(found for i in itertools.count() if (found := f"{name}_{i}") not in taken)
        taken.add(other)
        names[name] = other
    _apply_names(graph, names)


def _apply_names(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _apply_names(attribute.g, names)


def _made_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the constants and of what nodes compute, at every depth."""
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _made_names(attribute.g)


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
    """The exporter talks to stdout and stderr, to loggers and through warnings; none of it is for the user."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("torch", "torch.onnx")}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
