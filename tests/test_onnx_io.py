"""Clean graphs that do what torch does, and int8 graphs that depend on nothing but their inputs."""

import copy
import inspect
import json
import logging
import os
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from networks import CLASSES, Residual, network, randomise
from onnx import helper, numpy_helper
from torch import nn

from compress.config import QuantizeConfig
from compress.config.data import ONLY_INPUT
from compress.data.base import Input
from compress.errors import ExportError
from compress.models.answers import LOGITS
from compress.onnx_io.convert import BATCH, PRODUCER, add_metadata, cleaned, serialized, to_onnx
from compress.onnx_io.quantize import (
    TARGETS,
    activation_scales,
    collect_ranges,
    matching_nodes,
    quantizable_operators,
    quantize,
    resolved_target,
)
from compress.onnx_io.session import infer, open_session

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 10, 14)


class Depthwise(nn.Module):
    """Strided, depthwise and pointwise convolutions, an adaptive pool and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = self.point(self.depth(x).relu()).relu()
        return self.head(self.pool(x).flatten(1))


class Split(Depthwise):
    """Pools by means, of every spelling."""

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x * x.mean((2, 3), keepdim=True).sigmoid()
        x = self.point(self.depth(x)).relu()
        return self.head(x.mean((-1, -2))) + x.mean((1, 2))[:, :CLASSES]


def images(shape=SHAPE):
    return (Input(ONLY_INPUT, tuple(shape)),)


def samples(n, shape=SHAPE, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        return randomise(Depthwise())


@pytest.fixture(scope="module")
def graph(model):
    return to_onnx(model, images())


@pytest.fixture(scope="module")
def inputs():
    return samples(24, seed=3).numpy()


@pytest.fixture(scope="module")
def ranges(graph, inputs):
    return collect_ranges(graph, [(inputs,)])


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def agree(module, proto, shape, batch):
    example = samples(batch, shape, seed=batch)
    with torch.no_grad():
        expected = module(example).numpy()
    found = infer(open_session(serialized(proto), threads=1), (example.numpy(),))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# Conversion


@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_does_what_the_model_does_at_any_batch(model, graph, batch):
    agree(model, graph, SHAPE, batch)


@pytest.mark.parametrize("name", ["cifar_resnet20", "residual"])
def test_networks_convert_and_agree(name):
    module, example = network(name)
    proto = to_onnx(module, images(example.shape[1:]))
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 3):
        agree(module, proto, tuple(example.shape[1:]), batch)
    assert "GlobalAveragePool" in operators(proto)
    assert "ReduceMean" not in operators(proto)


def test_input_output_and_batch_are_named(graph):
    (given,), (answer,) = graph.graph.input, graph.graph.output
    assert (given.name, answer.name) == (ONLY_INPUT, LOGITS)
    dims = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (given, answer)]
    assert dims == [[BATCH, *SHAPE], [BATCH, CLASSES]]


def test_pooling_is_one_operator_that_int8_kernels_know(graph):
    assert operators(graph).count("GlobalAveragePool") == 1
    assert "ReduceMean" not in operators(graph)


def test_means_of_every_spelling_agree_and_only_the_spatial_ones_become_pools():
    with torch.random.fork_rng(devices=[]):
        module = randomise(Split())
    proto = to_onnx(module, images())
    assert operators(proto).count("GlobalAveragePool") == 2
    assert operators(proto).count("ReduceMean") == 1
    for batch in (1, 3):
        agree(module, proto, SHAPE, batch)


def messages(message):
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from messages(part)


def traces(content):
    """Everything in a file that tells where or by whom it was made."""
    words = ["site-packages", ".py", "torch", "File ", "forward", os.sep + "tmp", str(Path.cwd()), str(Path.home())]
    words += [Path(__file__).name, "Depthwise", os.environ.get("USER", "")]
    return [word for word in words if len(word) > 1 and word.encode() in content]


def test_nothing_of_the_exporter_is_left(graph):
    for message in messages(graph):
        assert not getattr(message, "doc_string", "")
        assert not len(getattr(message, "metadata_props", ()))
    assert not graph.graph.value_info
    assert graph.producer_name == PRODUCER
    assert traces(serialized(graph)) == []


def test_nothing_of_anybody_is_left_in_an_int8_graph(graph, ranges):
    assert traces(serialized(quantize(graph, ranges, TARGETS["x86-vnni"], []))) == []


def test_comments_go_at_every_depth_and_what_branches_read_stays():
    def value(name, shape=(1,)):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    def branch(name):
        node = helper.make_node("Mul", ["x", "factor"], [name], doc_string="File /home/somebody/model.py, line 3")
        return helper.make_graph([node], name, [], [value(name)], doc_string="secret")

    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    tensors = {"yes": np.array(True), "factor": np.ones(1, np.float32), "idle": np.ones(9, np.float32)}
    tensors = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    proto = helper.make_model(helper.make_graph([node], "g", [value("x")], [value("y")], tensors))
    proto.opset_import[0].version, proto.ir_version = 20, 10
    clean = cleaned(proto)
    assert b"secret" not in serialized(clean)
    assert b"somebody" not in serialized(clean)
    assert {tensor.name for tensor in clean.graph.initializer} == {"yes", "factor"}
    assert infer(open_session(serialized(clean), 1), (np.full(1, 3, np.float32),)) == 3
    assert b"secret" in serialized(proto)  # the input is as it was


def test_equal_models_give_equal_bytes(model, graph):
    assert serialized(to_onnx(model, images())) == serialized(graph)


def test_layout_and_precision_of_the_model_do_not_show(model, graph):
    other = copy.deepcopy(model).to(memory_format=torch.channels_last).double().train()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert serialized(to_onnx(other, images())) == serialized(graph)
    assert other.training
    assert other.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_metadata_is_added_to_a_copy(graph):
    described = add_metadata(graph, {"classes": "a,b"})
    assert {prop.key: prop.value for prop in described.metadata_props} == {"classes": "a,b"}
    assert not graph.metadata_props


class Undecided(Residual):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Counting(Residual):
    def forward(self, x):
        for _ in range(int(x.abs().max())):
            x = x / 2
        return super().forward(x)


class Broken(Residual):
    def forward(self, x):
        raise ValueError("no forward today\nand more")


@pytest.mark.parametrize("kind", [Undecided, Broken])
def test_a_model_that_cannot_be_exported_gives_one_clear_line(kind, capfd):
    with pytest.raises(ExportError, match=r"^torch cannot export the model to ONNX: \S") as caught:
        to_onnx(kind().eval(), images())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [Undecided, Counting])
def test_python_that_depends_on_values_is_told_with_its_line(kind, capfd):
    lines, start = inspect.getsourcelines(kind)
    number = start + 2
    assert any(word in lines[2] for word in ("if x.sum()", "for _ in range"))
    levels = [logging.getLogger(name).level for name in ("torch", "torch.onnx")]
    with pytest.raises(ExportError) as caught:
        to_onnx(kind().eval(), images())
    assert str(caught.value) == (
        "torch cannot export the model to ONNX: forward depends on the values of its inputs in Python, which cannot be "
        f"exported (test_onnx_io.py:{number})"
    )
    assert capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in ("torch", "torch.onnx")] == levels


def test_what_onnx_runtime_does_not_take_gives_one_clear_line(graph):
    broken = cleaned(graph)
    broken.graph.node[0].op_type = "Convolve"
    for bad in (b"junk", serialized(broken)):
        with pytest.raises(ExportError, match=r"^ONNX Runtime does not take the model: ") as caught:
            open_session(bad, threads=1)
        assert "\n" not in str(caught.value)


# Ranges


def test_ranges_do_not_depend_on_the_chunks(graph, inputs, ranges):
    for size in (1, 7, 24):
        chunks = ((inputs[start : start + size],) for start in range(0, len(inputs), size))
        found = collect_ranges(graph, chunks)
        assert list(found) == list(ranges)
        np.testing.assert_allclose(list(found.values()), list(ranges.values()), rtol=1e-5, atol=1e-6)


def test_ranges_are_the_smallest_and_largest_values(model, inputs, ranges):
    assert ranges[ONLY_INPUT] == (inputs.min(), inputs.max())
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs))
    np.testing.assert_allclose(ranges[LOGITS], (logits.min(), logits.max()), rtol=1e-4)


def test_an_outlier_in_any_chunk_is_seen(graph, inputs):
    chunks = [inputs[:4], inputs[4:8].copy(), inputs[8:12].copy()]
    chunks[1][2, 1, 3, 5], chunks[2][0, 0, 0, 0] = 77.0, -55.0
    assert collect_ranges(graph, [(chunk,) for chunk in chunks])[ONLY_INPUT] == (-55.0, 77.0)


# Quantization


def constants(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def weights(proto):
    """Int8 weights with their scales, by name."""
    values = constants(proto)
    return {
        node.input[0]: (values[node.input[0]], values[node.input[1]])
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and values.get(node.input[0], np.zeros(1)).dtype == np.int8
    }


def zero_types(proto):
    values = constants(proto)
    return {values[node.input[2]].dtype.name for node in proto.graph.node if node.op_type == "QuantizeLinear"}


def test_settings_and_code_know_the_same_targets():
    assert {"auto", *TARGETS} == set(get_args(QuantizeConfig.model_fields["target"].annotation))


@pytest.mark.parametrize("name", TARGETS)
def test_the_int8_graph_is_valid_and_close_to_the_model(model, graph, ranges, inputs, name):
    proto = quantize(graph, ranges, TARGETS[name], [])
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 24):
        found = infer(open_session(serialized(proto), threads=1), (inputs[:batch],))
        with torch.no_grad():
            expected = model(torch.from_numpy(inputs[:batch])).numpy()
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", TARGETS)
def test_it_depends_on_nothing_but_graph_ranges_and_target(graph, ranges, name):
    first = serialized(quantize(graph, ranges, TARGETS[name], []))
    reread = {key: tuple(pair) for key, pair in json.loads(json.dumps(ranges)).items()}
    backwards = dict(reversed(list(reread.items())))
    again = onnx.ModelProto.FromString(serialized(graph))
    assert serialized(quantize(again, backwards, TARGETS[name], [])) == first
    wider = {**reread, ONLY_INPUT: (reread[ONLY_INPUT][0] * 2, reread[ONLY_INPUT][1])}
    assert serialized(quantize(graph, wider, TARGETS[name], [])) != first


def test_quantizing_leaves_the_graph_as_it_was(graph, ranges):
    before = serialized(graph)
    quantize(graph, ranges, TARGETS["x86-avx2"], [])
    assert serialized(graph) == before


@pytest.mark.parametrize(("name", "expected"), [("x86-vnni", "uint8"), ("x86-avx2", "uint8"), ("arm64", "int8")])
def test_activations_have_the_type_the_target_wants(graph, ranges, name, expected):
    proto = quantize(graph, ranges, TARGETS[name], [])
    assert zero_types(proto) == {expected} == {TARGETS[name].activations}
    scales = activation_scales(proto)
    assert ONLY_INPUT in scales
    low, high = ranges[ONLY_INPUT]
    if expected == "int8":
        assert {scale["zero_point"] for scale in scales.values()} == {0}
        assert scales[ONLY_INPUT]["scale"] == pytest.approx(max(-low, high) / 127, rel=0.01)
    else:
        assert scales[ONLY_INPUT]["scale"] == pytest.approx((high - low) / 255, rel=0.01)
        assert scales[ONLY_INPUT]["zero_point"] == round(-low / scales[ONLY_INPUT]["scale"])


def test_weights_are_symmetric_per_channel_and_near_the_float_ones(graph, ranges):
    floats = constants(graph)
    found = weights(quantize(graph, ranges, TARGETS["x86-vnni"], []))
    assert len(found) == 4
    for name, (values, scales) in found.items():
        original = floats[name.removesuffix("_quantized")]
        assert values.shape == original.shape
        assert scales.shape == (original.shape[0],)
        steps = scales.reshape(-1, *[1] * (original.ndim - 1))
        assert np.all(np.abs(values * steps - original) <= 0.51 * steps)
        peaks = np.abs(original).reshape(len(original), -1).max(1)
        np.testing.assert_allclose(scales, peaks / 127, rtol=0.01)


def test_a_reduced_range_keeps_weights_within_seven_bits(graph, ranges):
    for name, limit in {"x86-avx2": 64, "x86-vnni": 127}.items():
        peaks = [
            np.abs(values.astype(int)).max()
            for values, _ in weights(quantize(graph, ranges, TARGETS[name], [])).values()
        ]
        assert limit * 0.9 < max(peaks) <= limit


def test_nodes_that_are_to_stay_float_do(graph, ranges):
    kept = matching_nodes(graph, ["*Gemm*", "*linear*"])
    assert [node.op_type for node in graph.graph.node if node.name in kept] == ["Gemm"]
    proto = quantize(graph, ranges, TARGETS["x86-vnni"], kept)
    assert not any(name.startswith("head.weight") for name in weights(proto))
    assert constants(proto)["head.weight"].dtype == np.float32
    assert len(weights(proto)) == 3


def test_patterns_match_whole_names(graph):
    names = [node.name for node in graph.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert matching_nodes(graph, ["*"]) == names
    assert matching_nodes(graph, names[1:2]) == names[1:2]
    assert matching_nodes(graph, [names[0][:-1]]) == []
    assert matching_nodes(graph, []) == []


def test_int8_graphs_keep_their_pool_and_are_smaller(graph, ranges):
    proto = quantize(graph, ranges, TARGETS["x86-vnni"], [])
    assert operators(proto).count("GlobalAveragePool") == 1
    assert {"Conv", "Gemm", "GlobalAveragePool"} <= set(quantizable_operators())
    assert not any(array.dtype == np.float32 and array.size > 12 for array in constants(proto).values())


def test_auto_is_one_of_the_targets(monkeypatch):
    for arm, vnni, expected in [(True, False, "arm64"), (False, True, "x86-vnni"), (False, False, "x86-avx2")]:
        monkeypatch.setattr("compress.onnx_io.quantize.is_arm", lambda arm=arm: arm)
        monkeypatch.setattr("compress.onnx_io.quantize.has_vnni", lambda vnni=vnni: vnni)
        assert resolved_target("auto").name == expected
    assert {name: target.name for name, target in TARGETS.items()} == {name: name for name in TARGETS}
    assert resolved_target("arm64") is TARGETS["arm64"]


def test_nothing_is_printed_or_logged(model, inputs, capfd, caplog):
    proto = to_onnx(model, images())
    quantize(proto, collect_ranges(proto, [(inputs[:4],)]), TARGETS["x86-vnni"], [])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
