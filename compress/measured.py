"""What is measured of a model: accuracy, size, latency, time per node. Plain data, no torch.

Percentages run from 0 to 100, sizes are bytes, times are seconds or, where the name says so, milliseconds.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
"""What an ONNX file computes in: int8 where it quantizes, else the type of most of its weights."""

METRICS = "metrics.json"
"""File beside a checkpoint that holds its `Measurement`."""


class Record(BaseModel):
    """Base of all results: closed and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Accuracy(Record):
    """Top-1 accuracy on one split, with its 95 % Wilson interval."""

    correct: int
    n: int
    percent: float
    low: float
    high: float


class SplitAccuracy(Record):
    """Accuracy on both held-out splits. Decisions read validation; test is only ever reported."""

    validation: Accuracy
    test: Accuracy


class ClassScore(Record):
    """How one class is answered, percent."""

    precision: float
    """Right answers of all answers that name the class; 0 where none does."""
    recall: float
    """Right answers of all samples of the class."""
    f1: float
    """Harmonic mean of the two."""
    n: int
    """Samples of the class."""


class Quality(Record):
    """What the answers on one split are worth beyond their top-1 accuracy."""

    top5: Accuracy | None
    """Share of samples whose class is among the five most likely; None with five classes or fewer."""
    precision: float
    """Mean over the classes that have samples or are answered (macro), percent; so are the next two."""
    recall: float
    f1: float
    classes: tuple[ClassScore, ...]
    """In the order of the data's classes."""
    confusion: tuple[tuple[int, int, int], ...] | None
    """Class, answer, samples: the cells that are not zero, by class and answer; None with more than 100 classes."""
    calibration_error: float
    """Expected calibration error, percentage points: 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    samples_per_second: float | None
    """Of the evaluation: reading the data included. None where it was taken at another time."""


class SplitQuality(Record):
    """Quality on both held-out splits."""

    validation: Quality
    test: Quality


class Layer(Record):
    """One node of an ONNX graph, with the constants that it alone, or it first, reads."""

    name: str
    operator: str
    parameters: int
    size_bytes: int
    """Of its constants in the file."""
    macs: int | None
    """None where its shapes cannot be inferred."""
    output: tuple[int, ...] | None
    """Shape of its first output at batch size 1; None where it cannot be inferred."""


class Size(Record):
    """What an ONNX file holds and needs."""

    size_bytes: int
    gzip_bytes: int
    """Compressed by gzip at its default level 6: what a download takes."""
    weight_bytes: int
    """Of the constants; what is left is the graph."""
    parameters: int
    """Elements of the weights and biases, scales and zero points aside."""
    nonzero_parameters: int
    macs: int | None
    """Of one sample's forward pass: convolutions and matrix products. None where the shapes of one cannot be inferred."""
    activation_peak_bytes: int | None
    """Most bytes of activations alive at once at batch size 1, nodes in the file's order, a quantized pair of nodes as its
    kernel keeps it (int8); None where shapes cannot be inferred."""
    layers: tuple[Layer, ...]
    """Nodes that hold parameters or compute products, in the order of the graph."""


class Ratio(Record):
    """How many times faster than another variant.

    Per round the other's median over this one's, and of these the median with its 95 % interval (order statistics).
    """

    against: str
    value: float
    low: float
    high: float


class Latency(Record):
    """Time of one call: the median of the rounds' medians with its 95 % interval (order statistics); tails of all calls."""

    device: str
    """'cpu' or 'cuda'."""
    backend: str
    """'onnxruntime', 'torch', 'torch-compile', 'openvino' or 'tensorrt'."""
    provider: str
    """What of the backend ran the model, such as CPUExecutionProvider."""
    precision: str
    """What it computed in: 'fp32', 'int8', 'fp16' or 'bf16'."""
    batch_size: int
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    samples_per_second: float
    """Batch size over the median."""
    cold_start_ms: float
    """Loading the model and its first answer, once, in a fresh process whose libraries are imported: a single sample."""
    peak_memory_bytes: int | None
    """Largest resident memory of that process, libraries included; None where the system does not tell."""
    ratio: Ratio | None = None
    """Against the reference in the same setting; None for the reference itself."""


class Repeat(Record):
    """The reference measured against itself in a second process (A/A): what the machine's noise makes of equal things."""

    name: str
    device: str
    backend: str
    precision: str
    batch_size: int
    threads: int
    ratio: Ratio
    is_noisy: bool
    """Whether differences as small as 5 % cannot be told here."""


