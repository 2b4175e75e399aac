"""What bench measures of a checkpoint, against independent counts."""

import base64
import hashlib
import io
import json
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import images, write_arrays
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from compress import checkpoint as checkpoints
from compress.bench.accuracy import (
    accuracy,
    check_classes,
    compare,
    evaluate_in_onnx,
    evaluate_in_torch,
    quality,
)
from compress.bench.changed import MOST, changed_samples
from compress.bench.measure import MEASURED_ONNX, Bench, deployed_file, measure
from compress.bench.size import measure_size
from compress.data.base import Batch
from compress.data.load import load_data
from compress.errors import CompressError, ExportError, ModelError
from compress.events import Silent
from compress.measured import METRICS, Measurement
from compress.packed import pack_answers, pack_confidences, unpack_answers, unpack_confidences

pytestmark = pytest.mark.usefixtures("one_thread")

HITS = st.lists(st.booleans(), min_size=1, max_size=70).map(np.array)
TRIPLES = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=80).map(np.array)


@given(st.lists(st.integers(0, 65_535), max_size=50).map(lambda values: np.array(values, np.int64)))
def test_answers_survive_packing_in_the_documented_format(answers):
    packed = pack_answers(answers)
    assert np.array_equal(unpack_answers(packed), answers)
    assert zlib.decompress(base64.b64decode(packed)) == b"".join(int(x).to_bytes(2, "little") for x in answers)


@given(st.lists(st.floats(0, 1), max_size=50).map(lambda values: np.array(values, np.float64)))
def test_confidences_survive_packing_to_three_digits(confidences):
    found = unpack_confidences(pack_confidences(confidences))
    assert np.array_equal(found, confidences.astype(np.float16))
    assert np.abs(found - confidences).max(initial=0) < 5e-4


def test_more_classes_than_answers_can_tell_are_refused():
    check_classes(65_536)
    with pytest.raises(CompressError, match="the data has 65,537 classes; at most 65,536 can be measured"):
        check_classes(65_537)


@given(HITS)
def test_accuracy_is_that_of_scipy(hits):
    found = accuracy(hits)
    expected = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    assert (found.correct, found.n, found.percent) == (hits.sum(), len(hits), pytest.approx(100 * hits.mean()))
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


@given(TRIPLES)
def test_a_comparison_counts_what_only_one_answers_right(triples):
    labels, first, second = triples.T
    found = compare(labels, first, second)
    lost = sum(a == y != b for y, a, b in triples.tolist())
    gained = sum(b == y != a for y, a, b in triples.tolist())
    assert (found.n, found.only_reference_correct, found.only_artifact_correct) == (len(labels), lost, gained)
    assert found.points == pytest.approx(100 * (gained - lost) / len(labels))
    assert found.low <= found.points * (len(labels) / (len(labels) + 2)) <= found.high
    assert found.agreement == pytest.approx(100 * np.mean(first == second))
    assert found.p_value == pytest.approx(binomtest(lost, lost + gained).pvalue if lost + gained else 1)


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
    assert found.size == measure_size(file)
    assert found.size.size_bytes == file.stat().st_size
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    # Positions times weights of conv1 (12×8), conv2 and conv3 (6×4), hidden and head.
    assert found.macs == 96 * 16 * 9 + 24 * 32 * 16 * 9 + 24 * 32 * 32 * 9 + 32 * 32 + 32 * 4
    for name in ("validation", "test"):
        split = getattr(workshop.dataset, name)
        inputs = torch.cat([batch.inputs[0] for batch in split.batches(1000)])
        with torch.no_grad():
            logits = model(inputs).numpy()
        labels, answers = split.labels.numpy(), unpack_answers(found.answers[name])
        assert np.array_equal(answers, logits.argmax(1))
        assert np.array_equal(answers, answers_in_onnx(file, split))
        confidences = softmax(logits.astype(np.float64), axis=1).max(1)
        np.testing.assert_allclose(unpack_confidences(found.confidences[name]), confidences, atol=1e-3)
        assert getattr(found.accuracy, name) == accuracy(answers == labels)
        told = getattr(found.quality, name)
        assert told.f1 == pytest.approx(100 * f1_score(labels, answers, average="macro"))
        assert [one.n for one in told.classes] == np.bincount(labels, minlength=4).tolist()
        assert sum(n for _, _, n in told.confusion) == len(split)
        assert sum(n for label, answer, n in told.confusion if label == answer) == (answers == labels).sum()
        assert told.top5 is None  # of four classes every answer is among the first five
        assert told.samples_per_second > 0


