"""What bench measures of a checkpoint, against independent counts."""

import hashlib
import json

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from compress import checkpoint as checkpoints
from compress.bench.accuracy import accuracy, correct_in_onnx, correct_in_torch, pack, unpack
from compress.bench.measure import MEASURED_ONNX, Bench, deployed_file, measure
from compress.errors import ExportError
from compress.events import Silent
from compress.results import METRICS, Measurement

pytestmark = pytest.mark.usefixtures("one_thread")

HITS = st.lists(st.booleans(), min_size=1, max_size=70).map(np.array)


@given(HITS)
def test_correct_answers_survive_packing(hits):
    packed = pack(hits)
    assert len(packed) == 2 * ((len(hits) + 7) // 8)
    assert np.array_equal(unpack(packed, len(hits)), hits)


@given(HITS)
def test_accuracy_is_that_of_scipy(hits):
    found = accuracy(hits)
    expected = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    assert (found.correct, found.n, found.percent) == (hits.sum(), len(hits), pytest.approx(100 * hits.mean()))
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


@pytest.fixture
def bench(workshop):
    return Bench(workshop.dataset, "cpu", 1, 40, workshop.trusted, Silent())


@pytest.fixture(scope="session")
def quantized(shared_workshop, trained):
    return shared_workshop.run(trained, "quantize", calibration={"samples": 64})


def answers_in_onnx(path, split):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = np.concatenate([batch.inputs[0].numpy() for batch in split.batches(1000)])
    return session.run(None, {"input": inputs})[0].argmax(1)


def test_a_float_checkpoint(workshop, trained, bench):
    key = {"anything": "at all"}
    found = measure(trained, key, bench)
    file = trained.path / MEASURED_ONNX
    model = workshop.build(trained)
    assert deployed_file(trained) is None
    assert (found.precision, found.model, found.key) == ("fp32", MEASURED_ONNX, key)
    assert found.size_bytes == file.stat().st_size
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    # Positions times weights of conv1 (12×8), conv2 and conv3 (6×4), hidden and head.
    assert found.macs == 96 * 16 * 9 + 24 * 32 * 16 * 9 + 24 * 32 * 32 * 9 + 32 * 32 + 32 * 4
    for name in ("validation", "test"):
        split = getattr(workshop.dataset, name)
        inputs = torch.cat([batch.inputs[0] for batch in split.batches(1000)])
        with torch.no_grad():
            hits = (model(inputs).argmax(1) == split.labels).numpy()
        assert np.array_equal(unpack(found.correct[name], len(split)), hits)
        assert getattr(found.accuracy, name) == accuracy(hits)
        assert np.array_equal(hits, answers_in_onnx(file, split) == split.labels.numpy())


def test_a_quantized_checkpoint_is_its_file(workshop, quantized, bench):
    found = measure(quantized, {}, bench)
    file = quantized.file("model.onnx")
    assert (found.precision, found.model, found.size_bytes) == ("int8", "model.onnx", file.stat().st_size)
    assert not (quantized.path / MEASURED_ONNX).exists()
    for name in ("validation", "test"):
        split = getattr(workshop.dataset, name)
        assert np.array_equal(
            unpack(found.correct[name], len(split)), answers_in_onnx(file, split) == split.labels.numpy()
        )


@pytest.mark.parametrize(("after", "precision"), [("float", "fp32"), ("int8", "int8")])
def test_an_exported_checkpoint_is_its_file(after, precision, workshop, trained, quantized, bench):
    exported = workshop.run(trained if after == "float" else quantized, "export")
    found = measure(exported, {}, bench)
    assert (found.precision, found.model) == (precision, f"model.{precision}.onnx")
    assert found.size_bytes == exported.file(found.model).stat().st_size


def test_measuring_leaves_the_checkpoint_whole_and_can_be_read_back(trained, bench):
    before = trained.manifest
    found = measure(trained, {"a": 1}, bench)
    assert checkpoints.load(trained.path).manifest == before
    assert Measurement.model_validate_json((trained.path / METRICS).read_bytes()) == found
    assert json.loads((trained.path / METRICS).read_bytes())["key"] == {"a": 1}


def test_the_batch_size_changes_nothing(workshop, trained, quantized):
    model, split = workshop.build(trained), workshop.dataset.validation
    sizes = (1, 7, 1000)
    in_torch = [correct_in_torch(model, split, size, "cpu", Silent()) for size in sizes]
    in_onnx = [correct_in_onnx(quantized.file("model.onnx"), split, size, 1, Silent()) for size in sizes]
    for found in (in_torch, in_onnx):
        assert all(np.array_equal(found[0], other) for other in found[1:])


def test_a_model_that_onnx_cannot_express_is_named(workshop, bench, tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        "from torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(96, 4)\n"
        "    def forward(self, x):\n"
        "        return self.head(x.flatten(1)) * (2 if float(x.detach().sum()) > 0 else 1)\n"
    )
    workshop.trusted |= {f"{path}:Odd"}
    odd = workshop.source(f"{path}:Odd")
    with pytest.raises(ExportError, match="torch cannot export the model to ONNX: "):
        measure(odd, {}, Bench(workshop.dataset, "cpu", 1, 40, workshop.trusted, Silent()))
    assert not (odd.path / METRICS).exists()
