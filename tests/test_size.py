"""Sizes of ONNX files against counts by hand and by torch, on images that are not square."""

import gzip
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import FLOAT, MICROSOFT, model_of, node, tensor, write
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Tied, network, randomise
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from torch import nn
from torchvision.models import VisionTransformer

from compress.bench.size import measure_size, precision_of
from compress.config.data import ONLY_INPUT
from compress.data.base import Input
from compress.errors import CompressError
from compress.models.cost import macs, parameters
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import TARGETS, collect_ranges, quantize

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(path, module, shape):
    path.write_bytes(serialized(to_onnx(module, (Input(ONLY_INPUT, tuple(shape)),))))
    return path


# Multiply-accumulates

CASES = {
    # node, shape of input x, shapes of other inputs (lower case: activations; upper case: constants), MACs, output
    "conv": (
        node("Conv", "xW", strides=[1, 2], pads=[1, 2, 1, 2]),
        (1, 3, 6, 10),
        {"W": (8, 3, 3, 5)},
        8 * 3 * 15 * 6 * 5,
        (1, 8, 6, 5),
    ),
    "grouped conv": (
        node("Conv", "xW", group=4, pads=[1] * 4),
        (1, 8, 5, 7),
        {"W": (12, 2, 3, 3)},
        12 * 2 * 9 * 35,
        (1, 12, 5, 7),
    ),
    "fused conv": (
        node("FusedConv", "xWB", domain=MICROSOFT, activation="Relu"),
        (1, 3, 6, 10),
        {"W": (8, 3, 3, 3), "B": (8,)},
        8 * 27 * 4 * 8,
        (1, 8, 4, 8),
    ),
    "transposed": (
        node("ConvTranspose", "xW", strides=[2, 2], group=2),
        (1, 4, 5, 7),
        {"W": (4, 3, 2, 2)},
        4 * 3 * 4 * 35,
        (1, 6, 10, 14),
    ),
    "gemm": (node("Gemm", "xWB", transB=1), (1, 11), {"W": (4, 11), "B": (4,)}, 44, (1, 4)),
    "gemm of columns": (node("Gemm", "xW", transA=1), (1, 5), {"W": (1, 4)}, 20, (5, 4)),
    "tokens": (node("MatMul", "xW"), (1, 6, 11), {"W": (11, 4)}, 6 * 44, (1, 6, 4)),
    "attention scores": (node("MatMul", "xk"), (1, 2, 6, 8), {"k": (1, 2, 8, 5)}, 2 * 6 * 8 * 5, (1, 2, 6, 5)),
    "fused scores": (
        node("FusedMatMul", "xk", domain=MICROSOFT, transB=1),
        (1, 2, 6, 8),
        {"k": (1, 2, 5, 8)},
        2 * 6 * 8 * 5,
        (1, 2, 6, 5),
    ),
    "einsum": (
        node("Einsum", "xW", equation="b t h d, h d e -> b t e"),
        (1, 6, 2, 4),
        {"W": (2, 4, 5)},
        6 * 8 * 5,
        (1, 6, 5),
    ),
    "einsum of dots": (node("Einsum", "xk", equation="...ij,...jk"), (1, 2, 6, 8), {"k": (1, 2, 8, 5)}, 480, (1, 2, 6, 5)),
    "einsum of one": (node("Einsum", "x", equation="bij->bji"), (1, 2, 3), {}, 0, (1, 3, 2)),
    "lstm": (
        node("LSTM", "xWR", hidden_size=3),
        (4, 1, 5),
        {"W": (1, 12, 5), "R": (1, 12, 3)},
        4 * 12 * 8,
        (4, 1, 1, 3),
    ),
    "attention": (
        node("MultiHeadAttention", "xkv", domain=MICROSOFT, num_heads=2),
        (1, 6, 8),
        {"k": (1, 5, 8), "v": (1, 5, 8)},
        2 * 6 * 5 * 8,
        (1, 6, 8),
    ),
    "attention with its projection": (
        node("Attention", "xWB", domain=MICROSOFT, num_heads=2),
        (1, 6, 10),
        {"W": (10, 24), "B": (24,)},
        6 * 10 * 24 + 2 * 6 * 6 * 8,
        (1, 6, 8),
    ),
    "packed": (
        node("MatMulNBits", "xPS", domain=MICROSOFT, K=32, N=7, bits=4, block_size=16),
        (1, 6, 32),
        {"P": (7, 2, 8), "S": (14,)},
        6 * 32 * 7,
        (1, 6, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products_cost_what_hands_count(tmp_path, name):
    made, shape, others, expected, output = CASES[name]
    inputs = [("x", shape), *((other, size) for other, size in others.items() if other.islower())]
    kinds = {"P": np.uint8}
    constants = [tensor(each, size, kinds.get(each, np.float32)) for each, size in others.items() if each.isupper()]
    size = measure_size(write(tmp_path / "a.onnx", [made], inputs, [("y", None)], constants))
    (layer,) = size.layers
    assert (layer.macs, layer.output, layer.operator) == (expected, output, made.op_type)
    assert size.macs == expected
    stored = {"P": 32 * 7, "S": 0}
    counted = sum(stored.get(each.name, math.prod(each.dims)) for each in constants)
    assert size.parameters == layer.parameters == size.nonzero_parameters == counted


@st.composite
def layers(draw):
    """A layer of torch and the shape of one sample, whatever fits."""
    groups, height, width = draw(st.integers(1, 3)), draw(st.integers(5, 9)), draw(st.integers(5, 9))
    before, after = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    options = {"stride": stride, "padding": draw(st.integers(0, 1)), "groups": groups, "bias": draw(st.booleans())}
    kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d, nn.Linear]))
    if kind is nn.Linear:
        return nn.Linear(width, after, bias=options["bias"]), (height, width)
    return kind(before, after, kernel, **options), (before, height, width)


