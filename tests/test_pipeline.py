"""Whole runs on tiny data: what they write, what they re-do, what they refuse, and that they agree with themselves."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import images, write_arrays
from scipy.stats import binomtest, norm
from sklearn.metrics import confusion_matrix, precision_score

from compress import checkpoint as checkpoints
from compress import run
from compress.bench import latency as harness
from compress.errors import CheckpointError, CompressError, DataError, ModelError, StageError
from compress.events import Silent
from compress.measured import NotMeasured
from compress.plan import planned_stages
from compress.results import Results, load_results

LATENCY = {"latency": {"threads": [1], "rounds": 6, "seconds": 0.001}}
TRAIN = {"train": {"epochs": 3, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01}}
PRUNE = {"prune": {"target": {"macs": 0.6}, "recovery": None}}
QUANTIZE = {"quantize": {"calibration": {"samples": 64}}}
EXPORT = {"export": {"agreement": 0.1}}


class Recorder(Silent):
    """Keeps what a run tells; may raise when a stage has finished."""

    def __init__(self, fail_after=None):
        self.started, self.cached, self.finished, self.notes, self.warnings, self.epochs = {}, [], [], [], [], 0
        self.fail_after = fail_after

    def stage_started(self, name, position, total, reason):
        self.started[name] = reason

    def stage_cached(self, name, position, total):
        self.cached.append(name)

    def stage_finished(self, name, seconds, summary):
        self.finished.append(name)
        if name == self.fail_after:
            raise KeyboardInterrupt

    def epoch(self, result):
        self.epochs += 1

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def go(pipeline, runs, **options):
    """Run; returns results and what was told."""
    recorder = options.pop("progress", None) or Recorder()
    return run(pipeline, runs=runs, progress=recorder, **options), recorder


def folder_of(results, runs, stage):
    return runs / results.name / next(row.checkpoint for row in results.rows if row.stage == stage)


def answers_of(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": inputs})[0].argmax(1)


def raw(tiny, results, runs, split):
    """Inputs as a user of the artifact prepares them, straight from the arrays; and labels."""
    wanted = json.loads((folder_of(results, runs, "export") / "metadata.json").read_bytes())["inputs"][0]
    pixels = np.load(tiny.root / "data" / f"{split}_images.npy").astype(np.float32) / 255
    mean, std = (np.asarray(wanted[key], np.float32) for key in ("mean", "std"))
    inputs = ((pixels - mean) / std).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(inputs, np.float32), np.load(tiny.root / "data" / f"{split}_labels.npy")


# The whole pipeline


@pytest.fixture(scope="module")
def stages(tiny):
    return (
        TRAIN,
        {
            "distill": {
                "student": {"factory": tiny.factory, "kwargs": {"width": 12}},
                **TRAIN["train"],
                "losses": [{"kd": {}}, {"labels": {}}],
            }
        },
        {"prune": {"target": {"macs": 0.6}, "recovery": {"epochs": 1, "batch_size": 16}}},
        {"factorize": {"target": {"ratio": 0.3}, "faster_by": 0.0}},
        QUANTIZE,
        EXPORT,
    )


@pytest.fixture(scope="module")
def whole(tiny, stages, tmp_path_factory):
    """Pipeline, folder of runs and results of one run from end to end, with latency."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline = tiny.pipeline(folder, *stages, bench=LATENCY, budget={"accuracy_drop": 100.0})
    results, recorder = go(pipeline, folder / "runs", command="compress run pipeline.yaml")
    return pipeline, folder / "runs", results, recorder


@pytest.fixture
def again(whole, tmp_path):
    """The same in a copy of the runs folder, free to be changed."""
    pipeline, runs, results, _ = whole
    shutil.copytree(runs, tmp_path / "runs")
    return pipeline, tmp_path / "runs", results


NAMES = ["source", "train", "distill", "prune", "factorize", "quantize", "export"]


def test_every_stage_runs_once_and_is_told(whole):
    recorder = whole[3]
    assert list(recorder.started) == recorder.finished == NAMES
    assert recorder.cached == []
    assert set(recorder.started.values()) == {"it has not run yet"}


def test_results_on_disk_are_the_results(whole):
    _, runs, results, _ = whole
    path = runs / "tiny" / "results.json"
    assert load_results(path) == results
    assert Results.model_validate_json(path.read_bytes()) == results
    assert (runs / "tiny" / "report.md").is_file()
    assert (runs / "tiny" / "report.html").is_file()
    assert results.command == "compress run pipeline.yaml"


