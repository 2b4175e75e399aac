"""Models with several inputs and several outputs through the whole chain, as their user sees it."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import images

from compress import load_checkpoint, load_pipeline, run
from compress.bench.backends import onnx_runtime
from compress.bench.backends.base import Task, random_feed
from compress.config.data import ONLY_INPUT
from compress.data.base import Input
from compress.errors import CheckpointError, ExportError, StageError
from compress.events import Silent
from compress.manifest import FILE_NAME
from compress.models.cost import macs, output_positions
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import TARGETS, collect_ranges, quantize
from compress.onnx_io.session import infer, infer_all, open_session

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = '''
"""Networks with several inputs, outputs, or both, for images (1, 12, 8), numbers (5,) and tokens (6,)."""

from collections import namedtuple

import torch
from torch import nn

Answer = namedtuple("Answer", "scores features")


class Images(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3))


class WithNumbers(nn.Module):
    """Image and numbers; a tuple of logits and features."""

    def __init__(self, width=16):
        super().__init__()
        self.images, self.numbers = Images(width), nn.Linear(5, width)
        self.hidden, self.head = nn.Linear(3 * width, 2 * width), nn.Linear(2 * width, 4)

    def forward(self, image, numbers):
        both = torch.cat([self.images(image), self.numbers(numbers).relu()], 1)
        features = self.hidden(both).relu()
        return self.head(features), features


class WithTokens(nn.Module):
    """Image and tokens; a dict of logits and features."""

    def __init__(self, width=16):
        super().__init__()
        self.images, self.words = Images(width), nn.Embedding(50, 12)
        self.tokens = nn.Linear(12, width)
        self.hidden, self.head = nn.Linear(3 * width, 2 * width), nn.Linear(2 * width, 4)

    def forward(self, image, ids):
        words = self.tokens(self.words(ids).mean(1)).relu()
        features = self.hidden(torch.cat([self.images(image), words], 1)).relu()
        return {"features": features, "logits": self.head(features), "nothing": None}


class TwoAnswers(nn.Module):
    """One input; a named tuple whose first field is the logits."""

    def __init__(self, width=16):
        super().__init__()
        self.images, self.head = Images(width), nn.Linear(2 * width, 4)

    def forward(self, image):
        features = self.images(image)
        return Answer(self.head(features), features)
'''
FACTORIES = {
    # factory: its inputs beside the image, names of its outputs
    "WithNumbers": ("meta", ["logits", "output_1"]),
    "WithTokens": ("ids", ["logits", "features"]),
    "TwoAnswers": (None, ["logits", "features"]),
}
TRAINING = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01}
SHAPES = {"images": ["batch", 1, 12, 8], "meta": ["batch", 5], "ids": ["batch", 6]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    (root / "model.py").write_text(MODEL)
    for seed, (split, n) in enumerate({"train": 160, "validation": 96, "test": 96}.items()):
        inputs, labels = images(n, seed + 1)
        rng = np.random.default_rng(seed)
        np.save(root / f"{split}_images.npy", inputs)
        np.save(root / f"{split}_meta.npy", rng.normal(0, 0.5, (n, 5)) + labels[:, None])
        np.save(root / f"{split}_ids.npy", rng.integers(0, 40, (n, 6)) + 3 * labels[:, None])
        np.save(root / f"{split}_labels.npy", labels)
    return root


def pipeline_of(project, factory, *stages, **settings):
    """A pipeline file beside the model."""
    other = FACTORIES[factory][0]
    document = {
        "name": factory.lower(),
        "device": "cpu",
        "threads": 1,
        "data": {
            "kind": "arrays",
            "root": ".",
            "inputs": ["{split}_images", f"{{split}}_{other}"] if other else "{split}_images",
            "validation": {"from": "given"},
        },
        "model": {"factory": f"model.py:{factory}"},
        "stages": list(stages),
        "bench": {"latency": {"batch_sizes": [1], "threads": [1], "rounds": 6, "seconds": 0.001}},
        **settings,
    }
    path = project / f"{factory}.yaml"
    path.write_text(json.dumps(document))
    return load_pipeline(path)


def stages_of(factory):
    return (
        {"train": {**TRAINING, "channels_last": True}},
        {"distill": {"student": {"factory": f"model.py:{factory}", "kwargs": {"width": 12}}, **TRAINING}},
        {"prune": {"target": {"macs": 0.7}, "multiple": 2, "recovery": {**TRAINING, "epochs": 2}}},
        {
            "factorize": {
                "target": {"ratio": 0.4},
                "multiple": 1,
                "faster_by": 0.0,
                "recovery": {**TRAINING, "epochs": 2},
            }
        },
        {"quantize": {"calibration": {"samples": 64}}},
        {"export": {"agreement": 0.8}},
    )


class Recorder(Silent):
    """Counts what comes from the cache."""

    def __init__(self):
        self.cached = []

    def stage_cached(self, stage, number, total):
        self.cached.append(stage)


SLOW = {"WithNumbers": pytest.mark.slow}  # two of the three tell most of it in two thirds of the time


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW.get(name, ())) for name in FACTORIES])
def ran(request, project):
    """A whole run: factory, results, folder of the run."""
    torch.set_num_threads(1)
    runs = project / "runs"
    pipeline = pipeline_of(project, request.param, *stages_of(request.param))
    return request.param, run(pipeline, runs=runs), runs / request.param.lower()


def prepared(root, factory, metadata, split="test"):
    """Inputs as a user of the artifact prepares them from metadata.json alone, and labels."""
    stored = {name: np.load(root / f"{split}_{name}.npy") for name in ("images", "meta", "ids")}
    found = {}
    for given in metadata["inputs"]:
        array = stored["images" if given["name"] == ONLY_INPUT else given["name"]]
        if given["scaled_to"] is not None:
            mean, std = (np.asarray(given[key]) for key in ("mean", "std"))
            array = ((array / 255 - mean) / std).transpose(0, 3, 1, 2)
        found[given["name"]] = np.ascontiguousarray(array, given["dtype"])
    return found, np.load(root / f"{split}_labels.npy")


def names_of(factory):
    other = FACTORIES[factory][0]
    return ["images", other] if other else [ONLY_INPUT]


def test_every_stage_is_measured_and_timed(ran):
    _, results, _ = ran
    assert [row.stage for row in results.rows] == [
        "source",
        "train",
        "distill",
        "prune",
        "factorize",
        "quantize",
        "export",
    ]
    assert all(row.latency[0].median_ms > 0 for row in results.rows)
    assert results.rows[1].accuracy.test.percent > 70  # chance: 25
    assert results.rows[-1].accuracy.test.percent > 50
    assert all(row.macs > 0 for row in results.rows)
    assert results.rows[3].macs < 0.75 * results.rows[2].macs
    assert results.rows[4].parameters < results.rows[3].parameters
    assert all(sample.image for sample in results.changed)  # of the first input that is an image
    assert all(row.comparison.test.n == 96 for row in results.rows[2:])
    assert {row.stage for row in results.rows if row.profile} == {"train", "export"}


def test_files_name_all_inputs_and_outputs(ran):
    factory, _, folder = ran
    names, outputs = names_of(factory), FACTORIES[factory][1]
    metadata = json.loads((folder / "dist" / "metadata.json").read_bytes())
    assert [given["name"] for given in metadata["inputs"]] == names
    assert [answer["name"] for answer in metadata["outputs"]] == outputs
    for file in ("model.fp32.onnx", "model.int8.onnx"):
        session = onnxruntime.InferenceSession(folder / "dist" / file, providers=["CPUExecutionProvider"])
        for given, described in zip(session.get_inputs(), metadata["inputs"], strict=True):
            kind = "int64" if given.name == "ids" else "float32"
            assert (described["shape"], described["dtype"]) == (SHAPES.get(given.name, SHAPES["images"]), kind)
            assert given.shape == described["shape"]
            assert given.type == {"int64": "tensor(int64)", "float32": "tensor(float)"}[kind]
            assert described["scaled_to"] == (None if given.name in ("meta", "ids") else [0.0, 1.0])
        for answer, described in zip(session.get_outputs(), metadata["outputs"], strict=True):
            assert (answer.name, answer.shape) == (described["name"], described["shape"])
            assert described["dtype"] == "float32"
        assert session.get_outputs()[0].shape == ["batch", 4]


def test_the_int8_file_answers_what_was_reported(ran, project):
    factory, results, folder = ran
    metadata = json.loads((folder / "dist" / "metadata.json").read_bytes())
    inputs, labels = prepared(project, factory, metadata)
    session = onnxruntime.InferenceSession(folder / "dist" / "model.int8.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], inputs)[0]
    assert int((logits.argmax(1) == labels).sum()) == results.rows[-1].accuracy.test.correct
    types = {node.op_type for node in onnx.load(folder / "dist" / "model.int8.onnx").graph.node}
    assert "QuantizeLinear" in types


def test_every_output_of_the_float_file_is_the_models(ran, project):
    factory, results, folder = ran
    metadata = json.loads((folder / "dist" / "metadata.json").read_bytes())
    inputs, _ = prepared(project, factory, metadata)
    checkpoint = load_checkpoint(folder / results.rows[-1].checkpoint)
    model = checkpoint.build({checkpoint.arch.factory})
    with torch.no_grad():
        answer = model(*(torch.from_numpy(array) for array in inputs.values()))
    expected = (answer["logits"], answer["features"]) if isinstance(answer, dict) else tuple(answer)
    found = infer_all(open_session(folder / "dist" / "model.fp32.onnx", 1), list(inputs.values()))
    assert list(found) == FACTORIES[factory][1]
    for array, tensor in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), atol=1e-4 * float(tensor.abs().max()))
    assert results.artifact.max_error <= 1e-4


def test_checkpoints_say_what_the_model_takes_and_reload_to_the_bit(ran, project):
    factory, results, folder = ran
    for row in results.rows:
        checkpoint = load_checkpoint(folder / row.checkpoint)
        assert [each.name for each in checkpoint.inputs] == names_of(factory)
        assert checkpoint.classes == ("0", "1", "2", "3")
        trusted = {checkpoint.arch.factory}
        one, other = (checkpoint.build(trusted).state_dict() for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_run_again_does_nothing_anew(ran, project):
    factory, results, _ = ran
    recorder = Recorder()
    pipeline = pipeline_of(project, factory, *stages_of(factory))
    again = run(pipeline, runs=project / "runs", progress=recorder)
    assert recorder.cached == [row.stage for row in results.rows]
    assert [row.digest for row in again.rows] == [row.digest for row in results.rows]


def test_the_same_run_elsewhere_gives_the_same_digests(ran, project, tmp_path):
    factory, results, _ = ran
    pipeline = pipeline_of(project, factory, *stages_of(factory)[:1], bench={"latency": None})
    again = run(pipeline, runs=tmp_path)
    assert [row.digest for row in again.rows] == [row.digest for row in results.rows[:2]]


# Mistakes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return {'scores': x}",
            r"model: the forward pass returns a dict without the key 'logits' \(its keys are scores\)",
        ),
        ("return self.head(x.flatten(1)), [x]", "model: the forward pass returns nested outputs: 'output_1' is a list"),
    ],
)
def test_answers_without_logits_are_refused_before_training(project, tmp_path, body, message):
    (tmp_path / "odd.py").write_text(
        "from torch import nn\nclass Odd(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.head = nn.Linear(96, 4)\n    def forward(self, x):\n        {body}\n"
    )
    model = {"factory": str(tmp_path / "odd.py:Odd")}
    pipeline = pipeline_of(project, "TwoAnswers", {"train": TRAINING}, model=model)
    with pytest.raises(StageError, match=message):
        run(pipeline, runs=tmp_path / "runs")


def test_a_model_for_other_inputs_is_refused_before_training(project, tmp_path):
    model = {"factory": str(project / "model.py:TwoAnswers")}
    pipeline = pipeline_of(project, "WithTokens", {"train": TRAINING}, model=model)
    with pytest.raises(
        StageError, match=r"model: the forward pass fails on inputs of the shapes \(1, 12, 8\) and \(6,\)"
    ):
        run(pipeline, runs=tmp_path / "runs")


def test_checkpoints_of_version_1_do_not_stand_in_the_way(project, tmp_path):
    pipeline = pipeline_of(project, "WithTokens", bench={"latency": None})
    folder = tmp_path / "withtokens"
    first = run(pipeline, runs=tmp_path)
    old = folder / first.rows[0].checkpoint
    content = json.loads((old / FILE_NAME).read_bytes())
    inputs = {"shape": [1, 12, 8], "mean": [0.5], "std": [0.5], "classes": content.pop("classes")}
    (old / FILE_NAME).write_text(json.dumps({**content, "version": 1, "inputs": inputs}))
    with pytest.raises(
        CheckpointError, match=r"older version of this program, in format version 1; .*run its pipeline"
    ):
        load_checkpoint(old)
    recorder = Recorder()
    again = run(pipeline, runs=tmp_path, progress=recorder)
    assert recorder.cached == []
    assert again.rows[0].digest == first.rows[0].digest


# Parts that a whole run does not show


class Awkward(torch.nn.Module):
    """Layers and outputs are called what the exporter calls values; an output is there twice, one is an input."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, linear, ids):
        hidden = self.linear(linear).relu()
        return {
            "relu": hidden,
            "logits": hidden + ids.sum(1, keepdim=True),
            "again": hidden,
            "add": ids,
            "mean": hidden.mean(),
        }