def as_node(layer, rank):
    """The node that a layer is, and its constants."""
    constants = [(name, parameter.detach().numpy()) for name, parameter in layer.named_parameters()]
    names = ["x", *(name for name, _ in constants)]
    if isinstance(layer, nn.Linear):
        constants[0] = ("weight", constants[0][1].T)
        made = [node("MatMul", names[:2], ["y"] if len(names) == 2 else ["z"])]
        made += [node("Add", ["z", "bias"])] if len(names) == 3 else []
    else:
        pads = [*layer.padding, *layer.padding]
        operator = "ConvTranspose" if isinstance(layer, nn.ConvTranspose2d) else "Conv"
        made = [node(operator, names, strides=layer.stride, pads=pads, group=layer.groups)]
    return made, [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants]


@settings(max_examples=60)
@given(layers())
def test_layers_cost_what_torch_counts(tmp_path_factory, drawn):
    layer, shape = drawn
    nodes, constants = as_node(layer, len(shape))
    path = tmp_path_factory.mktemp("layer") / "a.onnx"
    size = measure_size(write(path, nodes, [("x", ("batch", *shape))], [("y", None)], constants))
    assert size.macs == macs(nn.Sequential(layer), (torch.zeros(1, *shape),))
    assert size.parameters == parameters(layer)
    with torch.no_grad():
        last = layer(torch.zeros(1, *shape))
    assert size.layers[-1].output == tuple(last.shape)


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "cifar_resnet20",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenet_v2", "vgg11_bn")),
    ],
)
def test_networks_cost_what_torch_counts(tmp_path, name):
    module, example = network(name)
    path = converted(tmp_path / "a.onnx", module, example.shape[1:])
    size = measure_size(path)
    assert size.macs == macs(module, (example,))
    with_weights = [each.weight for each in module.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
    # Each has a bias of its own or that of the normalisation that the exporter folds into it.
    assert size.parameters == sum(weight.numel() + len(weight) for weight in with_weights) <= parameters(module)
    assert size.nonzero_parameters == size.parameters
    assert size.size_bytes == path.stat().st_size > size.weight_bytes >= 4 * size.parameters
    assert size.parameters == sum(layer.parameters for layer in size.layers)
    assert all(layer.output is not None and layer.output[0] == 1 for layer in size.layers)
    assert size.activation_peak_bytes > 2 * 4 * math.prod(example.shape[1:])
    assert precision_of(path) == "fp32"


def test_attention_of_torch_costs_the_same(tmp_path):
    with torch.random.fork_rng(devices=[]):
        sizes = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
        module = randomise(VisionTransformer(**sizes, num_classes=3)).eval()
    size = measure_size(converted(tmp_path / "a.onnx", module, (3, 16, 16)))
    assert size.macs == macs(module, (torch.zeros(1, 3, 16, 16),)) > 0
    assert size.parameters == parameters(module)


def test_tied_weights_count_once_and_cost_twice(tmp_path):
    with torch.random.fork_rng(devices=[]):
        module = randomise(Tied())
    size = measure_size(converted(tmp_path / "a.onnx", module, (3, 5, 7)))
    assert size.macs == macs(module, (torch.zeros(1, 3, 5, 7),))
    assert size.parameters == parameters(module) + module.noise.numel()  # a constant map, as far as the file tells
    with_weights = [layer.parameters for layer in size.layers if layer.operator == "Conv"]
    assert with_weights == [6 * 27 + 6, 6 * 54, 6]


# Quantized files


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    with torch.random.fork_rng(devices=[]):
        module = randomise(Chain())
    with torch.no_grad():
        module.one.weight[:4] = 0
    return to_onnx(module, (Input(ONLY_INPUT, (3, 6, 10)),))


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).standard_normal((8, 3, 6, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def small_int8():
    """A quantized file of little more than nodes."""
    proto = model_of(
        [node("Conv", "xw", "c", name="conv"), node("Relu", "c", "r"), node("Flatten", "r", "f"), node("Gemm", "fv")],
        [("x", ("batch", 1, 3, 4))],
        [("y", ("batch", 2))],
        [tensor("w", (2, 1, 2, 2)), tensor("v", (12, 2))],
    )
    ranges = collect_ranges(proto, [(np.random.default_rng(0).standard_normal((4, 1, 3, 4)).astype(np.float32),)])
    return serialized(quantize(proto, ranges, TARGETS["x86-vnni"], []))


@pytest.fixture
def float_file(tmp_path, chain):
    path = tmp_path / "float.onnx"
    path.write_bytes(serialized(chain))
    return path


class Samples(CalibrationDataReader):
    def __init__(self, samples):
        self._left = iter([{ONLY_INPUT: samples}])

    def get_next(self):
        return next(self._left, None)


def pairs(path, float_file, chain, samples):
    path.write_bytes(serialized(quantize(chain, collect_ranges(chain, [(samples,)]), TARGETS["x86-vnni"], [])))


def operators(path, float_file, chain, samples):
    quantize_static(float_file, path, Samples(samples), quant_format=QuantFormat.QOperator, per_channel=True)


def unsigned_weights(path, float_file, chain, samples):
    from onnxruntime.quantization import QuantType

    quantize_static(float_file, path, Samples(samples), weight_type=QuantType.QUInt8, activation_type=QuantType.QUInt8)


def dynamic(path, float_file, chain, samples):
    quantize_dynamic(float_file, path)


@pytest.mark.parametrize("make", [pairs, operators, unsigned_weights, dynamic])
def test_a_quantized_file_has_the_parameters_and_products_of_the_float_one(tmp_path, float_file, chain, samples, make):
    path = tmp_path / "int8.onnx"
    make(path, float_file, chain, samples)
    before, after = measure_size(float_file), measure_size(path)
    assert after.parameters == before.parameters == 16 * 27 + 16 + 16 * 144 + 16 + 16 * 5 + 5
    assert after.macs == before.macs
    assert before.nonzero_parameters == before.parameters - 4 * 27
    # Rounding makes more zeros, never fewer.
    assert 0.9 * before.nonzero_parameters < after.nonzero_parameters <= before.nonzero_parameters
    assert [layer.macs for layer in after.layers if layer.macs] == [layer.macs for layer in before.layers]
    assert [layer.output for layer in after.layers if layer.macs] == [layer.output for layer in before.layers]
    assert after.weight_bytes < 0.4 * before.weight_bytes
    assert after.activation_peak_bytes is not None
    assert (precision_of(float_file), precision_of(path)) == ("fp32", "int8")


def test_pairs_make_no_layers_and_no_activations_of_their_own(tmp_path, float_file, chain, samples):
    path = tmp_path / "int8.onnx"
    pairs(path, float_file, chain, samples)
    before, after = measure_size(float_file), measure_size(path)
    assert [layer.operator for layer in after.layers] == ["Conv", "Conv", "Gemm"]
    assert [layer.parameters for layer in after.layers] == [layer.parameters for layer in before.layers]
    # The second convolution reads and writes 16 × 6 × 10 numbers of one byte; the first writes as many.
    assert before.activation_peak_bytes == 2 * 16 * 60 * 4
    assert after.activation_peak_bytes == 2 * 16 * 60


def optimised(path, level):
    """What ONNX Runtime makes of a file, written by it."""
    made = path.with_name("optimised.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(made)
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_a_file_that_onnx_runtime_optimised_costs_the_same(float_file, level):
    made = optimised(float_file, level)
    before, after = measure_size(float_file), measure_size(made)
    assert (after.macs, after.parameters) == (before.macs, before.parameters)
    assert after.activation_peak_bytes == before.activation_peak_bytes
    assert precision_of(made) == "fp32"


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_fused_int8_kernels_cost_what_their_pairs_did(tmp_path, float_file, chain, samples, level):
    path = tmp_path / "int8.onnx"
    pairs(path, float_file, chain, samples)
    made = optimised(path, level)
    before, after = measure_size(path), measure_size(made)
    assert (after.macs, after.parameters) == (before.macs, before.parameters)
    assert after.nonzero_parameters == before.nonzero_parameters
    assert after.activation_peak_bytes == before.activation_peak_bytes
    assert precision_of(made) == "int8"
    fused = {"QLinearConv", "QGemm"} if level != "ORT_ENABLE_BASIC" else {"Conv", "Gemm"}
    assert {layer.operator for layer in after.layers} == fused


def test_zeros_of_int8_weights_are_those_at_the_zero_point(tmp_path):
    weight = np.array([[3, 3, 0], [7, 1, 7], [5, 5, 5]], np.uint8)
    constants = [
        numpy_helper.from_array(weight, "w"),
        tensor("s", (3,)),
        numpy_helper.from_array(np.array([3, 7, 0], np.uint8), "z"),
    ]
    nodes = [node("DequantizeLinear", "wsz", "d", axis=0), node("MatMul", "xd")]
    size = measure_size(write(tmp_path / "rows.onnx", nodes, [("x", (1, 3))], [("y", None)], constants))
    assert (size.parameters, size.nonzero_parameters) == (9, 1 + 1 + 3)
    (layer,) = size.layers
    assert (layer.operator, layer.size_bytes) == ("MatMul", 9 + 12 + 3)
    nodes[0] = node("DequantizeLinear", "wsz", "d", axis=1)
    size = measure_size(write(tmp_path / "columns.onnx", nodes, [("x", (1, 3))], [("y", None)], constants))
    assert size.nonzero_parameters == 9 - 2  # only [0, 0] and [0, 2] are what their column calls zero


def test_a_quantized_table_has_a_zero_point_behind_its_lookup(tmp_path):
    constants = [tensor("w", (6, 4), np.uint8, 128), tensor("s", ()), tensor("z", (), np.uint8, 128)]
    nodes = [node("Gather", "wx", "g"), node("DequantizeLinear", "gsz")]
    inputs = [("x", ("batch", 3), TensorProto.INT64)]
    size = measure_size(write(tmp_path / "a.onnx", nodes, inputs, [("y", None)], constants))
    assert (size.parameters, size.nonzero_parameters) == (24, 0)
    assert [layer.operator for layer in size.layers] == ["Gather"]
    # Weights that are only stored in int8 are computed with in float.
    assert precision_of(tmp_path / "a.onnx") == "fp32"


# Precision


HALVES = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", FLOAT: "fp32", TensorProto.DOUBLE: "fp32"}


def filled(name, shape, kind):
    """A constant of ones of any type."""
    return helper.make_tensor(name, kind, shape, np.ones(math.prod(shape), np.float32))


@pytest.mark.parametrize("kind", HALVES)
def test_the_precision_is_the_type_of_most_weights(tmp_path, kind):
    def precision(*constants):
        nodes = [node("MatMul", "xw", "t"), node("Add", "tb")]
        return precision_of(write(tmp_path / "a.onnx", nodes, [("x", ("n", 3), kind)], [("y", None, kind)], constants))

    assert precision(filled("w", (3, 5), kind), filled("b", (5,), kind)) == HALVES[kind]
    # Normalisation often stays in float32, and the larger part may.
    assert precision(filled("w", (3, 5), kind), filled("b", (5,), FLOAT)) == HALVES[kind]
    assert precision(filled("w", (3, 5), FLOAT), filled("b", (5,), kind)) == "fp32"
    assert precision(filled("w", (3, 5), kind), filled("b", (15,), FLOAT)) == "fp32"
    # Shapes are no weights, nor are single numbers.
    others = [tensor("shape", (100,), np.int64), *(filled(f"number {i}", (), FLOAT) for i in range(9))]
    assert precision(filled("w", (1, 5), kind), *others) == HALVES[kind]
    assert precision(*others) == "fp32"


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_weights_count_in_the_type_they_are_computed_with_in(tmp_path, kind):
    def precision(*nodes, constants):
        return precision_of(write(tmp_path / "a.onnx", nodes, [("x", ("n", 3), kind)], [("y", None, kind)], constants))

    stored = filled("w", (3, 5), kind)
    assert precision(node("Cast", "w", "c", to=FLOAT), node("MatMul", "xc"), constants=[stored]) == "fp32"
    only_stored = [tensor("w", (3, 5), np.int8), filled("s", (5,), kind), filled("b", (9,), FLOAT)]
    assert precision(node("DequantizeLinear", "ws", "d"), node("MatMul", "xd"), constants=only_stored) == HALVES[kind]


def test_weights_in_nodes_branches_and_functions_tell_the_precision(tmp_path):
    kind = TensorProto.FLOAT16
    inside = node("Constant", "", "w", value=filled("", (3, 5), kind))
    few = filled("few", (4,), FLOAT)

    def precision(*nodes, **options):
        inputs = [("x", ("n", 3), kind), ("yes", (), TensorProto.BOOL)]
        return precision_of(write(tmp_path / "a.onnx", nodes, inputs, [("y", None, kind)], [few], **options))

    assert precision(inside, node("MatMul", "xw")) == "fp16"
    output = helper.make_tensor_value_info("z", kind, None)
    branch = helper.make_graph([node("MatMul", "xw", "z")], "g", [], [output], [filled("w", (3, 5), kind)])
    assert precision(node("If", ["yes"], then_branch=branch, else_branch=branch)) == "fp16"
    body = [inside, node("MatMul", "aw", "r")]
    function = helper.make_function("local", "Dense", ["a"], ["r"], body, [helper.make_opsetid("", 20)])
    assert precision(node("Dense", "x", domain="local"), functions=[function]) == "fp16"


# What counts as a parameter


def test_what_is_no_weight_is_no_parameter(tmp_path):
    constants = [
        tensor("shape", (2,), np.int64, 4),
        tensor("factor", ()),
        tensor("w", (4, 2)),
        tensor("idle", (100,)),
        tensor("low", ()),
        tensor("sizes", (4,), value=2),
        tensor("index", (7,), np.int32, 0),
        tensor("mask", (4,), np.bool_),
        tensor("slope", (1,)),
        *(tensor(name, (4,)) for name in ("scale", "bias", "mean", "var")),
    ]
    nodes = [
        node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], "a"),
        node("Resize", ["a", "", "sizes"], "b"),
        node("Resize", ["b", "", "halves"], "c"),
        node("Reshape", ["c", "shape"], "d"),
        node("Mul", ["d", "factor"], "e"),
        node("Clip", ["e", "low"], "f"),
        node("MatMul", ["f", "w"], "g"),
        node("PRelu", ["g", "slope"], "h"),
        node("Gather", ["h", "index"], "y"),
        node("Where", ["mask", "f", "factor"], "z"),
    ]
    constants.append(tensor("halves", (4,), value=0.5))
    path = write(tmp_path / "a.onnx", nodes, [("x", (4, 4, 1, 1))], [("y", None), ("z", None)], constants)
    size = measure_size(path)
    assert {layer.name: layer.parameters for layer in size.layers} == {"a": 8, "g": 8, "h": 1}
    assert size.parameters == 17
    assert size.weight_bytes == sum(numpy_helper.to_array(each).nbytes for each in constants)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (TensorProto.FLOAT16, 16),
        (TensorProto.BFLOAT16, 16),
        (TensorProto.DOUBLE, 64),
        (TensorProto.FLOAT8E4M3FN, 8),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_weights_of_other_floats_count(tmp_path, kind, bits, raw):
    values = np.array([[0, 1, 2, 0], [1, 0, 0, 4]], np.float32).astype(helper.tensor_dtype_to_np_dtype(kind))
    weight = helper.make_tensor("w", kind, (2, 4), values.tobytes() if raw else values.flatten(), raw=raw)
    nodes = [node("Cast", "w", "c", to=FLOAT), node("MatMul", "xc")]
    size = measure_size(write(tmp_path / "a.onnx", nodes, [("x", (1, 2))], [("y", None)], [weight]))
    assert (size.parameters, size.nonzero_parameters, size.macs) == (8, 4, 8)
    assert size.weight_bytes >= 8 if not raw else size.weight_bytes == 8 * bits // 8


def test_weights_of_four_bits_take_half_a_byte(tmp_path):
    weight = helper.make_tensor("w", TensorProto.INT4, (3, 4), [0, 1, -2, 3] * 3)
    nodes = [node("DequantizeLinear", "ws", "d"), node("MatMul", "xd")]
    path = write(tmp_path / "a.onnx", nodes, [("x", (1, 3))], [("y", None)], [weight, tensor("s", ())])
    path.write_bytes(_as_raw(onnx.load(path)).SerializeToString())
    size = measure_size(path)
    assert (size.parameters, size.nonzero_parameters, size.weight_bytes) == (12, 9, 6 + 4)


def _as_raw(proto):
    """The same, every initializer in raw bytes."""
    made = [numpy_helper.from_array(numpy_helper.to_array(each), each.name) for each in proto.graph.initializer]
    proto.graph.ClearField("initializer")
    proto.graph.initializer.extend(made)
    return proto


def test_constants_in_nodes_and_sparse_ones_count(tmp_path):
    values = numpy_helper.from_array(np.array([5, 6], np.float32), "sparse")
    places = numpy_helper.from_array(np.array([[0, 1], [2, 0]], np.int64), "places")
    nodes = [
        node("Constant", "", "w", value=tensor("", (4, 3))),
        node("Constant", "", "b", value_floats=[0.0, 1.0, 2.0]),
        node("Constant", "", "s", sparse_value=helper.make_sparse_tensor(values, places, [3, 2])),
        node("MatMul", "xw", "m"),
        node("Add", "mb", "a"),
        node("MatMul", "as"),
    ]
    size = measure_size(write(tmp_path / "a.onnx", nodes, [("x", ("batch", 4))], [("y", None)]))
    assert [(layer.operator, layer.parameters) for layer in size.layers] == [("MatMul", 12), ("Add", 3), ("MatMul", 6)]
    assert (size.parameters, size.nonzero_parameters) == (21, 12 + 2 + 2)
    assert size.weight_bytes == 48 + 12 + 8 + 32
    assert size.layers[0].macs == 12


def test_branches_may_use_a_name_twice_and_their_weights_count(tmp_path):
    def branch(name, rows):
        inner = node("MatMul", ["x", "w"], [name], name=name)
        output = helper.make_tensor_value_info(name, FLOAT, None)
        return helper.make_graph([inner], name, [], [output], [tensor("w", (4, rows))])

    choice = node("If", ["yes"], ["z"], then_branch=branch("then", 3), else_branch=branch("else", 5), name="choice")
    nodes = [choice, node("MatMul", ["x", "w"], name="after")]
    inputs = [("x", (1, 4)), ("yes", (), TensorProto.BOOL)]
    path = write(tmp_path / "a.onnx", nodes, inputs, [("z", None), ("y", None)], [tensor("w", (4, 2))])
    size = measure_size(path)
    found = [(layer.name, layer.parameters, layer.macs, layer.output) for layer in size.layers]
    # Which of the two runs the file does not tell, nor what all of it costs.
    assert found == [("else", 20, None, None), ("then", 12, None, None), ("after", 8, 8, (1, 2))]
    assert size.macs is None
    assert size.weight_bytes == 4 * 40
    assert size.activation_peak_bytes is None


def test_functions_are_looked_into_and_what_they_hold_counts_once(tmp_path):
    body = [
        node("Constant", "", "b", value=tensor("", (4,))),
        node("MatMul", "aw", "m"),
        node("Add", "mb", "r"),
    ]
    function = helper.make_function("local", "Dense", ["a", "w"], ["r"], body, [helper.make_opsetid("", 20)])
    nodes = [node("Dense", "xu", "h", domain="local"), node("Dense", "hv", "y", domain="local")]
    constants = [tensor("u", (3, 4)), tensor("v", (4, 4), value=0)]
    path = write(tmp_path / "a.onnx", nodes, [("x", ("n", 3))], [("y", ("n", 4))], constants, functions=[function])
    size = measure_size(path)
    assert (size.macs, size.parameters, size.nonzero_parameters) == (12 + 16, 12 + 16 + 4, 12 + 4)
    assert size.weight_bytes == 4 * (12 + 16 + 4)
    assert size.layers[-1].output == (1, 4)


# Shapes


def test_the_batch_is_one_wherever_its_name_stands(tmp_path):
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", ["s", "zero"], "n"),
        node("Concat", ["n", "rest"], "r", axis=0),
        node("Reshape", "xr", "f"),
        node("Unknown", "f", "u", domain="local"),
        node("MatMul", "uw"),
    ]
    constants = [
        tensor("zero", (1,), np.int64, 0),
        tensor("rest", (1,), np.int64, 12),
        tensor("w", (12, 5)),
    ]
    proto = model_of(nodes, [("x", ("batch", 3, 4))], [("y", ("batch", 5))], constants)
    proto.graph.value_info.append(helper.make_tensor_value_info("u", FLOAT, ("batch", 12)))
    path = tmp_path / "a.onnx"
    path.write_bytes(proto.SerializeToString())
    size = measure_size(path)
    assert (size.macs, size.layers[0].output) == (60, (1, 5))
    assert size.activation_peak_bytes == 4 * (12 + 12)