def test_results_have_the_published_shape(whole):
    content = json.loads((whole[1] / "tiny" / "results.json").read_bytes())
    assert content["version"] == 2
    assert {"machine", "git_revision", "rows", "repeats", "changed", "artifact"} <= content.keys()
    for row in content["rows"]:
        assert {
            "stage",
            "accuracy",
            "parameters",
            "macs",
            "size",
            "quality",
            "comparison",
            "seconds",
            "training",
            "latency",
            "profile",
            "checkpoint",
        } <= row.keys()
        assert row["accuracy"].keys() == {"validation", "test"}
        for accuracy in row["accuracy"].values():
            assert accuracy.keys() == {"correct", "n", "percent", "low", "high"}
        (latency,) = row["latency"]
        assert {"device", "backend", "provider", "precision", "batch_size", "threads"} <= latency.keys()
        assert 0 < latency["low_ms"] <= latency["median_ms"] <= latency["high_ms"]
        assert (latency["threads"], latency["batch_size"], latency["precision"]) == (1, 1, row["precision"])


def test_rows_begin_with_the_source_and_end_with_the_artifact(whole):
    _, runs, results, _ = whole
    assert [row.stage for row in results.rows] == NAMES
    assert results.reference == "train"
    assert [row.precision for row in results.rows] == ["fp32"] * 5 + ["int8"] * 2
    assert results.artifact.model == "model.int8.onnx"
    assert results.rows[-1].size_bytes == (runs / "tiny" / "dist" / "model.int8.onnx").stat().st_size
    assert results.rows[-1].size_bytes == results.artifact.files["model.int8.onnx"]
    assert results.warnings == ()


def test_figures_agree_with_each_other_and_with_the_files(whole, tiny):
    _, runs, results, _ = whole
    for row in results.rows:
        checkpoint = checkpoints.load(runs / "tiny" / row.checkpoint)
        model = checkpoint.build({tiny.factory})
        assert checkpoint.digest == row.digest
        assert checkpoint.history[-1].stage == row.stage
        assert checkpoint.history[-1].seconds == row.seconds > 0
        assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
        file = {"quantize": "model.onnx", "export": "model.int8.onnx"}.get(row.stage, "measured.onnx")
        assert row.size_bytes == (runs / "tiny" / row.checkpoint / file).stat().st_size
        for accuracy in (row.accuracy.validation, row.accuracy.test):
            interval = binomtest(accuracy.correct, accuracy.n).proportion_ci(method="wilson")
            assert accuracy.n == 96
            assert accuracy.percent == pytest.approx(100 * accuracy.correct / accuracy.n)
            assert (accuracy.low, accuracy.high) == pytest.approx((100 * interval.low, 100 * interval.high), abs=1e-9)
    smaller = [row.parameters for row in results.rows]
    assert smaller == sorted(smaller, reverse=True)
    assert [row.macs for row in results.rows] == sorted((row.macs for row in results.rows), reverse=True)


def test_accuracy_of_quantized_rows_is_that_of_the_file(whole, tiny):
    _, runs, results, _ = whole
    for stage, file in (("quantize", "model.onnx"), ("export", "model.int8.onnx")):
        row = next(row for row in results.rows if row.stage == stage)
        for split in ("validation", "test"):
            inputs, labels = raw(tiny, results, runs, split)
            hits = answers_of(runs / "tiny" / row.checkpoint / file, inputs) == labels
            assert getattr(row.accuracy, split).correct == hits.sum()


def test_the_paired_difference_and_the_budget(whole, tiny):
    _, runs, results, _ = whole
    inputs, labels = raw(tiny, results, runs, "validation")
    reference = answers_of(folder_of(results, runs, "train") / "measured.onnx", inputs) == labels
    artifact = answers_of(runs / "tiny" / "dist" / "model.int8.onnx", inputs) == labels
    lost, gained, n = int((reference & ~artifact).sum()), int((artifact & ~reference).sum()), len(labels)
    found = results.difference
    assert (found.n, found.only_reference_correct, found.only_artifact_correct) == (n, lost, gained)
    assert found.points == pytest.approx(100 * (artifact.mean() - reference.mean()))
    p_lost, p_gained = (lost + 1) / (n + 2), (gained + 1) / (n + 2)  # Bonett & Price 2012
    half = norm.ppf(0.975) * math.sqrt((p_lost + p_gained - (p_gained - p_lost) ** 2) / (n + 2))
    ends = (100 * (p_gained - p_lost - half), 100 * (p_gained - p_lost + half))
    assert (found.low, found.high) == pytest.approx(ends)
    assert results.budget.difference == found
    assert results.budget.met


def answers_at(results, runs, stage, inputs):
    """What a row's file answers; the test of float rows shows that they answer alike in torch."""
    row = next(row for row in results.rows if row.stage == stage)
    file = {"quantize": "model.onnx", "export": "model.int8.onnx"}.get(stage, "measured.onnx")
    return answers_of(runs / "tiny" / row.checkpoint / file, inputs)