def test_a_quantized_checkpoint_is_its_file(workshop, quantized, bench):
    found = measure(quantized, {}, bench)
    file = quantized.file("model.onnx")
    assert (found.precision, found.model, found.size.size_bytes) == ("int8", "model.onnx", file.stat().st_size)
    assert not (quantized.path / MEASURED_ONNX).exists()
    for name in ("validation", "test"):
        split = getattr(workshop.dataset, name)
        assert np.array_equal(unpack_answers(found.answers[name]), answers_in_onnx(file, split))
        hits = answers_in_onnx(file, split) == split.labels.numpy()
        assert getattr(found.accuracy, name) == accuracy(hits)


@pytest.mark.parametrize(("after", "precision"), [("float", "fp32"), ("int8", "int8")])
def test_an_exported_checkpoint_is_its_file(after, precision, workshop, trained, quantized, bench):
    exported = workshop.run(trained if after == "float" else quantized, "export")
    found = measure(exported, {}, bench)
    assert (found.precision, found.model) == (precision, f"model.{precision}.onnx")
    assert found.size.size_bytes == exported.file(found.model).stat().st_size


def test_measuring_leaves_the_checkpoint_whole_and_can_be_read_back(trained, bench):
    before = trained.manifest
    found = measure(trained, {"a": 1}, bench)
    assert checkpoints.load(trained.path).manifest == before
    assert Measurement.model_validate_json((trained.path / METRICS).read_bytes()) == found
    assert json.loads((trained.path / METRICS).read_bytes())["key"] == {"a": 1}


def test_the_batch_size_changes_nothing(workshop, trained, quantized):
    model, split = workshop.build(trained), workshop.dataset.validation
    sizes = (1, 7, 1000)
    in_torch = [evaluate_in_torch(model, split, 4, size, "cpu", Silent()).answers for size in sizes]
    in_onnx = [evaluate_in_onnx(quantized.file("model.onnx"), split, 4, size, 1, Silent()).answers for size in sizes]
    for first, *others in (in_torch, in_onnx):
        for other in others:
            assert np.array_equal(first.classes, other.classes)
            assert np.array_equal(first.in_top, other.in_top)
            np.testing.assert_allclose(first.confidences, other.confidences, atol=1e-5)


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


# Other people's files


class Vectors:
    """A split of float vectors (n, 4), some of which a linear model answers right."""

    name = "test"

    def __init__(self, n, classes):
        rng = np.random.default_rng(0)
        self.inputs = rng.standard_normal((n, 4), np.float32)
        self.weights = rng.standard_normal((4, classes), np.float32)
        self.logits = self.inputs @ self.weights
        self.labels = torch.from_numpy(np.where(rng.random(n) < 0.5, self.logits.argmax(1), np.arange(n) % classes))

    def __len__(self):
        return len(self.labels)

    def batches(self, batch_size, **_):
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield Batch((torch.from_numpy(self.inputs[rows]),), self.labels[rows], torch.arange(len(self.labels))[rows])

    def model(self, path, batch="batch", width=4):
        """A file that multiplies by the weights."""
        weights = np.resize(self.weights, (width, self.weights.shape[1]))
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weights.shape[1]])],
            [numpy_helper.from_array(weights, "w")],
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
        return path


def test_top_five_of_many_classes(tmp_path):
    split = Vectors(200, 30)
    found = evaluate_in_onnx(split.model(tmp_path / "m.onnx"), split, 30, 64, 1, Silent())
    labels = split.labels.numpy()
    told = quality(found, labels, 30)
    first_five = np.argsort(-split.logits, axis=1)[:, :5]
    hits = int((first_five == labels[:, None]).any(1).sum())
    assert (told.top5.correct, told.top5.n) == (hits, 200)
    assert (found.answers.classes == labels).sum() < hits < 200
    assert told.samples_per_second == pytest.approx(200 / found.seconds)
    assert told.confusion is not None
    many = Vectors(50, 101)
    found = evaluate_in_onnx(many.model(tmp_path / "m.onnx"), many, 101, 64, 1, Silent())
    assert quality(found, many.labels.numpy(), 101).confusion is None


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_file_that_takes_one_batch_size_gets_it(tmp_path, batch):
    split = Vectors(50, 6)
    found = evaluate_in_onnx(split.model(tmp_path / "m.onnx", batch), split, 6, 32, 1, Silent()).answers
    assert np.array_equal(found.classes, split.logits.argmax(1))


