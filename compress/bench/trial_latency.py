"""How long single layers take in ONNX Runtime, to decide which of several forms of a layer is faster here.

All layers go through one export (and one quantization), then each becomes a file of its own, and all files are timed against
each other in alternating rounds in one process. What is told is a call's median minus that of an almost empty graph: the
price of a call itself, some 10 microseconds, is about what a small layer takes and none of its own.

What the time of a layer alone can tell is which of two layers for the same place is the faster one, roughly. What it cannot:

- What conversions cost at its borders. ONNX Runtime reorders what a float convolution reads and writes, and quantizes and
  dequantizes around an int8 layer; inside a network neighbours share that or do without it. Both forms of a layer pay it here,
  which makes their ratio look closer to 1 than it is.
- What is fused with it: an activation behind it is computed along inside a network, and is not here.
- What is in the caches: here weights and inputs are those of the call before, in a network other layers came in between.
- Batches and threads: it is one call of one sample with one thread.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, utils
from torch import nn

from compress.bench.single_answer import answer_of
from compress.bench.trial_worker import ROUNDS, SECONDS
from compress.data.base import Input
from compress.onnx_io.convert import IR_VERSION, OPSET, serialized, to_onnx
from compress.onnx_io.quantize import collect_ranges, quantize, resolved_target

PATIENCE_SECONDS = 300.0
"""How long starting and loading may take beyond the time that was asked for."""
SLOWEST_CALL_SECONDS = 1.0
"""What is allowed for a call, of which each round makes a few whatever time was asked for."""
_CALLS = 8
_RANGE_BATCHES = 2


def layer_times(
    layers: Mapping[str, tuple[nn.Module, tuple[int, ...]]],
    *,
    int8: bool = False,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> dict[str, tuple[float, ...]]:
    """Median time of a call in each round, in milliseconds above that of an almost empty graph, 0 or more; one thread.

    Args:
        layers: by any name, a layer or some in a row, from one float tensor to one, and the shape of that tensor, the batch
            first. Weights do not count, shapes do. The more there are, the longer it takes, and the more the machine drifts.
        int8: time what quantization makes of them for this machine (ranges of random inputs), not the float graphs.
        rounds: in which all of them take turns.
        seconds: of calls of each in each round.

    Returns:
        By name.

    Raises:
        ExportError: where torch cannot export one of them.
        CompressError: where ONNX Runtime cannot run them, or its process dies or stays silent.
    """
    if not layers:
        return {}
    modules, shapes = zip(*layers.values(), strict=True)
    protos = [_empty(), *_graphs(modules, shapes, int8=int8)]
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        paths = [Path(folder) / f"{position}.onnx" for position in range(len(protos))]
        for path, proto in zip(paths, protos, strict=True):
            path.write_bytes(serialized(proto))
        batches = [1, *(shape[0] for shape in shapes)]
        files = [{"path": str(path), "batch_size": n} for path, n in zip(paths, batches, strict=True)]
        nothing, *found = _ask({"files": files, "rounds": rounds, "seconds": seconds})
    price = statistics.median(nothing)
    return {name: tuple(max(0.0, time - price) for time in times) for name, times in zip(layers, found, strict=True)}


class _Beside(nn.Module):
    """Modules that have nothing to do with each other, each with an input of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.beside = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(module(given) for module, given in zip(self.beside, inputs, strict=True))


def _graphs(modules: Sequence[nn.Module], shapes: Sequence[tuple[int, ...]], *, int8: bool) -> list[onnx.ModelProto]:
    """A graph for each; one export for all, because most of an export's time is spent whatever it exports."""
    inputs = [Input(f"given_{position}", shape[1:]) for position, shape in enumerate(shapes)]
    proto = to_onnx(_Beside(modules), inputs)
    if int8:
        random = np.random.default_rng(0)
        chunks = (
            [random.standard_normal((1, *shape[1:]), np.float32) for shape in shapes] for _ in range(_RANGE_BATCHES)
        )
        proto = quantize(proto, collect_ranges(proto, chunks), resolved_target("auto"), [])
    extractor = utils.Extractor(proto)
    outputs = [output.name for output in proto.graph.output]
    return [extractor.extract_model([given.name], [output]) for given, output in zip(inputs, outputs, strict=True)]


def _empty() -> onnx.ModelProto:
    """A graph that does next to nothing: what a call of it takes, every call takes."""
    given, output = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("given", "output")
    )
    graph = helper.make_graph([helper.make_node("Relu", ["given"], ["output"])], "empty", [given], [output])
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])


def _ask(request: dict[str, Any]) -> list[list[float]]:
    """What the worker answers; no process is left."""
    asked = request["rounds"] * len(request["files"])
    patience = PATIENCE_SECONDS + asked * (request["seconds"] + _CALLS * SLOWEST_CALL_SECONDS)
    times: list[list[float]] = answer_of("trial_worker", request, patience, "times of layers")["milliseconds"]
    return times