AWKWARD = (Input("linear", (4,)), Input("ids", (2,), "int64"))


def test_names_that_the_exporter_also_uses_keep_their_meaning():
    model = Awkward().eval()
    proto = to_onnx(model, AWKWARD)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == ["linear", "ids"]
    inputs = (torch.randn(5, 4), torch.arange(10).view(5, 2))
    with torch.no_grad():
        expected = model(*inputs)
    found = infer_all(open_session(serialized(proto), 1), [tensor.numpy() for tensor in inputs])
    assert list(found) == ["logits", "relu", "again", "add", "mean"]
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5)


class AnyNumber(torch.nn.Module):
    """Takes as many inputs as there are."""

    def __init__(self, widths):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, 3) for width in widths)

    def forward(self, *inputs):
        return sum(layer(x.float()) for layer, x in zip(self.layers, inputs, strict=True))


class FirstAndMore(AnyNumber):
    def forward(self, first, *more):
        logits = super().forward(first, *more)
        return logits, logits.relu()


class OneAndMore(AnyNumber):
    def forward(self, first, *more):
        return super().forward(first, *more)


@pytest.mark.parametrize("kind", [AnyNumber, OneAndMore, FirstAndMore])
@pytest.mark.parametrize("count", [1, 2])
def test_inputs_that_are_gathered_in_a_tuple_keep_their_names_and_their_batch(kind, count):
    taken = AWKWARD[:count]
    model = kind([each.shape[0] for each in taken]).eval()
    proto = to_onnx(model, taken)
    axes = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in proto.graph.input}
    assert axes == {each.name: "batch" for each in taken}
    inputs = (torch.randn(5, 4), torch.arange(10).view(5, 2))[:count]
    with torch.no_grad():
        answer = model(*inputs)
    found = infer(open_session(serialized(proto), 1), [tensor.numpy() for tensor in inputs])
    np.testing.assert_allclose(found, answer[0] if isinstance(answer, tuple) else answer, atol=1e-5)