def test_rows_after_the_reference_are_compared_with_it_on_both_splits(whole, tiny):
    _, runs, results, _ = whole
    assert [row.comparison is None for row in results.rows] == [True, True] + [False] * 5
    assert results.difference == results.rows[-1].comparison.validation
    for split in ("validation", "test"):
        inputs, labels = raw(tiny, results, runs, split)
        reference = answers_at(results, runs, "train", inputs)
        for row in results.rows[2:]:
            answers, found = answers_at(results, runs, row.stage, inputs), getattr(row.comparison, split)
            lost = int(((reference == labels) & (answers != labels)).sum())
            gained = int(((reference != labels) & (answers == labels)).sum())
            assert (found.only_reference_correct, found.only_artifact_correct, found.n) == (lost, gained, 96)
            assert found.points == pytest.approx(100 * (gained - lost) / 96)
            assert found.p_value == pytest.approx(binomtest(lost, lost + gained).pvalue if lost + gained else 1)
            assert found.agreement == pytest.approx(100 * (answers == reference).mean())


def test_quality_is_that_of_the_files_answers(whole, tiny):
    _, runs, results, _ = whole
    for split in ("validation", "test"):
        inputs, labels = raw(tiny, results, runs, split)
        for row in results.rows:
            answers, found = answers_at(results, runs, row.stage, inputs), getattr(row.quality, split)
            matrix = np.zeros((4, 4), int)
            for label, answer, n in found.confusion:
                matrix[label, answer] = n
            assert np.array_equal(matrix, confusion_matrix(labels, answers, labels=range(4)))
            expected = precision_score(labels, answers, average="macro", zero_division=0)
            assert found.precision == pytest.approx(100 * expected)
            assert [one.recall for one in found.classes] == pytest.approx(100 * matrix.diagonal() / matrix.sum(1))
            assert 0 <= found.calibration_error <= 100


def test_training_is_told_epoch_by_epoch(whole):
    _, runs, results, _ = whole
    assert [len(row.training) for row in results.rows] == [0, 3, 3, 1, 0, 0, 0]
    for row in results.rows:
        kept = checkpoints.load(runs / "tiny" / row.checkpoint).history[-1].training
        for told, epoch in zip(kept, row.training, strict=True):
            assert epoch.model_dump().items() <= told.items()
        assert [epoch.epoch for epoch in row.training] == list(range(1, len(kept) + 1))


def test_changed_samples_are_validation_samples_that_compression_lost(whole, tiny):
    _, runs, results, _ = whole
    inputs, labels = raw(tiny, results, runs, "validation")
    before, after = (answers_at(results, runs, stage, inputs) for stage in ("train", "export"))
    lost = np.flatnonzero((before == labels) & (after != labels))
    shown = {one.index for one in results.changed}
    assert shown <= set(lost.tolist())
    assert len(shown) == len(results.changed) == min(24, len(lost)) > 0
    assert all((one.truth, one.answer) == (labels[one.index], after[one.index]) for one in results.changed)
    assert all(one.image for one in results.changed)


def test_the_reference_is_timed_twice_and_both_ends_node_by_node(whole):
    results = whole[2]
    (repeat,) = results.repeats
    assert (repeat.name, repeat.threads, repeat.batch_size) == ("train", 1, 1)
    assert [row.stage for row in results.rows if row.profile] == ["train", "export"]
    float_nodes, int8_nodes = ({node.kind for node in row.profile.nodes} for row in results.rows if row.profile)
    assert "int8" not in float_nodes
    assert "int8" in int8_nodes
    for row in results.rows:
        (latency,) = row.latency
        assert (latency.ratio is None) == (row.stage == "train")
        assert latency.ratio is None or latency.ratio.against == "train"


def test_dist_holds_exactly_the_exported_files(whole):
    _, runs, results, _ = whole
    files = {path.name: path.read_bytes() for path in (runs / "tiny" / "dist").iterdir()}
    assert set(files) == {"model.fp32.onnx", "model.int8.onnx", "metadata.json"}
    assert results.artifact.files == {name: len(content) for name, content in files.items()}
    assert results.artifact.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    metadata = json.loads(files["metadata.json"])
    assert metadata["accuracy"]["test"] == results.rows[-2].accuracy.test.model_dump()
    assert results.artifact.max_error == metadata["verification"]["fp32_max_error"] <= 1e-4
    assert results.artifact.agreement == metadata["verification"]["int8_agreement"]


def test_no_folder_of_this_machine_in_results_report_or_dist(whole, tiny):
    _, runs, _, _ = whole
    folder = runs / "tiny"
    for path in (*(folder / "dist").iterdir(), folder / "results.json", folder / "report.md", folder / "report.html"):
        content = path.read_bytes()
        assert str(runs).encode() not in content, path.name
        assert str(tiny.root).encode() not in content, path.name


def test_nothing_temporary_is_left(whole):
    _, runs, results, _ = whole
    left = {path.name for path in (runs / "tiny").iterdir()}
    assert left == {*(row.checkpoint for row in results.rows), "dist", "results.json", "report.md", "report.html"}