def test_other_open_sizes_stay_unknown_and_a_sum_has_no_hole(tmp_path):
    nodes = [node("MatMul", "xw", "t"), node("ReduceMean", ["t", "axis"], "m", keepdims=0), node("MatMul", "mv")]
    constants = [tensor("w", (3, 4)), tensor("v", (4, 5)), tensor("axis", (1,), np.int64, 1)]
    path = write(tmp_path / "a.onnx", nodes, [("x", ("batch", "tokens", 3))], [("y", None)], constants)
    size = measure_size(path)
    assert [(layer.macs, layer.output) for layer in size.layers] == [(None, None), (20, (1, 5))]
    assert (size.macs, size.activation_peak_bytes, size.parameters) == (None, None, 12 + 20)


def test_what_computes_no_product_costs_none_whatever_its_shape(tmp_path):
    nodes = [node("Add", "xb", "a"), node("ReduceMean", ["a", "axis"], "m", keepdims=0), node("MatMul", "mw")]
    constants = [tensor("b", (3,)), tensor("w", (3, 5)), tensor("axis", (1,), np.int64, 1)]
    size = measure_size(write(tmp_path / "a.onnx", nodes, [("x", ("n", "tokens", 3))], [("y", None)], constants))
    assert [(layer.operator, layer.macs, layer.output) for layer in size.layers] == [
        ("Add", 0, None),
        ("MatMul", 15, (1, 5)),
    ]
    assert size.macs == 15


