"""What each quantized layer costs on its own: in int8 while all others stay in float, against the float graph.

The int8 file depends on nothing but the float weights and its record (`quantization.json`), so a file in which one layer
alone is quantized, with the same weights, scales and kernels, is made by the same function with all other nodes kept in
float.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from compress.checkpoint import Checkpoint
from compress.config.pipeline import SensitivityConfig
from compress.data.base import DecisionData, Split
from compress.data.splits import stratified_sample
from compress.errors import CompressError, StageError, first_line
from compress.events import Progress
from compress.manifest import MODEL_ONNX, QUANTIZATION
from compress.measured import Int8Effect, Layer, LayerSensitivity, Sensitivity
from compress.methods.sensitivity import relative_error
from compress.onnx_io.convert import serialized
from compress.onnx_io.float_graph import float_graph
from compress.onnx_io.quantize import TARGETS, Ranges, Target, activation_scales, quantizable_operators, quantize
from compress.onnx_io.session import Feed, infer, open_session

_FUSED = {"Relu", "Clip"}
"""Activations that an int8 kernel computes with the layer before them."""


@dataclass(frozen=True)
class Recipe:
    """What an int8 file is made of."""

    graph: onnx.ModelProto
    """In fp32; every node has a name."""
    ranges: Ranges
    target: Target
    keep_float: Collection[str]
    """Names of the nodes that stay in float."""

    def made(self) -> onnx.ModelProto:
        """The int8 file."""
        return quantize(self.graph, self.ranges, self.target, list(self.keep_float))

    def alone(self, name: str) -> onnx.ModelProto:
        """The same with one node in int8 only, and the activation that its kernel computes with it."""
        chosen = {name, *self._fused_with(name)}
        others = [node.name for node in self.graph.graph.node if node.name not in chosen]
        return quantize(self.graph, self.ranges, self.target, others)

    def _fused_with(self, name: str) -> list[str]:
        """A Relu or Clip that alone reads what the node computes, unless it stays in float."""
        graph = self.graph.graph
        (made,) = (node.output[0] for node in graph.node if node.name == name)
        readers = [node for node in graph.node if made in node.input]
        is_sole = len(readers) == 1 and made not in {value.name for value in graph.output}
        return [
            node.name
            for node in readers
            if is_sole and node.op_type in _FUSED and node.input[0] == made and node.name not in self.keep_float
        ]

    def layers(self, file: onnx.ModelProto, layers: Sequence[Layer]) -> list[onnx.NodeProto]:
        """Of these layers of the int8 file the nodes that it quantizes, in the order of the graph."""
        names, kinds = {layer.name for layer in layers} - {*self.keep_float}, set(quantizable_operators())
        dequantized = {node.output[0] for node in file.graph.node if node.op_type == "DequantizeLinear"}
        quantized = {node.name for node in file.graph.node if not dequantized.isdisjoint(node.input)}
        return [node for node in self.graph.graph.node if node.op_type in kinds and node.name in names & quantized]


@dataclass(frozen=True)
class Sample:
    """Samples that every variant answers, held in memory: reading them anew for each would take longer than the answers."""

    batches: tuple[Feed, ...]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, split: Split, n: int, seed: int, batch_size: int) -> Sample:
        """`n` samples of a split, stratified by class; all where there are fewer."""
        chosen = split.take(stratified_sample(split.labels, n, seed))
        return cls(tuple(batch.arrays() for batch in chosen.batches(batch_size)), chosen.labels.numpy())


class Asked(SensitivityConfig):
    """On what each layer is tried, as it stands in the key of the measurement."""

    seed: int
    """Decides which samples."""


def measure_sensitivity(
    checkpoint: Checkpoint,
    model: nn.Module,
    layers: Sequence[Layer],
    data: DecisionData,
    asked: Asked,
    *,
    threads: int,
    batch_size: int,
    progress: Progress,
) -> Sensitivity:
    """Try every quantized layer of a checkpoint alone, on validation: decisions may be read off it.

    What cannot be measured is a note and never an error: everything else about the checkpoint is known by now.

    Args:
        checkpoint: of the form 'int8'.
        model: what it builds.
        layers: of its file, those that hold weights or compute products.
        data: of which only validation is read.
        asked: how many samples, and which.
        threads: of ONNX Runtime.
        batch_size: samples per call.
        progress: told of every layer.
    """
    try:
        recipe = recipe_of(checkpoint, float_graph(checkpoint, model, data.inputs))
        sample = Sample.of(data.validation, asked.samples, asked.seed, batch_size)
        return sensitivity(recipe, layers, sample, threads, progress)
    except CompressError as error:
        return Sensitivity(split="validation", n=0, together=None, layers=(), notes=(f"no sensitivities: {error}",))


def recipe_of(checkpoint: Checkpoint, graph: onnx.ModelProto) -> Recipe:
    """What a checkpoint's int8 file is made of, checked by making it again.

    Raises:
        StageError: where the checkpoint's file is another one.
    """
    file, record = checkpoint.path / MODEL_ONNX, json.loads((checkpoint.path / QUANTIZATION).read_bytes())
    ranges = {name: (low, high) for name, (low, high) in record["ranges"].items()}
    recipe = Recipe(graph, ranges, TARGETS[record["target"]], record["keep_float"])
    if serialized(recipe.made()) != file.read_bytes():
        raise StageError(f"{MODEL_ONNX} is not what {QUANTIZATION} and the float weights make here")
    return recipe


def sensitivity(
    recipe: Recipe, layers: Sequence[Layer], sample: Sample, threads: int, progress: Progress
) -> Sensitivity:
    """Answers of the float graph, of the int8 file, and of one variant per layer, on the same samples.

    Args:
        recipe: of the int8 file.
        layers: of the file, those that hold weights or compute products.
        sample: what all of them answer.
        threads: of ONNX Runtime.
        progress: told of every layer.

    Raises:
        StageError: where the answers of the float graph or of the int8 file are not finite.
        ExportError: where ONNX Runtime does not take one of the two.
    """
    file = recipe.made()
    nodes = recipe.layers(file, layers)
    expected = _logits(recipe.graph, sample, threads)
    together = _effect(_logits(file, sample, threads), expected, sample.labels)
    found: list[LayerSensitivity] = []
    notes: list[str] = []
    for done, node in enumerate(nodes, 1):
        try:
            effect = _effect(_alone(recipe, node.name, sample, threads), expected, sample.labels)
        except StageError as error:
            notes.append(f"sensitivity of '{node.name}' is not known: {error}")
        else:
            found.append(LayerSensitivity(name=node.name, operator=node.op_type, **effect.model_dump()))
        progress.work("int8 layer by layer", done, len(nodes))
    return Sensitivity(
        split="validation", n=len(sample.labels), together=together, layers=tuple(found), notes=tuple(notes)
    )


def _alone(recipe: Recipe, name: str, sample: Sample, threads: int) -> NDArray[np.float32]:
    """Logits (n, classes) with one node in int8.

    Raises:
        StageError: where there are none, whatever the reason.
    """
    try:
        variant = recipe.alone(name)
        if not activation_scales(variant):
            raise StageError("it is quantized only where its neighbours are")
        return _logits(variant, sample, threads)
    except Exception as error:  # the quantizer's and ONNX Runtime's have no common base but this
        raise StageError(first_line(error)) from error


def _logits(graph: onnx.ModelProto, sample: Sample, threads: int) -> NDArray[np.float32]:
    """Of shape (n, classes).

    Raises:
        StageError: where they are not finite.
    """
    session = open_session(serialized(graph), threads)
    logits = np.concatenate([infer(session, inputs) for inputs in sample.batches])
    if not np.isfinite(logits).all():
        raise StageError("the answers are not finite")
    return logits


def _effect(found: NDArray[np.float32], expected: NDArray[np.float32], labels: NDArray[np.int64]) -> Int8Effect:
    """What tells logits (n, classes) from those of the float graph."""
    error = relative_error(found, expected)
    if not np.isfinite(error):
        raise StageError("the float graph answers the same for all classes")
    answers, before = found.argmax(1), expected.argmax(1)
    is_right, was_right = answers == labels, before == labels
    return Int8Effect(
        changed=int((answers != before).sum()),
        only_float_correct=int((was_right & ~is_right).sum()),
        only_int8_correct=int((is_right & ~was_right).sum()),
        error_percent=100.0 * error,
    )