# Doing nothing twice


def test_a_second_run_does_nothing_again(again, monkeypatch):
    pipeline, runs, results = again

    def never(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr("compress.training.fit", never)
    monkeypatch.setattr("compress.pipeline.measure", never)
    monkeypatch.setattr("compress.outcome.latency.measure", never)
    monkeypatch.setattr("compress.outcome.profile.profile", never)
    monkeypatch.setattr("compress.stages.Stage.load", never)
    second, recorder = go(pipeline, runs)
    assert (recorder.cached, recorder.started) == (NAMES, {})
    assert second.model_copy(update={"created": results.created, "command": results.command}) == results


def test_a_changed_setting_redoes_that_stage_and_what_follows_and_says_why(again, tiny, tmp_path, stages):
    _, runs, results = again
    shared = {"bench": LATENCY, "budget": {"accuracy_drop": 100.0}}
    changed = tiny.pipeline(tmp_path, *stages, overrides=["stages.prune.target.macs=0.4"], **shared)
    second, recorder = go(changed, runs)
    assert recorder.cached == NAMES[:3]
    assert list(recorder.started) == NAMES[3:]
    assert recorder.started["prune"] == "changed: settings.target.macs: 0.6 → 0.4"
    assert recorder.started["factorize"].startswith("changed: parent: ")
    assert second.rows[3].macs < results.rows[3].macs
    assert second.rows[:3] != results.rows[:3]  # latency of all rows was measured anew, together
    assert [row.digest for row in second.rows[:3]] == [row.digest for row in results.rows[:3]]
    original = tiny.pipeline(tmp_path, *stages, **shared)
    third, recorder = go(original, runs)
    assert (recorder.cached, recorder.started) == (NAMES, {})
    assert [row.digest for row in third.rows] == [row.digest for row in results.rows]


def test_fresh_redoes_everything_to_the_same_bits(again):
    pipeline, runs, results = again
    second, recorder = go(pipeline, runs, fresh=True, until="factorize")
    assert recorder.started == dict.fromkeys(NAMES[:5], "--fresh")
    assert [row.digest for row in second.rows] == [row.digest for row in results.rows[:5]]


def test_latency_is_measured_again_with_other_settings_alone(again, tiny, tmp_path, stages):
    _, runs, results = again
    bench = {"latency": {**LATENCY["latency"], "batch_sizes": [2]}}
    second, recorder = go(tiny.pipeline(tmp_path, *stages, bench=bench), runs)
    assert recorder.cached == NAMES
    assert {one.batch_size for row in second.rows for one in row.latency} == {2}
    assert [row.digest for row in second.rows] == [row.digest for row in results.rows]


def test_a_lost_measurement_is_made_again_without_the_stage(again):
    pipeline, runs, results = again
    folder = folder_of(results, runs, "prune")
    (folder / "metrics.json").unlink()
    (folder_of(results, runs, "source") / "measured.onnx").unlink()
    second, recorder = go(pipeline, runs)
    assert recorder.cached == NAMES
    assert without_speed(second) == without_speed(results)
    assert (folder / "metrics.json").is_file()


def without_speed(results):
    """Everything of the rows but what differs each time it is measured."""
    rows = results.model_dump(mode="json")["rows"]
    for row in rows:
        for quality in row["quality"].values():
            assert quality.pop("samples_per_second") > 0
    return rows


@pytest.mark.slow
def test_files_of_an_older_version_are_measured_again_without_a_word(again):
    pipeline, runs, results = again
    for row in results.rows:
        path = runs / "tiny" / row.checkpoint / "metrics.json"
        content = json.loads(path.read_bytes())
        old = {
            name: content[name] for name in ("key", "precision", "accuracy", "parameters", "macs", "model", "sha256")
        }
        path.write_text(json.dumps({**old, "correct": {"validation": "ff", "test": "ff"}, "size_bytes": 1}))
    path = runs / "tiny" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "version": 1}))
    with pytest.raises(CompressError, match=r"results\.json: is of version 1; this program reads version 2"):
        load_results(path)
    second, recorder = go(pipeline, runs)
    assert recorder.cached == NAMES
    assert not [text for text in recorder.warnings if "too noisy" not in text]  # those are about times
    assert [row.accuracy for row in second.rows] == [row.accuracy for row in results.rows]
    assert [row.quality.test.f1 for row in second.rows] == [row.quality.test.f1 for row in results.rows]
    assert all(row.latency for row in second.rows)
    assert load_results(path) == second


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx", "quantization.json"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(again, file):
    pipeline, runs, results = again
    path = folder_of(results, runs, "quantize") / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*remove the folder, or run with --fresh") as caught:
        go(pipeline, runs)
    assert str(caught.value).startswith(str(path))


