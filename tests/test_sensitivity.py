"""What each layer costs in int8 on its own: the graph of one layer, the figures, their place in cache, results and report."""

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import model_of, node
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper
from report_examples import example_results

from compress import checkpoint as checkpoints
from compress import run
from compress.bench.measure import Bench, measure
from compress.bench.sensitivity import Recipe, Sample, sensitivity
from compress.bench.size import measure_size
from compress.errors import CompressError
from compress.events import Silent
from compress.measured import METRICS, Measurement, Sensitivity
from compress.methods.sensitivity import relative_error
from compress.onnx_io.quantize import TARGETS, activation_scales, collect_ranges
from compress.plan import Keys
from compress.report.html import render_html
from compress.report.markdown import render_markdown
from compress.report.summary import summarize
from compress.results import RESULTS, load_results

pytestmark = pytest.mark.usefixtures("one_thread")

X86, ARM = TARGETS["x86-vnni"], TARGETS["arm64"]
LOGITS = arrays.arrays(np.float64, (5, 3), elements=st.floats(-100, 100))


class Told(Silent):
    def __init__(self):
        self.steps = []

    def work(self, what, done, total, detail=""):
        self.steps.append((what, done, total))


# The error


@given(LOGITS, LOGITS, st.floats(-50, 50), st.floats(0.1, 10))
def test_error_is_that_of_centred_logits_and_has_no_unit(found, expected, shift, factor):
    centred = expected - expected.mean(1, keepdims=True)
    if np.linalg.norm(centred) < 1e-3:
        return
    error = relative_error(found, expected)
    difference = (found - found.mean(1, keepdims=True)) - centred
    assert error == pytest.approx(np.sqrt((difference**2).sum() / (centred**2).sum()), abs=1e-9)
    shifts = shift * np.arange(5)[:, None]
    assert relative_error(found + shifts, expected - shifts) == pytest.approx(error, rel=1e-6, abs=1e-6)
    assert relative_error(factor * found, factor * expected) == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_error_where_the_float_model_tells_no_classes_apart():
    same, other = np.ones((2, 3), np.float32), np.eye(2, 3, dtype=np.float32)
    assert relative_error(same, same) == 0.0
    assert relative_error(other, same) == np.inf
    assert np.isnan(relative_error(other * np.nan, other))


# The graph of one layer


def gemm(name, x, y):
    return node("Gemm", (x, f"{name}.w", f"{name}.b"), (y,), name=name, transB=1)


def constants(**layers):
    return [
        numpy_helper.from_array(np.asarray(values, np.float32), f"{name}.{kind}")
        for name, pair in layers.items()
        for kind, values in zip("wb", pair, strict=True)
    ]


