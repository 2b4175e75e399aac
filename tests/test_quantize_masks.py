"""Masks in attention: -inf, the smallest float and their like stay in float, everything around them becomes int8."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from networks import randomise
from onnx import helper, numpy_helper
from torch import nn

from compress.data.base import Input
from compress.errors import StageError
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import TARGETS, beyond_int8, collect_ranges, nodes_at, quantize
from compress.onnx_io.session import infer, open_session

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = '''
"""Transformer blocks that read an input (1, 12, 8) as twelve tokens."""

import math

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, TOKENS = 16, 2, 12
LOWEST = torch.finfo(torch.float32).min


class Block(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) / 2)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, num_classes)
        self.register_buffer("causal", torch.full((TOKENS, TOKENS), -math.inf).triu(1), persistent=False)
        with torch.no_grad():  # sharp attention: what is lost in the scores shows in the logits
            for layer in (self.query, self.key):
                layer.weight.mul_(4)
            for layer in (self.value, self.out):
                layer.weight.mul_(2)

    def masked(self, scores, padding):
        return scores

    def attention(self, q, k, v, padding):
        return self.masked(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), padding).softmax(-1) @ v

    def forward(self, x):
        x = x.squeeze(1)
        padding = (x[:, :, 0] < 0) & (torch.arange(TOKENS) > 3)
        x = self.embed(x) + self.position
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(self.attention(q, k, v, padding[:, None, None, :]).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm(x))).mean(1))


class Buffer(Block):
    def masked(self, scores, padding):
        return scores + self.causal


class Fill(Block):
    def masked(self, scores, padding):
        return scores.masked_fill(padding, -math.inf)


class Causal(Block):
    def attention(self, q, k, v, padding):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Lowest(Block):
    def masked(self, scores, padding):
        return scores + padding.float() * LOWEST


class Modest(Block):
    """-10000, as BERT has it, and twice: the scores pass two additions."""

    def masked(self, scores, padding):
        return scores + self.causal.clamp(min=-1e4) + padding.float() * -1e4


class Encoder(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, num_classes)
        with torch.no_grad():
            self.layers.layers[0].self_attn.in_proj_weight.mul_(3)

    def forward(self, x):
        x = x.squeeze(1)
        padding = (x[:, :, 0] < 0) & (torch.arange(TOKENS) > 3)
        return self.head(self.layers(self.embed(x), src_key_padding_mask=padding).mean(1))


class Endless(Block):
    """Every key is masked, for every query: the softmax is NaN."""

    def masked(self, scores, padding):
        return scores.masked_fill(padding | True, -math.inf)
'''
NAMES = ["Buffer", "Fill", "Causal", "Lowest", "Modest", "Encoder"]
BOUND = 0.06


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "masks.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def shop(workshop, file):
    workshop.trusted |= {f"{file}:{name}" for name in (*NAMES, "Block", "Endless")}
    return workshop


def made_by(shop, file, name, target):
    source = shop.source(f"{file}:{name}")
    return source, shop.run(source, "quantize", calibration={"samples": 96}, target=target)


def error(found, expected):
    """On average over the logits: a single token whose padding hangs on the rounding of its pixel may flip."""
    return np.abs(found - expected).mean() / np.abs(expected).mean()


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def record_of(result):
    return json.loads(result.file("quantization.json").read_bytes(), parse_constant=refuse)


def float_notes(result):
    return [note for note in result.history[-1].notes if "stay in float" in note]


@pytest.mark.parametrize("target", ["x86-vnni", "arm64"])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_network_is_int8_except_at_its_mask(name, target, shop, file):
    source, result = made_by(shop, file, name, target)
    record = record_of(result)
    model = shop.build(source)
    graph = to_onnx(model, shop.dataset.inputs)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    kept = record["keep_float"]
    assert "Softmax" in {kinds[node] for node in kept}
    assert {kinds[node] for node in kept} <= {"Softmax", "Add", "Where", "Mul", "Reshape"}
    (note,) = float_notes(result)
    assert note.startswith(f"{len(kept)} nodes stay in float, int8 would lose what they compute: {kept[0]} (")

    quantized = onnx.load(result.file("model.onnx")).graph
    before = sum(kind in ("MatMul", "Gemm") for kind in kinds.values())
    scaled = {node.output[0] for node in quantized.node if node.op_type == "DequantizeLinear"}
    heavy = [node for node in quantized.node if node.op_type in ("MatMul", "Gemm")]
    assert len(heavy) == before
    assert all(node.input[0] in scaled and node.input[1] in scaled for node in heavy)

    ranges = {key: tuple(pair) for key, pair in record["ranges"].items()}
    again = quantize(graph, ranges, TARGETS[record["target"]], kept)
    assert serialized(again) == result.file("model.onnx").read_bytes()

    inputs = next(iter(shop.dataset.validation.batches(96))).inputs[0]
    with torch.no_grad():
        expected = model(inputs).numpy()
    found = infer(open_session(serialized(again), 1), (inputs.numpy(),))
    assert error(found, expected) < BOUND


@pytest.mark.parametrize("name", ["Buffer", "Causal", "Lowest"])
def test_without_it_the_same_networks_lose_their_scores(name, shop, file):
    """The bound above means something: int8 everywhere exceeds it."""
    model = shop.build(shop.source(f"{file}:{name}"))
    graph = to_onnx(model, shop.dataset.inputs)
    inputs = next(iter(shop.dataset.validation.batches(96))).inputs[0]
    ranges = collect_ranges(graph, [(inputs.numpy(),)])
    expected = infer(open_session(serialized(graph), 1), (inputs.numpy(),))
    with np.errstate(all="ignore"):
        everywhere = quantize(graph, ranges, TARGETS["x86-vnni"], [])
    found = infer(open_session(serialized(everywhere), 1), (inputs.numpy(),))
    assert not error(found, expected) < 2 * BOUND


def test_a_network_without_masks_is_quantized_everywhere(shop, file):
    _, result = made_by(shop, file, "Block", "x86-vnni")
    assert record_of(result)["keep_float"] == []
    assert float_notes(result) == []


def test_a_plain_convolutional_network_gives_the_file_it_always_gave(shop):
    source = shop.source()
    result = shop.run(source, "quantize", calibration={"samples": 96}, target="x86-vnni")
    graph = to_onnx(shop.build(source), shop.dataset.inputs)
    record = record_of(result)
    assert record["keep_float"] == []
    assert float_notes(result) == []
    ranges = {key: tuple(pair) for key, pair in record["ranges"].items()}
    assert beyond_int8(graph, ranges) == {}
    plain = quantize(graph, ranges, TARGETS["x86-vnni"], [])
    assert serialized(plain) == result.file("model.onnx").read_bytes()


def test_what_the_user_keeps_in_float_is_no_news(shop, file):
    source = shop.source(f"{file}:Buffer")
    first = shop.run(source, "quantize", calibration={"samples": 32}, target="x86-vnni")
    kept = record_of(first)["keep_float"]
    second = shop.run(source, "quantize", calibration={"samples": 32}, target="x86-vnni", keep_float=kept)
    assert record_of(second)["keep_float"] == kept
    assert float_notes(second) == []
    assert second.file("model.onnx").read_bytes() == first.file("model.onnx").read_bytes()


def test_an_answer_that_is_not_finite_is_refused_with_the_tensors_it_comes_from(shop, file):
    source = shop.source(f"{file}:Endless")
    with pytest.raises(
        StageError, match=r"^quantize: not finite on .*: what the model answers \(logits\); before it, ."
    ):
        shop.draft(source, "quantize", calibration={"samples": 32})


# The bounds, one by one


class Scaled(nn.Module):
    """A legitimately large activation in the middle."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last((self.first(x) * self.factor).relu() / self.factor)