@pytest.mark.parametrize("batch", ["batch", None, -1, 1, 4])
def test_a_fixed_batch_is_divided_out(tmp_path, batch):
    nodes = [node("MatMul", "xw", "t"), node("Relu", "t")]
    path = write(tmp_path / "a.onnx", nodes, [("x", (batch, 6, 3))], [("y", (batch, 6, 5))], [tensor("w", (3, 5))])
    size = measure_size(path)
    assert (size.macs, size.layers[0].output) == (90, (1, 6, 5))
    assert size.activation_peak_bytes == 4 * (18 + 30)


@pytest.mark.parametrize("output", [None, ("n", 6, 5), (None, None, None)])
def test_a_fixed_batch_is_divided_out_where_the_file_does_not_say_what_comes_out(tmp_path, output):
    nodes = [node("MatMul", "xw", "t"), node("Relu", "t")]
    path = write(tmp_path / "a.onnx", nodes, [("x", (4, 6, 3))], [("y", output)], [tensor("w", (3, 5))])
    size = measure_size(path)
    assert (size.macs, size.layers[0].output, size.activation_peak_bytes) == (90, (1, 6, 5), 4 * (18 + 30))


def test_outputs_that_nobody_can_infer_leave_the_batch_to_the_inputs(tmp_path):
    nodes = [node("MatMul", "xw", "t"), node("Unknown", "t", domain="local")]
    size = measure_size(write(tmp_path / "a.onnx", nodes, [("x", (4, 3))], [("y", None)], [tensor("w", (3, 5))]))
    assert (size.macs, size.layers[0].output) == (15, (1, 5))