def test_until_stops_there(again, tmp_path):
    pipeline, runs, results = again
    second, recorder = go(pipeline, tmp_path / "new", until="source")
    assert list(recorder.started) == ["source"]
    assert [row.stage for row in second.rows] == ["source"]
    assert (second.reference, second.artifact, second.difference, second.budget) == ("source", None, None, None)
    assert second.rows[0].digest == results.rows[0].digest
    assert not (tmp_path / "new" / "tiny" / "dist").exists()
    third, _ = go(pipeline, runs, until="prune")
    assert [row.stage for row in third.rows] == NAMES[:4]
    with pytest.raises(CompressError, match=r"--until: there is no stage 'prun' .*; did you mean 'prune'\?"):
        go(pipeline, runs, until="prun")


# Failing and stopping


def test_a_failed_stage_is_never_cached_and_leaves_nothing(tiny, tmp_path):
    hopeless = tiny.pipeline(tmp_path, TRAIN, {"prune": {"target": {"macs": 0.01}}})
    for attempt in range(2):
        recorder = Recorder()
        with pytest.raises(StageError, match="cannot be reached"):
            go(hopeless, tmp_path / "runs", progress=recorder)
        assert "prune" in recorder.started
        assert ("train" in recorder.cached) == bool(attempt)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs" / "tiny").iterdir())
    assert names == ["00-source", "01-train"]
    _, recorder = go(tiny.pipeline(tmp_path, TRAIN, PRUNE), tmp_path / "runs")
    assert recorder.cached == ["source", "train"]


def test_a_stopped_run_goes_on_where_it_was(tiny, tmp_path):
    pipeline = tiny.pipeline(tmp_path, TRAIN, PRUNE)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        go(pipeline, tmp_path / "runs", progress=Recorder(fail_after="train"))
    assert torch.get_num_threads() == threads
    (tmp_path / "runs" / "tiny" / ".tmp-left").mkdir()
    _, recorder = go(pipeline, tmp_path / "runs")
    assert recorder.cached == ["source", "train"]
    assert list(recorder.started) == ["prune"]
    assert not (tmp_path / "runs" / "tiny" / ".tmp-left").exists()


# What is refused before anything is trained