INPUTS = (Input("input", (6,)),)


def graph_and_ranges(module, x):
    with torch.random.fork_rng(devices=[]):
        graph = to_onnx(randomise(module), INPUTS)
    return graph, collect_ranges(graph, [(x[:9],), (x[9:],)])


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


@pytest.mark.parametrize(("factor", "expected"), [(1e4, False), (1e8, True)])
def test_only_absurdly_large_activations_stay_in_float(factor, expected, x):
    graph, ranges = graph_and_ranges(Scaled(factor), x)
    kept = nodes_at(graph, beyond_int8(graph, ranges))
    kinds = {node.name: node.op_type for node in graph.graph.node}
    assert {kinds[name] for name in kept} == ({"Mul", "Relu"} if expected else set())


class Limited(nn.Module):
    def forward(self, x):
        return x.clamp(-3.4e38, 3.0)[:, :4]


def test_limits_of_a_clip_are_no_values(x):
    graph, ranges = graph_and_ranges(Limited(), x)
    assert "Clip" in {node.op_type for node in graph.graph.node}
    assert beyond_int8(graph, ranges) == {}


def value(name, shape):
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def guarded():
    """softmax(x · w), with 0 where it is NaN, as attention does for queries that may look at nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"], "matmul"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax"),
        helper.make_node("IsNaN", ["weights"], ["bad"], "isnan"),
        helper.make_node("Where", ["bad", "zero", "weights"], ["safe"], "where"),
        helper.make_node("MatMul", ["safe", "w"], ["y"], "last"),
    ]
    tensors = {"w": np.eye(6, dtype=np.float32), "zero": np.zeros((), np.float32)}
    tensors = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    proto = helper.make_model(helper.make_graph(nodes, "g", [value("x", ["n", 6])], [value("y", ["n", 6])], tensors))
    proto.opset_import[0].version, proto.ir_version = 20, 10
    return proto


def test_what_is_asked_whether_it_is_nan_stays_in_float(x):
    """The smallest and largest value cannot tell: ONNX Runtime's ReduceMin passes over most NaNs."""
    proto = guarded()
    ranges = collect_ranges(proto, [(x,)])
    assert set(nodes_at(proto, beyond_int8(proto, ranges))) == {"softmax", "where"}
    assert set(beyond_int8(proto, ranges)) == {"weights"}


def test_scores_wider_than_steps_of_one_stay_in_float(x):
    proto = guarded()
    wide = beyond_int8(proto, collect_ranges(proto, [(100 * x,)]))
    assert set(wide) == {"scores", "weights"}
    assert set(nodes_at(proto, wide)) == {"matmul", "softmax", "where"}


def test_a_range_with_nan_stays_nan_whichever_chunk_has_it(x):
    proto = guarded()
    bad = np.full_like(x, -math.inf)
    for chunks in ([(x,), (bad,)], [(bad,), (x,)]):
        limits = collect_ranges(proto, chunks)["scores"]
        assert not all(map(math.isfinite, limits))