def test_an_output_called_like_an_input_is_refused():
    with pytest.raises(ExportError, match="an input and an output are both called 'again'; rename one"):
        to_onnx(Awkward(), (Input("again", (4,)), AWKWARD[1]))


def test_ranges_of_several_inputs_and_logits_by_name():
    proto = to_onnx(Awkward().eval(), AWKWARD)
    rng = np.random.default_rng(0)
    chunks = [(rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 9, (6, 2))) for _ in range(3)]
    ranges = collect_ranges(proto, chunks)
    values = np.concatenate([chunk[0] for chunk in chunks])
    assert ranges["linear"] == (values.min(), values.max())
    session = open_session(serialized(quantize(proto, ranges, TARGETS["x86-vnni"], [])), 1)
    linear, ids = chunks[0]
    (expected,) = session.run(["logits"], {"ids": ids, "linear": linear})
    assert expected.shape == (6, 3)
    assert np.array_equal(infer(session, (linear, ids)), expected)


def test_latency_feeds_whole_numbers_with_zeros(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(to_onnx(Awkward().eval(), AWKWARD)))
    model = onnx_runtime.load(Task("onnxruntime", "cpu", "", "fp32", str(path), None, (), 3, 1))
    feed = random_feed(model.inputs, 3)
    assert {name: (array.shape, array.dtype.name) for name, array in feed.items()} == {
        "linear": ((3, 4), "float32"),
        "ids": ((3, 2), "int64"),
    }
    assert feed["linear"].any()
    assert not feed["ids"].any()
    assert model.bind(feed)() > 0


def test_costs_of_several_inputs():
    model, inputs = Awkward(), (torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64))
    assert macs(model, inputs) == 12
    assert output_positions(model, inputs) == {"linear": 1}