@pytest.mark.parametrize(
    ("model", "student", "error", "message"),
    [
        ({"factory": "MODEL:mak"}, None, ModelError, r"model.py has no callable 'mak'; did you mean 'make'\?"),
        ({"factory": "cifar:resnet21"}, None, ModelError, r"there is no 'cifar:resnet21'; did you mean 'resnet"),
        ({"kwargs": {"widht": 3}}, None, ModelError, r"refuses its kwargs: .*; did you mean 'width'\?"),
        (
            {"kwargs": {"num_classes": 10}},
            None,
            StageError,
            r"model: answers \(2, 10\) for 2 samples, but the data has 4 classes; set its kwargs to \{num_classes: 4\}",
        ),
        (
            {"kwargs": {"channels": 3}},
            None,
            StageError,
            r"pipeline.yaml:\d+: model: takes inputs of 3 channels, but the data has 1",
        ),
        ({"weights": "data/train_labels.npy"}, None, ModelError, r"model.weights: .*train_labels.npy: "),
        ({}, {"factory": "MODEL:mak"}, ModelError, r"has no callable 'mak'"),
        (
            {},
            {"factory": "MODEL:stubborn"},
            StageError,
            r"stages.1.distill.student: the forward pass fails on .*\(1, 12, 8\): no forward today",
        ),
        (
            {},
            {"factory": "cifar:resnet20", "kwargs": {"in_channels": 1}},
            StageError,
            r"stages.1.distill.student: answers \(2, 10\)",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_training(tiny, tmp_path, model, student, error, message):
    def located(settings):
        factory = settings.get("factory", "MODEL:make").replace("MODEL", str(tiny.root / "model.py"))
        weights = {"weights": str(tiny.root / settings["weights"])} if "weights" in settings else {}
        return {**settings, "factory": factory, **weights}

    distill = [{"distill": {"student": located(student)}}] if student else []
    pipeline = tiny.pipeline(tmp_path, TRAIN, *distill, model=located(model))
    recorder = Recorder()
    with pytest.raises(error, match=message):
        go(pipeline, tmp_path / "runs", progress=recorder)
    assert recorder.epochs == 0
    assert set(recorder.started) <= {"source"}
    assert recorder.finished == []
    left = tmp_path / "runs" / "tiny"
    assert not left.exists() or not any(left.iterdir())


# Warnings and budget


def test_a_missed_budget_is_told(tiny, tmp_path):
    pipeline = tiny.pipeline(
        tmp_path, TRAIN, {"prune": {"target": {"macs": 0.1}, "recovery": None}}, budget={"accuracy_drop": 5.0}
    )
    results, _ = go(pipeline, tmp_path / "runs")
    train, prune = results.rows[1].accuracy.validation, results.rows[2].accuracy.validation
    assert train.percent - prune.percent > 5
    assert not results.budget.met
    assert results.budget.difference.points == pytest.approx(prune.percent - train.percent)
    exact = tiny.pipeline(
        tmp_path,
        TRAIN,
        {"prune": {"target": {"macs": 0.1}, "recovery": None}},
        budget={"accuracy_drop": -results.difference.points},
    )
    assert go(exact, tmp_path / "runs")[0].budget.met


def test_validation_much_better_than_test_is_told(tiny, tmp_path):
    test, labels = images(96, 3)
    write_arrays(
        tmp_path / "data",
        train=images(160, 1),
        validation=images(96, 2),
        test=(test, np.random.default_rng(0).permutation(labels)),
    )
    pipeline = tiny.pipeline(tmp_path, TRAIN, data={**tiny.data, "root": str(tmp_path / "data")})
    results, recorder = go(pipeline, tmp_path / "runs")
    (text,) = results.warnings
    assert text in recorder.warnings
    train = results.rows[1].accuracy
    assert (
        f"'train' answers {train.validation.percent:.2f} % of validation but {train.test.percent:.2f} % of test" in text
    )
    assert "validation: {from: test, size: 2000}" in text


@pytest.mark.slow
def test_random_weights_are_told(tiny, tmp_path):
    model = {"factory": "cifar:resnet20", "kwargs": {"num_classes": 4, "in_channels": 1}}
    results, recorder = go(tiny.pipeline(tmp_path, PRUNE, model=model), tmp_path / "runs")
    assert any(text.startswith("the source model has random weights") for text in results.warnings)
    assert set(results.warnings) <= set(recorder.warnings)
    assert results.reference == "source"
    only_source, _ = go(tiny.pipeline(tmp_path, PRUNE, model=model), tmp_path / "runs", until="source")
    assert only_source.warnings == ()


# The test split is for reporting alone


DATA = '''
"""Training and validation images are fixed; test images are others for another seed."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "data"


def read(name):
    return np.load(HERE / f"{name}_images.npy"), np.load(HERE / f"{name}_labels.npy")


def splits(seed):
    inputs, labels = read("test")
    chosen = np.random.default_rng(seed).permutation(len(labels))[:40]
    return {
        "train": read("train"),
        "validation": read("validation"),
        "test": (inputs[chosen], np.roll(labels[chosen], seed)),
    }
'''


@pytest.mark.slow
def test_another_test_set_changes_no_model(tiny, tmp_path):
    (tiny.root / "data.py").write_text(DATA)
    found = []
    for seed in (0, 1):
        data = {
            "kind": "python",
            "callable": f"{tiny.root / 'data.py'}:splits",
            "kwargs": {"seed": seed},
            "validation": {"from": "given"},
        }
        recover = {"prune": {"recovery": {"epochs": 2, "batch_size": 16}}}
        pipeline = tiny.pipeline(tmp_path, TRAIN, recover, QUANTIZE, EXPORT, data=data)
        results, _ = go(pipeline, tmp_path / f"runs{seed}")
        loaded = [checkpoints.load(tmp_path / f"runs{seed}" / "tiny" / row.checkpoint) for row in results.rows]
        computing = [
            {
                name: record.sha256
                for name, record in one.manifest.files.items()
                if name in ("model.safetensors", "quantization.json", "model.onnx")
            }
            for one in loaded
        ]
        found.append((computing, [one.edits for one in loaded], results))
    assert found[0][:2] == found[1][:2]
    assert found[0][2].changed == found[1][2].changed
    first, second = found[0][2].rows, found[1][2].rows
    assert [row.accuracy.validation for row in first] == [row.accuracy.validation for row in second]
    assert [row.accuracy.test for row in first] != [row.accuracy.test for row in second]


# Labels and seeds


def test_two_stages_of_a_kind_have_labels_of_their_own(tiny, tmp_path):
    pipeline = tiny.pipeline(tmp_path, PRUNE, PRUNE)
    assert [stage.label for stage in planned_stages(pipeline)] == ["source", "prune", "prune-2"]
    results, _ = go(pipeline, tmp_path / "runs")
    assert [row.stage for row in results.rows] == ["source", "prune", "prune-2"]
    assert [row.checkpoint.rpartition("-")[0] for row in results.rows] == ["00-source", "01-prune", "02-prune-2"]
    assert results.rows[2].macs < results.rows[1].macs < results.rows[0].macs


@pytest.mark.slow
def test_the_seed_of_the_run_decides_every_model(tiny, tmp_path):
    digests = [
        [row.digest for row in go(tiny.pipeline(tmp_path, TRAIN, seed=seed), tmp_path / f"runs{n}")[0].rows]
        for n, seed in enumerate((0, 1))
    ]
    assert all(one != other for one, other in zip(*digests, strict=True))


def test_a_pipeline_without_stages_measures_the_source(tiny, tmp_path):
    results, recorder = go(tiny.pipeline(tmp_path), tmp_path / "runs")
    assert [row.stage for row in results.rows] == ["source"]
    assert recorder.warnings == []


# The user's code is part of what a result depends on


def moved(tiny, folder):
    """The same small project in another folder."""
    shutil.copytree(tiny.root, folder)
    return type(tiny)(folder)


def test_changed_model_code_redoes_everything_that_was_made_with_it(tiny, tmp_path):
    project = moved(tiny, tmp_path / "project")
    shipped = (TRAIN, EXPORT)
    before, _ = go(project.pipeline(tmp_path, *shipped), tmp_path / "runs")
    code = project.root / "model.py"
    code.write_text(code.read_text().replace("x = self.conv3(x).relu()", "x = self.conv3(x).sigmoid()"))
    after, recorder = go(project.pipeline(tmp_path, *shipped), tmp_path / "runs")
    assert list(recorder.started) == ["source", "train", "export"]
    assert before.artifact.sha256["model.fp32.onnx"] != after.artifact.sha256["model.fp32.onnx"]


def test_a_moved_project_goes_on_from_its_cache(tiny, tmp_path):
    first = moved(tiny, tmp_path / "here")
    results, _ = go(first.pipeline(tmp_path, TRAIN), tmp_path / "runs")
    shutil.move(tmp_path / "here", tmp_path / "there")
    second = type(tiny)(tmp_path / "there")
    again, recorder = go(second.pipeline(tmp_path, TRAIN, PRUNE), tmp_path / "runs")
    assert recorder.cached == ["source", "train"]
    assert [row.digest for row in again.rows[:2]] == [row.digest for row in results.rows]


def test_a_checkpoint_is_not_built_with_code_that_changed_since(tiny, tmp_path):
    project = moved(tiny, tmp_path / "project")
    results, _ = go(project.pipeline(tmp_path, TRAIN), tmp_path / "runs")
    checkpoint = checkpoints.load(folder_of(results, tmp_path / "runs", "train"))
    checkpoint.build({project.factory})
    code = project.root / "model.py"
    code.write_text(code.read_text() + "\n# another day\n")
    with pytest.raises(CheckpointError, match="has changed since this checkpoint was made"):
        checkpoint.build({project.factory})


def test_a_model_that_answers_more_in_training_is_refused_before_training(tiny, tmp_path):
    project = moved(tiny, tmp_path / "project")
    code = project.root / "model.py"
    code.write_text(
        code.read_text()
        + "\nclass Aux(Tiny):\n    def forward(self, x):\n        y = super().forward(x)\n"
        + "        return (y, y) if self.training else y\n"
    )
    pipeline = project.pipeline(tmp_path, TRAIN, model={"factory": project.named("Aux")})
    with pytest.raises(StageError, match="in training mode the forward pass returns a tuple"):
        go(pipeline, tmp_path / "runs")


# Nothing else is lost with the latency, and nothing stale is left


def test_a_model_that_cannot_be_timed_costs_its_latency_only_and_is_tried_again(tiny, tmp_path, monkeypatch):
    real = harness.measure

    def all_but_the_export(variants, config, progress, reference):
        found = real(variants[:1], config, progress, reference)
        setting = {"device": "cpu", "backend": "onnxruntime", "precision": "fp32", "batch_size": 1, "threads": 1}
        missing = NotMeasured(name="export", reason="its process died", **setting)
        return harness.Measured(found.latencies, found.repeats, (missing,))

    pipeline = tiny.pipeline(tmp_path, EXPORT, bench=LATENCY)
    monkeypatch.setattr("compress.outcome.latency.measure", all_but_the_export)
    results, recorder = go(pipeline, tmp_path / "runs")
    (text,) = (text for text in results.warnings if text.startswith("no latency of 'export' in onnxruntime"))
    assert text.endswith(": its process died")
    assert text in recorder.warnings
    assert [bool(row.latency) for row in results.rows] == [True, False]
    assert results.artifact is not None
    assert load_results(tmp_path / "runs/tiny/results.json") == results
    monkeypatch.undo()
    results, _ = go(pipeline, tmp_path / "runs")
    assert all(row.latency for row in results.rows)
    assert not any(text.startswith("no latency") for text in results.warnings)


@pytest.mark.slow
def test_a_model_that_cannot_be_profiled_costs_its_profile_only(tiny, tmp_path, monkeypatch):
    asked = []

    def fails(path, batch_size, threads):
        asked.append((path.name, batch_size, threads))
        raise CompressError("no profile today")

    timing = {"latency": {**LATENCY["latency"], "batch_sizes": [2], "threads": [2, 1]}}
    pipeline = tiny.pipeline(tmp_path, EXPORT, bench=timing)
    monkeypatch.setattr("compress.timed.cores", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr("compress.outcome.profile.profile", fails)
        results, recorder = go(pipeline, tmp_path / "runs")
    # The headline's setting has most threads, wherever they stand.
    assert asked == [("measured.onnx", 2, 2), ("model.fp32.onnx", 2, 2)]
    told = [f"no times per node of '{stage}': no profile today" for stage in ("source", "export")]
    assert list(results.warnings[-2:]) == recorder.warnings[-2:] == told
    assert all(len(row.latency) == 2 for row in results.rows)
    assert load_results(tmp_path / "runs/tiny/results.json") == results
    # What failed is tried again, what did not is kept.
    monkeypatch.setattr("compress.outcome.latency.measure", None)
    again, _ = go(pipeline, tmp_path / "runs")
    assert [row.latency for row in again.rows] == [row.latency for row in results.rows]
    assert all(row.profile.batch_size == row.profile.threads == 2 for row in again.rows)


def test_an_image_that_can_no_longer_be_read_costs_no_results(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise CompressError("no image today")

    monkeypatch.setattr("compress.outcome.changed_samples", fails)
    results, _ = go(tiny.pipeline(tmp_path, EXPORT), tmp_path / "runs")
    assert (results.warnings[-1], results.changed) == ("no images of changed answers: no image today", ())


def test_warnings_that_are_kept_name_no_folder(tiny, tmp_path, monkeypatch):
    """Every file is given by its whole path, and the errors name it."""
    image, found = tiny.root / "data" / "dog" / "3.png", {}

    def unreadable(*_):
        raise DataError(f"data.root: {image} cannot be decoded: image file is truncated")

    def missing(variants, config, progress, reference):
        told = [f"Load model from {variant.path.resolve()} failed" for variant in variants]
        setting = {"device": "cpu", "backend": "onnxruntime", "precision": "fp32", "batch_size": 1, "threads": 1}
        records = [NotMeasured(name=v.name, reason=r, **setting) for v, r in zip(variants, told, strict=True)]
        return harness.Measured({}, (), tuple(records))

    def untimed(path, *_):
        raise CompressError(f"profile of '{path}': no profile today")

    monkeypatch.setattr("compress.outcome.changed_samples", unreadable)
    monkeypatch.setattr("compress.outcome.latency.measure", missing)
    monkeypatch.setattr("compress.outcome.profile.profile", untimed)
    runs = tmp_path / "runs"
    results, _ = go(tiny.pipeline(tmp_path, EXPORT, bench=LATENCY), runs)
    assert "no images of changed answers: data.root: dog/3.png cannot be decoded: image file is truncated" in (
        results.warnings
    )
    assert len([text for text in results.warnings if "/measured.onnx" in text]) == 2
    for name in ("results.json", "report.md", "report.html"):
        found[name] = (runs / "tiny" / name).read_text()
        assert "dog/3.png" in found[name]
        assert not [place for place in (tmp_path, tiny.root, Path.home()) if f"{place}/" in found[name]], name


def test_threads_without_cores_stand_beside_times_old_and_new(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.timed.cores", lambda: 1)
    bench = {"latency": {**LATENCY["latency"], "threads": [2]}}
    pipeline = tiny.pipeline(tmp_path, bench=bench)
    told = "latency was measured with 2 threads on 1 core(s), where the threads wait for each other"
    for _ in range(2):
        results, _ = go(pipeline, tmp_path / "runs")
        assert results.warnings[-1] == told
        assert load_results(tmp_path / "runs/tiny/results.json") == results
        monkeypatch.setattr("compress.outcome.latency.measure", None)  # the second time they are known


@pytest.mark.slow
def test_results_name_the_commit_of_the_pipeline_file(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("compress.outcome.git_revision", lambda folder: asked.append(folder) or "abc+changes")
    folder = tmp_path / "pipelines"
    folder.mkdir()
    pipeline = tiny.pipeline(folder, overrides=["name=other"])
    results, _ = go(pipeline, tmp_path / "runs")
    assert results.git_revision == "abc+changes"
    go(
        type(pipeline).model_validate_json(pipeline.model_dump_json(by_alias=True, exclude_none=True)),
        tmp_path / "runs",
    )  # one that no file holds
    assert asked == [folder, Path()]


def test_dist_belongs_to_the_results_beside_it(tiny, tmp_path):
    pipeline = tiny.pipeline(tmp_path, EXPORT, budget={"accuracy_drop": 0.0})
    go(pipeline, tmp_path / "runs")
    assert (tmp_path / "runs/tiny/dist").is_dir()
    results, _ = go(pipeline, tmp_path / "runs", until="source")
    assert (results.artifact, results.budget) == (None, None)
    assert not (tmp_path / "runs/tiny/dist").exists()
    go(pipeline, tmp_path / "runs")
    assert (tmp_path / "runs/tiny/dist").is_dir()