@pytest.mark.parametrize("output", [None, (4, 1, 2, 3)])
@pytest.mark.parametrize(("layout", "batch"), [(0, 1), (1, 4)])
def test_steps_of_a_recurrent_operator_are_no_batch(tmp_path, output, layout, batch):
    made = node("LSTM", "xWR", hidden_size=3, layout=layout)
    constants = [tensor("W", (1, 12, 5)), tensor("R", (1, 12, 3))]
    size = measure_size(write(tmp_path / "a.onnx", [made], [("x", (4, 2, 5))], [("y", output)], constants))
    assert size.macs == 4 * 2 * 12 * 8 // batch


@pytest.mark.parametrize("output", [None, (5, 6)])
def test_what_does_not_come_once_per_sample_is_no_batch(tmp_path, output):
    """Six tokens of one sample, transposed: the shape that is inferred counts as one that is told."""
    nodes = [node("MatMul", "xw", "t"), node("Transpose", "t", perm=[1, 0])]
    size = measure_size(write(tmp_path / "a.onnx", nodes, [("x", (6, 3))], [("y", output)], [tensor("w", (3, 5))]))
    assert (size.macs, size.layers[0].output) == (90, (6, 5))


# Bytes


def test_gzip_is_what_a_download_takes(float_file):
    size = measure_size(float_file)
    assert size.gzip_bytes == len(gzip.compress(float_file.read_bytes(), 6, mtime=0)) < size.size_bytes
    assert measure_size(float_file) == size