class NotMeasured(Record):
    """A setting that was asked for and could not be measured, and why."""

    name: str
    device: str
    backend: str
    precision: str
    batch_size: int
    threads: int
    reason: str


class OperatorTime(Record):
    """One node of the graph as ONNX Runtime ran it."""

    name: str
    operator: str
    """Of the optimised graph, such as QLinearConv."""
    kind: Literal["int8", "float", "convert"]
    """In what it computes; 'convert' quantizes, dequantizes or reorders."""
    milliseconds: float
    """Mean of the middle half of the calls: the profile's clock ticks in microseconds."""


class Profile(Record):
    """Time per node, from ONNX Runtime's profile.

    Profiling itself costs time, and medians do not add up: the nodes need not sum to the call, nor the call be the latency.
    """

    provider: str
    batch_size: int
    threads: int
    calls: int
    call_ms: float
    """Median of a whole profiled call."""
    nodes: tuple[OperatorTime, ...]
    """In the order in which they ran."""


class Int8Effect(Record):
    """What computing in int8 changes of the answers of the float graph, on the same samples."""

    changed: int
    """Samples that are answered otherwise."""
    only_float_correct: int
    """Samples lost: only the float graph answers them right."""
    only_int8_correct: int
    """Samples won."""
    error_percent: float
    """Norm of the change of all logits over the norm of the float graph's, each sample's mean taken off; percent."""


class LayerSensitivity(Int8Effect):
    """The same where one node alone computes in int8."""

    name: str
    """As in the file, and as `quantize.keep_float` takes it."""
    operator: str


class Sensitivity(Record):
    """What each quantized layer costs on its own: it alone in int8, all others in float."""

    split: Literal["validation"]
    n: int
    """Samples that were answered, stratified by class; 0 where nothing could be measured."""
    together: Int8Effect | None
    """Of the int8 file on the same samples; None where nothing could be measured."""
    layers: tuple[LayerSensitivity, ...]
    """Quantized nodes that hold weights or compute products, in the order of the graph."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""


class SilencedChannels(Record):
    """Accuracy with some channels of one group silenced, all other groups whole."""

    ratio: float
    """Fraction of its channels that was asked for, above 0 and below 1."""
    silenced: int
    """Channels: that fraction of them, rounded; those of the lowest scores."""
    percent: float


class GroupSensitivity(Record):
    """What the channels of one group are worth, found before the cut; of several cuts, before the last one."""

    name: str
    """Of the layer that makes them."""
    channels: int
    removed: int
    """How many of them that cut then removed."""
    steps: tuple[SilencedChannels, ...]
    """In the order of their ratios."""


class PruningSensitivity(Record):
    """What every group of channels costs on its own, on samples of validation."""

    n: int
    """Samples."""
    percent: float
    """Accuracy on them with all channels."""
    groups: tuple[GroupSensitivity, ...]


class Measurement(Record):
    """What bench measured of one checkpoint; kept beside it as `metrics.json`."""

    key: dict[str, JsonValue]
    """All that could change it."""
    precision: Precision
    accuracy: SplitAccuracy
    quality: SplitQuality
    answers: dict[str, str]
    """By split, the most likely class of each sample, in order: little-endian uint16, zlib, base64."""
    confidences: dict[str, str]
    """By split, the probability of that class: little-endian float16, zlib, base64."""
    parameters: int
    macs: int
    model: str
    """The ONNX file, in the checkpoint's folder, whose size and latency count."""
    size: Size
    sha256: str
    sensitivity: Sensitivity | None = None
    """Of a quantized checkpoint, where it was asked for."""


class PairedDifference(Record):
    """Accuracy of one model minus the reference's on the same samples, points, with its 95 % paired interval."""

    points: float
    low: float
    high: float
    n: int
    only_reference_correct: int
    only_artifact_correct: int
    p_value: float
    """Exact McNemar test: how likely a split at least as uneven were, would neither model be better."""
    agreement: float
    """Percent of the samples on which both give the same answer, right or wrong."""


def by_threads(threads: int, available: int) -> tuple[bool, int]:
    """What sorts numbers of threads, the one to show first: most threads, but those that wait for a core last, fewest first."""
    crowded = threads > available
    return crowded, threads if crowded else -threads
