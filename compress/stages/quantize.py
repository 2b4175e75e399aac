"""`quantize`: post-training int8 with ranges from training samples; the ONNX file is what gets measured from here on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray
from pydantic import JsonValue

from compress.checkpoint import Checkpoint, Draft
from compress.config import QuantizeConfig
from compress.errors import StageError
from compress.manifest import MODEL_ONNX
from compress.onnx_io.convert import serialized
from compress.onnx_io.float_graph import float_graph
from compress.onnx_io.quantize import (
    Ranges,
    activation_scales,
    beyond_int8,
    collect_ranges,
    matching_nodes,
    nodes_at,
    quantize,
    resolved_target,
)
from compress.stages.base import Context, described, warn_of_idle_patterns


def run(parent: Checkpoint, config: QuantizeConfig, context: Context) -> Draft:
    """Convert to ONNX, collect ranges chunk by chunk, quantize.

    Raises:
        StageError: where no operator of the model can be quantized; where what it answers is not finite.
        ExportError: where the model cannot be converted.
    """
    model = parent.build(context.trusted)
    target = resolved_target(config.target)
    graph = float_graph(parent, model, context.data.inputs)
    chosen = matching_nodes(graph, config.keep_float)
    warn_of_idle_patterns("quantize.keep_float", config.keep_float, [node.name for node in graph.graph.node], context)
    measured = collect_ranges(graph, _chunks(config, context))
    beyond = beyond_int8(graph, measured)
    ranges = {name: pair for name, pair in measured.items() if name not in beyond}
    forced = nodes_at(graph, beyond)
    keep_float = [node.name for node in graph.graph.node if node.name in forced or node.name in chosen]
    if unasked := {name: tensor for name, tensor in forced.items() if name not in chosen}:
        context.note(_why_float(unasked, beyond))
    quantized = quantize(graph, ranges, target, keep_float)
    scales = activation_scales(quantized)
    if not scales:
        why = f"; {_why_float(forced, beyond)}" if forced else ""
        raise StageError(f"quantize: ONNX Runtime can quantize no operator of this model{why}")
    context.note(f"for {target.name}: {target.activations} activations, int8 weights; {len(scales)} tensors quantized")
    record: dict[str, JsonValue] = {
        "version": 1,
        "target": target.name,
        "activations": target.activations,
        "weights": "int8, per channel, symmetric",
        "reduce_range": target.reduce_range,
        "calibration": config.calibration.model_dump(mode="json"),
        "keep_float": list(keep_float),
        "ranges": {name: [low, high] for name, (low, high) in ranges.items()},
        "scales": {name: dict(scale) for name, scale in scales.items()},
    }
    return Draft(
        parent.arch, parent.edits, model, form="int8", quantization=record, files={MODEL_ONNX: serialized(quantized)}
    )


def _why_float(nodes: Mapping[str, str], ranges: Ranges) -> str:
    """Which nodes stay in float for the sake of which tensors."""
    reasons = {node: "{} is {:.3g} to {:.3g}".format(tensor, *ranges[tensor]) for node, tensor in nodes.items()}
    return f"{len(nodes)} nodes stay in float, int8 would lose what they compute: {described(reasons)}"


def _chunks(config: QuantizeConfig, context: Context) -> Iterator[tuple[NDArray[Any], ...]]:
    """Calibration inputs from the training split, stratified by class, never augmented."""
    train = context.data.train
    samples = min(config.calibration.samples, len(train))
    if samples < config.calibration.samples:
        context.warn(f"calibration uses all {samples} training samples; {config.calibration.samples} were asked for")
    chosen = context.samples(samples, context.seed)
    done = 0
    for batch in chosen.batches(config.calibration.chunk):
        yield batch.arrays()
        done += len(batch.labels)
        context.progress.work("calibration", done, samples)