def test_external_data_counts_with_the_file(tmp_path, chain, float_file):
    inside = measure_size(float_file)
    path = tmp_path / "sub" / "outside.onnx"
    path.parent.mkdir()
    onnx.save(chain, path, save_as_external_data=True, location="outside.data", size_threshold=64)
    beside = path.with_name("outside.data")
    size = measure_size(path)
    assert beside.stat().st_size > 4 * 16 * 144
    assert size.size_bytes == path.stat().st_size + beside.stat().st_size
    assert size.gzip_bytes == sum(len(gzip.compress(each.read_bytes(), 6, mtime=0)) for each in (path, beside))
    for name in ("weight_bytes", "parameters", "nonzero_parameters", "macs", "activation_peak_bytes", "layers"):
        assert getattr(size, name) == getattr(inside, name)
    assert precision_of(path) == "fp32"
    beside.write_bytes(beside.read_bytes()[:-8])
    with pytest.raises(
        CompressError, match=r"outside\.onnx: constant '.*' cannot be read: its data is said to be bytes"
    ):
        measure_size(path)
    beside.unlink()
    with pytest.raises(
        CompressError, match=r"outside\.onnx: constant '.*' cannot be read: its data is in 'outside\.data'"
    ):
        measure_size(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", ""])
def test_external_data_outside_of_the_folder_is_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    weight = TensorProto(name="w", data_type=FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    path = tmp_path / "sub" / "a.onnx"
    path.parent.mkdir()
    write(path, [node("MatMul", "xw")], [("x", (1, 4))], [("y", None)], [weight])
    with pytest.raises(CompressError, match="which is not in the folder of the file"):
        measure_size(path)


# What is no ONNX file


@pytest.mark.parametrize("measure", [measure_size, precision_of])
@pytest.mark.parametrize(
    "content",
    [b"", b"no model", b"\x00" * 100, b"PK\x03\x04" + bytes(range(256)), b"import onnx\n" * 9],
    ids=["empty", "text", "zeros", "zip", "code"],
)
def test_what_is_no_onnx_file_is_told(tmp_path, measure, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(CompressError, match=r"a\.onnx: is no ONNX file") as caught:
        measure(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("measure", [measure_size, precision_of])
def test_what_is_not_there_is_told(tmp_path, measure):
    with pytest.raises(CompressError, match=r"b\.onnx: cannot be read: No such file"):
        measure(tmp_path / "b.onnx")
    with pytest.raises(CompressError, match="cannot be read: Is a directory"):
        measure(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_is_told(float_file, share):
    content = float_file.read_bytes()
    float_file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CompressError, match=r"float\.onnx: is no ONNX file, or only a part of one$"):
        measure_size(float_file)


def test_a_constant_that_is_not_what_it_says_is_named(tmp_path):
    weight = TensorProto(name="w", data_type=FLOAT, dims=[4, 4], raw_data=bytes(60))
    path = write(tmp_path / "a.onnx", [node("MatMul", "xw")], [("x", (1, 4))], [("y", None)], [weight])
    with pytest.raises(CompressError, match=r"a\.onnx: constant 'w' cannot be read: \S"):
        measure_size(path)
    weight = TensorProto(name="w", data_type=999, dims=[1], raw_data=bytes(4))
    write(path, [node("MatMul", "xw")], [("x", (1, 4))], [("y", None)], [weight])
    with pytest.raises(CompressError, match=r"a\.onnx: constant 'w' cannot be read: \S"):
        measure_size(path)


@given(st.data())
def test_a_damaged_file_is_measured_or_refused(tmp_path_factory, small_int8, data):
    damaged = bytearray(small_int8)
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.onnx"
    path.write_bytes(damaged)
    try:
        size = measure_size(path)
    except CompressError:
        return
    assert size.parameters >= size.nonzero_parameters >= 0


def test_names_that_are_no_text_are_told(tmp_path):
    path = write(tmp_path / "a.onnx", [node("Relu", "x", name="number one")], [("x", (1, 4))], [("y", None)])
    path.write_bytes(path.read_bytes().replace(b"number one", b"number \xff\xfe\xfd"))
    with pytest.raises(CompressError, match=r"a\.onnx: is damaged: a name in it is no text"):
        measure_size(path)


def test_operators_of_somebody_elses_own_do_no_harm(tmp_path):
    nodes = [
        node("Conv", ["x"], ["a"], domain="local"),
        node("Gemm", [], ["b"], domain="local"),
        node("MatMulNBits", ["a", "w"], ["c"], domain="local"),
        node("Einsum", ["b", "c"], ["y"], domain="local", equation="?"),
    ]
    path = write(tmp_path / "a.onnx", nodes, [("x", (1, 4))], [("y", None)], [tensor("w", (4, 4))])
    size = measure_size(path)
    assert (size.macs, size.activation_peak_bytes) == (0, None)
    assert size.parameters == 16


def test_large_constants_leave_memory_and_shapes_stay(tmp_path):
    """A shape of many entries is still a shape, and a large weight still has one."""
    many = numpy_helper.from_array(np.array([1, 2, *[1] * 700, 5], np.int64), "many")
    nodes = [node("Reshape", ["x", "many"], "r"), node("Flatten", "r", "f"), node("MatMul", "fw")]
    path = write(tmp_path / "a.onnx", nodes, [("x", (1, 1, 2, 5))], [("y", None)], [many, tensor("w", (10, 3000))])
    assert measure_size(path).layers[-1].output == (1, 3000)
    assert Path(path).stat().st_size > 120_000