def test_a_file_for_other_data_is_named(tmp_path):
    split = Vectors(50, 6)
    path = split.model(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"the model answers \(50, 6\) for 50 samples, but the data has 5 classes"):
        evaluate_in_onnx(path, split, 5, 64, 1, Silent())
    with pytest.raises(ModelError, match=r"m\.onnx: does not run on the data's inputs: .*Got: 4 Expected: 5"):
        evaluate_in_onnx(split.model(path, width=5), split, 6, 64, 1, Silent())


def test_the_logits_of_all_samples_are_never_in_memory(tmp_path):
    split = Vectors(4000, 1000)  # 16 MB of logits
    path = split.model(tmp_path / "m.onnx")
    tracemalloc.start()
    try:
        evaluate_in_onnx(path, split, 1000, 20, 1, Silent())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6


# What compression changed


def measured(answers, confidences):
    """As much of a measurement as tells which answers changed."""
    return SimpleNamespace(
        answers={"validation": pack_answers(np.asarray(answers))},
        confidences={"validation": pack_confidences(np.asarray(confidences, np.float64))},
    )


def all_wrong(labels):
    """The reference answers everything, the other nothing right."""
    sure = np.full(len(labels), 0.5)
    return measured(labels, sure), measured((labels + 1) % 4, sure)


def picture(sample):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sample.image))))


def data_of(tiny, folder, **settings):
    return load_data(tiny.pipeline(folder, data={**tiny.data, **settings}).data, 0).for_decisions()


def test_changed_samples_are_those_lost_and_the_surest_first(tiny_data):
    labels = tiny_data.validation.labels.numpy()
    right, wrong = labels.copy(), (labels + 1) % 4
    before, after = right.copy(), right.copy()
    after[:40] = wrong[:40]  # lost
    before[35:50] = wrong[35:50]  # the reference was wrong as well
    rng = np.random.default_rng(0)
    sure_before, sure_after = rng.uniform(0.3, 1, (2, len(labels))).astype(np.float16).astype(np.float64)
    found = changed_samples(measured(before, sure_before), measured(after, sure_after), tiny_data.for_decisions())
    order = sorted(range(35), key=lambda index: -sure_before[index] * sure_after[index])
    assert [one.index for one in found] == order[:MOST]
    assert len(found) == MOST == 24
    for one in found:
        assert (one.truth, one.answer) == (labels[one.index], wrong[one.index])
        assert (one.confidence_before, one.confidence_after) == (sure_before[one.index], sure_after[one.index])
    assert changed_samples(measured(before, sure_before), measured(before, sure_before), tiny_data) == ()


def test_thumbnails_show_the_pixels_as_they_were(tiny, tiny_data):
    found = changed_samples(*all_wrong(tiny_data.validation.labels.numpy()), tiny_data.for_decisions())
    stored = np.load(tiny.root / "data" / "validation_images.npy")
    assert [one.index for one in found] == list(range(MOST))  # equally sure: in order
    for one in found:
        assert np.array_equal(picture(one), stored[one.index, :, :, 0])


def test_thumbnails_of_large_colour_pictures_are_small(tiny, tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 1, 1, 3), np.uint8)
    pictures = np.broadcast_to(colours, (8, 200, 100, 3)).copy()
    pictures[:, :100] = 255 - pictures[:, :100]
    labels = np.arange(8) % 4
    write_arrays(tmp_path / "data", **dict.fromkeys(("train", "validation", "test"), (pictures, labels)))
    data = data_of(tiny, tmp_path, root=str(tmp_path / "data"))
    found = changed_samples(*all_wrong(labels), data)
    assert len(found) == 8
    for one in found:
        shown = picture(one)
        assert shown.shape == (96, 48, 3)
        assert np.array_equal(shown[80, 20], colours[one.index, 0, 0])
        assert np.array_equal(shown[10, 20], 255 - colours[one.index, 0, 0])


def test_no_thumbnails_where_no_input_is_an_image_and_the_image_where_one_is(tiny, tmp_path):
    inputs, labels = images(8, 1)
    numbers = np.random.default_rng(0).normal(0, 1, (8, 5))
    root = write_arrays(tmp_path / "data", **dict.fromkeys(("train", "validation", "test"), (inputs, labels)))
    for split in ("train", "validation", "test"):
        np.save(root / f"{split}_meta.npy", numbers)
    both = data_of(tiny, tmp_path, root=str(root), inputs=["{split}_meta", "{split}_images"])
    found = changed_samples(*all_wrong(labels), both)
    assert all(np.array_equal(picture(one), inputs[one.index, :, :, 0]) for one in found)
    alone = data_of(tiny, tmp_path, root=str(root), inputs="{split}_meta")
    found = changed_samples(*all_wrong(labels), alone)
    assert len(found) == 8
    assert all(one.image is None for one in found)