def perceptron():
    """Three layers, of which the middle one has in each row a weight for an input that is always 0: it makes steps coarse."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.4, (8, 8)) for _ in range(3)]
    biases = [rng.normal(0, 0.1, 8) for _ in range(3)]
    weights[0][5], biases[0][5] = 0, -1  # Relu makes it 0
    weights[1][:, 5] = 40
    return model_of(
        [
            gemm("first", "x", "h1"),
            node("Relu", ("h1",), ("r1",), name="relu1"),
            gemm("fragile", "r1", "h2"),
            node("Relu", ("h2",), ("r2",), name="relu2"),
            gemm("last", "r2", "logits"),
        ],
        [("x", ("n", 8))],
        [("logits", ("n", 8))],
        constants(first=(weights[0], biases[0]), fragile=(weights[1], biases[1]), last=(weights[2], biases[2])),
    )


def samples(n=64, width=8):
    inputs = np.random.default_rng(1).normal(0, 1, (n, width)).astype(np.float32)
    return Sample(((inputs[: n // 2],), (inputs[n // 2 :],)), np.arange(n) % width)


def recipe_for(graph, sample, target=X86, keep_float=()):
    return Recipe(graph, collect_ranges(graph, sample.batches), target, keep_float)


def layers_of(recipe, folder):
    path = folder / "int8.onnx"
    path.write_bytes(recipe.made().SerializeToString())
    return measure_size(path).layers


def answers(proto, sample):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": batch})[0] for (batch,) in sample.batches])


def quantized_nodes(proto):
    """Names of the nodes that read quantized values, but for those that quantize and dequantize."""
    dequantized = {each.output[0] for each in proto.graph.node if each.op_type == "DequantizeLinear"}
    return [
        each.name
        for each in proto.graph.node
        if not each.op_type.endswith("quantizeLinear")
        and each.op_type != "QuantizeLinear"
        and not dequantized.isdisjoint(each.input)
    ]


@pytest.mark.parametrize("target", [X86, ARM], ids=["uint8", "int8"])
@pytest.mark.parametrize("layer", ["first", "fragile", "last"])
def test_one_layer_is_quantized_as_in_the_whole_file_and_no_other(layer, target):
    sample = samples()
    recipe = recipe_for(perceptron(), sample, target)
    whole, alone = recipe.made(), recipe.alone(layer)
    assert next(name for name in quantized_nodes(alone) if "relu" not in name) == layer
    readers = {name for name in quantized_nodes(alone) if "relu" not in name}
    following = {"first": {"fragile"}, "fragile": {"last"}, "last": set()}[layer]
    assert readers <= {layer, *following}  # the next one reads what was dequantized, but its weights are float
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in alone.graph.initializer}
    for name in ("first", "fragile", "last"):
        assert (f"{name}.w_quantized" in stored) == (name == layer)
    same = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    np.testing.assert_array_equal(stored[f"{layer}.w_quantized"], same[f"{layer}.w_quantized"])
    scales = activation_scales(alone)
    # What it reads and writes; unsigned numbers need no Relu, signed ones have a pair on both sides of it.
    between = target is ARM and layer != "last"
    assert len(scales) == 2 + between
    assert scales.items() <= activation_scales(whole).items()


@pytest.mark.parametrize(
    ("others", "keep_float", "writes"),
    [
        ((), (), "r"),
        ((), ("relu",), "h"),
        ((node("Add", ("h", "r"), ("s",), name="add"),), (), "h"),
    ],
    ids=["sole", "kept in float", "shared"],
)
def test_an_activation_stays_with_its_layer_where_one_kernel_computes_both(others, keep_float, writes):
    end = others[-1].output[0] if others else "r"
    graph = model_of(
        [
            gemm("layer", "x", "h"),
            node("Relu", ("h",), ("r",), name="relu"),
            *others,
            gemm("head", end, "logits"),
        ],
        [("x", ("n", 4))],
        [("logits", ("n", 4))],
        constants(layer=(np.eye(4) - 0.3, np.zeros(4)), head=(np.eye(4), np.zeros(4))),
    )
    recipe = recipe_for(graph, samples(16, 4), keep_float=keep_float)
    assert set(activation_scales(recipe.alone("layer"))) == {"x", writes}


# The figures


def test_the_fragile_layer_comes_first(tmp_path):
    sample, told = samples(), Told()
    graph = perceptron()
    recipe = recipe_for(graph, sample)
    found = sensitivity(recipe, layers_of(recipe, tmp_path), sample, 1, told)
    assert [layer.name for layer in found.layers] == ["first", "fragile", "last"]
    errors = {layer.name: layer.error_percent for layer in found.layers}
    assert errors["fragile"] > 10 * max(errors["first"], errors["last"]) > 0
    assert told.steps == [("int8 layer by layer", done, 3) for done in (1, 2, 3)]
    assert (found.n, found.split, found.notes) == (64, "validation", ())

    before = answers(graph, sample)
    centred = before - before.mean(1, keepdims=True)
    for effect, proto in [(found.together, recipe.made()), *((one, recipe.alone(one.name)) for one in found.layers)]:
        after = answers(proto, sample)
        right, was_right = after.argmax(1) == sample.labels, before.argmax(1) == sample.labels
        assert effect.changed == (after.argmax(1) != before.argmax(1)).sum()
        assert effect.only_float_correct == (was_right & ~right).sum()
        assert effect.only_int8_correct == (right & ~was_right).sum()
        moved = after - after.mean(1, keepdims=True) - centred
        assert effect.error_percent == pytest.approx(100 * np.sqrt((moved**2).sum() / (centred**2).sum()), rel=1e-4)
    assert found.together.changed > 0


def test_weights_and_activations_that_int8_can_hold_cost_nothing(tmp_path):
    """Whole numbers with steps of one."""
    weights = np.arange(16).reshape(4, 4) % 5
    np.fill_diagonal(weights, 127)  # the largest step
    graph = model_of(
        [gemm("layer", "x", "h"), node("Relu", ("h",), ("logits",), name="relu")],
        [("x", ("n", 4))],
        [("logits", ("n", 4))],
        constants(layer=(weights, np.zeros(4))),
    )
    inputs = (np.arange(64).reshape(16, 4) % 3 == 0).astype(np.float32)
    sample = Sample(((inputs,),), np.arange(16) % 4)
    recipe = Recipe(graph, {"x": (0.0, 255.0), "h": (0.0, 255.0), "logits": (0.0, 255.0)}, X86, ())
    found = sensitivity(recipe, layers_of(recipe, tmp_path), sample, 1, Silent())
    (layer,) = found.layers
    assert (layer.name, layer.changed, layer.error_percent) == ("layer", 0, 0.0)


def test_layers_in_float_are_not_tried_and_what_the_report_advises_helps(tmp_path):
    def tried(*keep_float):
        sample = samples()
        recipe = recipe_for(perceptron(), sample, keep_float=keep_float)
        found = sensitivity(recipe, layers_of(recipe, tmp_path), sample, 1, Silent())
        return [layer.name for layer in found.layers], found.together.error_percent

    names, whole = tried()
    assert names == ["first", "fragile", "last"]
    names, rest = tried("fragile", "last")
    assert names == ["first"]
    assert rest < whole / 10


@dataclass(frozen=True)
class Failing(Recipe):
    """Makes no graph, or one of answers that are no numbers."""

    def alone(self, name):
        if name == "first":
            raise ValueError("no such thing\nat all")
        variant = super().alone(name)
        if name == "fragile":
            (bias,) = (tensor for tensor in variant.graph.initializer if tensor.name == "last.b")
            bias.CopyFrom(numpy_helper.from_array(np.full(8, np.nan, np.float32), "last.b"))
        return variant


def test_what_cannot_be_measured_is_a_note(tmp_path):
    sample = samples()
    made = recipe_for(perceptron(), sample)
    recipe = Failing(made.graph, made.ranges, made.target, made.keep_float)
    found = sensitivity(recipe, layers_of(made, tmp_path), sample, 1, Silent())
    assert [layer.name for layer in found.layers] == ["last"]
    assert found.notes == (
        "sensitivity of 'first' is not known: no such thing",
        "sensitivity of 'fragile' is not known: the answers are not finite",
    )


# Of a checkpoint


@pytest.fixture(scope="module")
def quantized(shared_workshop, trained):
    return shared_workshop.run(trained, "quantize", calibration={"samples": 64})


@pytest.fixture
def bench(shared_workshop):
    return Bench(shared_workshop.dataset, "cpu", 1, 40, shared_workshop.trusted, Silent())


def asked(samples=48, seed=5):
    return {"sensitivity": {"samples": samples, "seed": seed}}


def test_a_quantized_checkpoint_is_measured_layer_by_layer_and_the_same_each_time(quantized, bench):
    found = measure(quantized, asked(), bench)
    effects = found.sensitivity
    assert [layer.name for layer in effects.layers] == [layer.name for layer in found.size.layers]
    assert {layer.operator for layer in effects.layers} == {"Conv", "Gemm"}
    assert (effects.n, effects.notes) == (48, ())
    assert all(0 < layer.error_percent < 50 for layer in effects.layers)
    assert Measurement.model_validate_json((quantized.path / METRICS).read_bytes()) == found
    assert measure(quantized, asked(), bench).sensitivity == effects
    assert measure(quantized, asked(seed=6), bench).sensitivity != effects


@pytest.mark.parametrize("key", [{}, {"sensitivity": None}])
def test_nobody_asks_nothing_is_measured(quantized, bench, key):
    assert measure(quantized, key, bench).sensitivity is None


def test_all_of_a_small_split_are_used_once(quantized, bench):
    assert measure(quantized, asked(samples=1000), bench).sensitivity.n == len(bench.data.validation) == 96


def test_a_sample_has_all_classes_alike_and_comes_from_its_split(bench):
    sample = Sample.of(bench.data.validation, 20, 3, 8)
    assert np.bincount(sample.labels).tolist() == [5, 5, 5, 5]
    assert [len(batch) for (batch,) in sample.batches] == [8, 8, 4]
    every = np.concatenate([batch.arrays()[0] for batch in bench.data.validation.batches(96)])
    drawn = np.concatenate([batch for (batch,) in sample.batches])
    positions = [int(np.flatnonzero((every == one).all((1, 2, 3)))[0]) for one in drawn]
    assert bench.data.validation.labels.numpy()[positions].tolist() == sample.labels.tolist()


def test_a_file_that_its_record_does_not_make_is_told_and_measured_otherwise(quantized, bench, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(quantized.path, folder)
    proto = onnx.load(folder / "model.onnx")
    proto.doc_string = "another"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    found = measure(replace(quantized, path=folder), asked(), bench)
    assert found.sensitivity == Sensitivity(
        split="validation",
        n=0,
        together=None,
        layers=(),
        notes=("no sensitivities: model.onnx is not what quantization.json and the float weights make here",),
    )
    assert found.accuracy.validation.n == 96


# In a run


def keys_of(tiny, folder, record, *overrides):
    return Keys(tiny.pipeline(folder, overrides=overrides)).measurement(record)


def test_key_covers_the_setting_of_int8_checkpoints_only(tiny, tmp_path, trained, quantized):
    def key(checkpoint, *overrides):
        return keys_of(tiny, tmp_path, checkpoint.manifest, *overrides)

    whole = key(quantized)
    assert whole["sensitivity"]["samples"] == 256
    assert key(quantized) == whole
    off, fewer = key(quantized, "bench.sensitivity=null"), key(quantized, "bench.sensitivity.samples=16")
    seeded = key(quantized, "seed=1")
    assert off == {**whole, "sensitivity": None}
    assert fewer["sensitivity"] == {**whole["sensitivity"], "samples": 16}
    assert seeded["sensitivity"]["seed"] != whole["sensitivity"]["seed"]
    assert key(trained)["sensitivity"] is None
    assert key(trained) == key(trained, "bench.sensitivity=null")


@pytest.mark.parametrize("samples", ["0", "10001", "1.5", "many"])
def test_numbers_of_samples_that_make_no_sense_are_refused(tiny, tmp_path, samples):
    with pytest.raises(CompressError, match=r"bench\.sensitivity\.samples"):
        tiny.pipeline(tmp_path, overrides=[f"bench.sensitivity.samples={samples}"])


def test_a_run_shows_what_was_measured_once_and_times_stand_when_it_is_turned_off(tiny, tmp_path):
    latency = {"batch_sizes": [1], "threads": [1], "rounds": 6, "seconds": 0.001}
    stages = ({"quantize": {"calibration": {"samples": 32}}}, {"export": {}})

    def again(*overrides):
        pipeline = tiny.pipeline(tmp_path, *stages, overrides=overrides, bench={"latency": latency})
        return run(pipeline, runs=tmp_path / "runs")

    results = again()
    source, quantized, exported = results.rows
    assert source.sensitivity is None
    assert quantized.sensitivity == exported.sensitivity
    assert quantized.sensitivity.n == 96
    assert len(quantized.sensitivity.layers) == 5
    folder = tmp_path / "runs" / "tiny"
    kept = json.loads((folder / exported.checkpoint / METRICS).read_bytes())
    assert kept["sensitivity"] is None  # taken over, not measured again
    assert load_results(folder / RESULTS) == results
    page = (folder / "report.html").read_text()
    assert "Sensitivity to int8" in page
    assert "Sensitivity to int8" in (folder / "report.md").read_text()
    first = max(quantized.sensitivity.layers, key=lambda layer: layer.error_percent)
    assert f"keep_float: [&#39;{first.name}&#39;]" in page

    without = again("bench.sensitivity=null")
    assert [row.sensitivity for row in without.rows] == [None] * 3
    assert [row.digest for row in without.rows] == [row.digest for row in results.rows]
    assert [row.latency for row in without.rows] == [row.latency for row in results.rows]
    assert "<h3>Sensitivity to int8</h3>" not in (folder / "report.html").read_text()


def test_exported_checkpoints_are_measured_without_layers(shared_workshop, quantized, bench):
    exported = shared_workshop.run(quantized, "export")
    assert checkpoints.load(exported.path).form == "exported"
    assert measure(exported, {"sensitivity": None}, bench).sensitivity is None


# In results and report

WHOLE = example_results()


def test_results_survive_their_file_and_older_ones_have_none(tmp_path):
    path = tmp_path / RESULTS
    path.write_text(WHOLE.model_dump_json())
    assert load_results(path) == WHOLE
    content = json.loads(path.read_text())
    for row in content["rows"]:
        del row["sensitivity"]
    path.write_text(json.dumps(content))
    assert [row.sensitivity for row in load_results(path).rows] == [None] * len(WHOLE.rows)


def with_effects(change):
    """The run with other sensitivities in its last row."""
    *rows, last = WHOLE.rows
    sensitivity = change(last.sensitivity)
    return WHOLE.model_copy(update={"rows": (*rows, last.model_copy(update={"sensitivity": sensitivity}))})


def test_table_ranks_by_error_and_says_what_to_do():
    layers = summarize(WHOLE).layers
    table = layers.sensitivities
    found = WHOLE.rows[-1].sensitivity.layers
    ranked = sorted(found, key=lambda layer: -layer.error_percent)
    assert [line.label for line in table.lines] == [layer.name for layer in ranked[:10]]
    assert [line.label for line in layers.all_sensitivities.lines] == [layer.name for layer in ranked]
    squares = sum(layer.error_percent**2 for layer in found)
    assert [line.cells[-1].part for line in table.lines] == pytest.approx(
        [layer.error_percent**2 / squares for layer in ranked[:10]]
    )
    cells = dict(zip(table.columns[1:], table.lines[0].cells, strict=True))
    assert (cells["Answers changed"].figure, cells["Relative error"].figure) == ("7", "2.5 %")
    assert (cells["Right answers"].figure, cells["Right answers"].details) == ("−4", ("5 lost, 1 gained",))
    size = next(layer.size_bytes for layer in WHOLE.rows[-1].size.layers if layer.name == ranked[0].name)
    assert cells["Size"].figure == f"{size} bytes"
    assert "on 256 samples of validation" in table.caption
    assert table.rest == "11 further layers lose less. The whole file: 9 answers changed, error 3.2 %."
    assert f"keep_float: ['{ranked[0].name}']" in layers.advice


def test_nothing_to_advise():
    exact = with_effects(
        lambda old: old.model_copy(
            update={"layers": tuple(layer.model_copy(update={"error_percent": 0.0}) for layer in old.layers)}
        )
    )
    assert summarize(exact).layers.advice == "No layer changes anything in int8."
    assert "No layer changes anything in int8." in render_markdown(summarize(exact))
    for none in (with_effects(lambda _: None), with_effects(lambda old: old.model_copy(update={"layers": ()}))):
        layers = summarize(none).layers
        assert (layers.sensitivities, layers.all_sensitivities, layers.advice) == (None, None, "")
        assert "<h3>Sensitivity to int8</h3>" not in render_html(summarize(none), none)
        assert "## Sensitivity to int8" not in render_markdown(summarize(none))
