"""`compress bench`: targets, options, what is measured of them, and the tables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_examples import (
    example_latency,
    example_machine,
    example_repeat,
    example_results,
)
from rich.console import Console

from compress import cli, load_pipeline
from compress.bench.latency import Measured
from compress.bench.measure import Bench
from compress.bench.measure import measure as measure_checkpoint
from compress.benchmark import BenchSettings, bench
from compress.config import LatencyConfig
from compress.distinct import distinct
from compress.errors import CompressError
from compress.events import Silent
from compress.files import sha256_of
from compress.measured import NotMeasured
from compress.results import BenchResults, Target
from compress.targets import resolve
from compress.terminal.bench import bench_tables
from compress.terminal.console import make_console
from compress.terminal.options import chosen, input_shapes, latency_config, writable
from compress.timed import main_setting
from compress.told import without_folders

ONE_CALL = LatencyConfig(batch_sizes=(1,), threads=(1,), rounds=6, seconds=0.001)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch, one_thread):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


class Recorded(Silent):
    """Remembers notes and warnings."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(scope="session")
def quantized(shared_workshop, trained):
    return shared_workshop.run(trained, "quantize", calibration={"samples": 32})


@pytest.fixture(scope="session")
def models(shared_workshop, trained, quantized, tiny, tmp_path_factory):
    """The trained tiny model and its int8 version: as checkpoints that were measured, and as a run of two rows."""
    folder = tmp_path_factory.mktemp("project")
    bench = Bench(shared_workshop.dataset, "cpu", 1, 32, {tiny.factory}, Silent())
    rows = []
    results = example_results("tiny", stages=("source", "train", "quantize"), classes=shared_workshop.dataset.classes)
    for row, checkpoint in zip(results.rows, (shared_workshop.source(), trained, quantized), strict=True):
        measured = measure_checkpoint(checkpoint, {"data": {}, "seed": 0}, bench)
        shutil.copytree(checkpoint.path, folder / "runs/tiny" / row.checkpoint)
        changed = {
            "digest": checkpoint.digest,
            "sha256": measured.sha256,
            "accuracy": measured.accuracy,
            "quality": measured.quality,
        }
        rows.append(row.model_copy(update=changed))
    run = folder / "runs/tiny"
    results = results.model_copy(update={"rows": tuple(rows)})
    (run / "results.json").write_text(results.model_dump_json())
    (run / "dist").mkdir()
    shutil.copy(run / rows[1].checkpoint / "measured.onnx", run / "dist/model.fp32.onnx")
    shutil.copy(run / rows[2].checkpoint / "model.onnx", run / "dist/model.int8.onnx")
    return folder


@pytest.fixture
def project(models, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(models, tmp_path / "project"))


def checkpoints(project):
    """Source, train, quantize."""
    return sorted((project / "runs/tiny").glob("0*"))


@pytest.fixture
def untimed(monkeypatch):
    """Latency is what this says, and takes no time; the variants it was asked for."""
    asked = []

    def measure(variants, config, progress, reference=None):
        progress.work("latency", 1, 1)
        asked.append((variants, config, reference))
        return Measured({variant.name: (example_latency(2.0),) for variant in variants}, (), ())

    monkeypatch.setattr("compress.bench.latency.measure", measure)
    return asked


def tables(results, width=None):
    console = make_console() if width is None else Console(width=width, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(bench_tables(results))
    return capture.get()


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_as_short_as_they_can_be():
    places = [("r", "a", "prune"), ("r", "b", "prune"), ("r", "b", "train"), ("r", "b", "train"), ("net",)]
    assert distinct(places) == ["a/prune", "b/prune", "train", "train (2)", "net"]
    assert distinct([("a", "x", "m"), ("b", "x", "m"), ("m",)]) == ["a/x/m", "b/x/m", "m"]
    assert distinct([]) == []


@given(st.lists(st.lists(st.sampled_from(["a", "b", "a (2)"]), min_size=1, max_size=4).map(tuple), max_size=8))
def test_names_differ_and_end_a_place(places):
    names = distinct(places)
    assert len(set(names)) == len(places)
    for name, place in zip(names, places, strict=True):
        assert "/".join(place).endswith(re.sub(r"( \(\d+\))?$", "", name)) or "/".join(place).endswith(name)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_run_is_all_its_rows_the_reference_first(models, tmp_path):
    progress = Recorded()
    found = resolve([models / "runs/tiny"], tmp_path, progress, trust_code=False)
    assert [model.name for model in found] == ["train", "source", "quantize"]
    assert [model.path.name for model in found] == ["measured.onnx", "measured.onnx", "model.onnx"]
    assert [model.row.stage for model in found] == ["train", "source", "quantize"]
    assert all(sha256_of(model.path) == model.row.sha256 for model in found)
    assert progress.notes == []
    assert not any(model.trusted for model in found)


def test_files_folders_and_checkpoints_together(models, tmp_path):
    run = models / "runs/tiny"
    targets = [run / "dist/model.int8.onnx", run / "dist", checkpoints(models)[2], run]
    names = [model.name for model in resolve(targets, tmp_path, Silent(), trust_code=False)]
    assert names[:4] == ["model.int8", "model.fp32", "model.int8 (2)", f"{checkpoints(models)[2].name}/quantize"]
    assert names[4:] == ["train", "source", "tiny/quantize"]


def test_a_float_checkpoint_that_was_never_measured_is_converted(project, tiny, tmp_path):
    checkpoint = checkpoints(project)[1]
    whole = (checkpoint / "measured.onnx").read_bytes()
    (checkpoint / "metrics.json").unlink()  # whose file it is, nobody knows now
    with pytest.raises(
        CompressError, match=r"holds no ONNX file, and its model is made by '.*model.py:make', which is code; "
    ):
        resolve([checkpoint], tmp_path, Silent(), trust_code=False)
    progress = Recorded()
    (model,) = resolve([checkpoint], tmp_path, progress, trust_code=True)
    assert model.path.is_relative_to(tmp_path)
    assert model.path.read_bytes() == whole
    assert model.trusted == {tiny.factory}
    assert progress.notes == ["converting 'train' to ONNX"]


def test_another_file_beside_a_checkpoint_is_not_taken_for_its_own(project, tmp_path):
    checkpoint = checkpoints(project)[1]
    (checkpoint / "measured.onnx").write_bytes(b"spoilt")
    (model,) = resolve([checkpoint], tmp_path, Silent(), trust_code=True)
    assert model.path.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nope.onnx", "nope.onnx: no such file or folder"),
        ("runs/tiny/dist/model.int9.onnx", "no such file or folder; did you mean 'model.int8.onnx'?"),
        ("runs/tinny", "runs/tinny: no such file or folder; did you mean 'tiny'?"),
        ("runs/tiny/results.json", "is no model; did you mean its folder, '"),
        ("notes.txt", "notes.txt: is no .onnx file; a target is an .onnx file, a checkpoint, a run, or a folder of"),
        ("runs", "holds nothing to measure; in it are tiny; a target is"),
        ("empty", "empty: holds nothing to measure; a target is"),
    ],
)
def test_what_is_no_target_is_one_message(project, tmp_path, target, message):
    (project / "notes.txt").write_text("x")
    (project / "empty").mkdir()
    with pytest.raises(CompressError) as caught:
        resolve([project / target], tmp_path, Silent(), trust_code=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_whose_checkpoints_are_gone_or_others_is_refused(project, tmp_path):
    source, train, _ = checkpoints(project)
    shutil.rmtree(source)
    with pytest.raises(CompressError, match=r"the checkpoint of 'source' is not there any more \(00-source-0123abcd\)"):
        resolve([project / "runs/tiny"], tmp_path, Silent(), trust_code=False)
    shutil.copytree(train, source)
    with pytest.raises(CompressError, match=r"is not the checkpoint that .*results\.json was written of"):
        resolve([project / "runs/tiny"], tmp_path, Silent(), trust_code=False)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_run_brings_its_accuracy_and_its_comparisons(models, untimed):
    results = bench([models / "runs/tiny"], BenchSettings(ONE_CALL, with_profile=False, command="c"), Silent())
    train, source, quantize = results.targets
    rows = {row.stage: row for row in example_rows(models)}
    assert [target.name for target in results.targets] == ["train", "source", "quantize"]
    assert train.accuracy == rows["train"].accuracy
    assert train.quality.test.f1 == rows["train"].quality.test.f1
    for split in (train.quality.validation, train.quality.test, quantize.quality.test):
        assert split.samples_per_second is None  # timed when the run was
    assert (train.comparison, source.comparison) == (None, None)
    assert quantize.comparison == rows["quantize"].comparison
    assert (train.precision, quantize.precision) == ("fp32", "int8")
    assert quantize.size.size_bytes < train.size.size_bytes
    assert (results.rounds, results.seconds, results.command) == (6, 0.001, "c")
    assert results.machine.python == sys.version.split()[0]
    ((variants, config, reference),) = untimed
    assert (config, reference) == (ONE_CALL, "train")
    assert [variant.checkpoint.name[:2] for variant in variants] == ["01", "00", "02"]


def example_rows(models):
    from compress.results import load_results

    return load_results(models / "runs/tiny/results.json").rows


def test_a_run_behind_another_target_is_compared_with_nothing(models, untimed):
    first = models / "runs/tiny/dist/model.int8.onnx"
    results = bench([first, models / "runs/tiny"], BenchSettings(ONE_CALL, with_profile=False), Silent())
    assert all(target.comparison is None for target in results.targets)
    assert [target.accuracy is None for target in results.targets] == [True, False, False, False]


@pytest.mark.parametrize(("device", "halves"), [("cpu", []), ("cuda", ["fp16", "bf16"])])
def test_variants_of_every_backend_are_asked_for(models, untimed, tiny, device, halves):
    targets = [checkpoints(models)[1], checkpoints(models)[2], models / "runs/tiny/dist/model.fp32.onnx"]
    settings = BenchSettings(ONE_CALL, device, ("onnxruntime", "torch"), trust_code=True)
    results = bench(targets, settings, Silent())
    variants = untimed[0][0]
    assert [(v.name, v.backend, v.compute) for v in variants] == [
        ("train", "onnxruntime", ""),
        ("train", "torch", ""),
        *(("train", "torch", half) for half in halves),
        ("quantize", "onnxruntime", ""),
        ("quantize", "torch", ""),
        ("model.fp32", "onnxruntime", ""),
        ("model.fp32", "torch", ""),
    ]
    assert all(v.device == device for v in variants)
    assert variants[1].trusted == {tiny.factory}
    assert variants[-1].checkpoint is None
    assert all((target.profile is None) == (device == "cuda") for target in results.targets)


def test_accuracy_is_measured_on_the_data_of_a_pipeline(models, untimed, tiny, tmp_path, trained, quantized):
    pipeline = tiny.pipeline(tmp_path)
    run = models / "runs/tiny"
    settings = BenchSettings(ONE_CALL, pipeline=pipeline, with_profile=False)
    results = bench([run / "dist/model.fp32.onnx", run / "dist/model.int8.onnx"], settings, Silent())
    rows = {row.stage: row for row in example_rows(models)}
    first, second = results.targets
    assert first.accuracy == rows["train"].accuracy
    assert second.accuracy == rows["quantize"].accuracy
    assert second.quality.validation.f1 == pytest.approx(rows["quantize"].quality.validation.f1)
    assert first.comparison is None
    n = second.accuracy.validation.n
    assert second.comparison.validation.points == pytest.approx(
        100 * (second.accuracy.validation.correct - first.accuracy.validation.correct) / n
    )
    assert 0 < second.comparison.test.agreement <= 100


def test_files_that_cannot_answer_the_data_are_measured_all_the_same(models, untimed, tiny, tmp_path):
    file = models / "runs/tiny/dist/model.fp32.onnx"
    other = onnx.load(file)
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7
    del other.graph.value_info[:]
    onnx.save(other, "other.onnx")
    progress = Recorded()
    settings = BenchSettings(ONE_CALL, pipeline=tiny.pipeline(tmp_path), with_profile=False)
    results = bench([Path("other.onnx"), file], settings, progress)
    assert [target.accuracy is None for target in results.targets] == [True, False]
    assert results.targets[1].comparison is None
    (warning,) = results.warnings
    assert progress.warnings == [warning]
    assert warning.startswith("no accuracy of 'other': other.onnx: does not run on the data's inputs: ")


def test_a_checkpoint_made_for_other_data_is_doubted(models, untimed, tiny, tmp_path):
    pipeline = tiny.pipeline(tmp_path, data={**tiny.data, "normalize": {"mean": [0.1], "std": [0.9]}})
    settings = BenchSettings(ONE_CALL, pipeline=pipeline, with_profile=False)
    results = bench([checkpoints(models)[1]], settings, Silent())
    assert results.warnings == (
        "'train' was made for inputs normalised otherwise than this data has: its accuracy here says little",
    )
    assert results.targets[0].accuracy is not None


def test_a_file_that_is_no_model_ends_it_before_anything_is_timed(untimed):
    Path("bad.onnx").write_bytes(b"bad")
    with pytest.raises(CompressError, match=r"^bad\.onnx: is no ONNX file"):
        bench([Path("bad.onnx")], BenchSettings(ONE_CALL), Silent())
    assert untimed == []


def test_a_profile_that_fails_is_a_warning(models, untimed, monkeypatch):
    def fails(*args, **options):
        raise CompressError("no time")

    monkeypatch.setattr("compress.bench.profile.profile", fails)
    results = bench([models / "runs/tiny/dist"], BenchSettings(ONE_CALL), Silent())
    assert results.warnings == tuple(f"no times per node of '{name}': no time" for name in ("model.fp32", "model.int8"))


def test_nodes_are_timed_in_the_main_setting(models, untimed, monkeypatch):
    asked = []

    def refuse(path, batch_size, threads, **_):
        asked.append((batch_size, threads))
        raise CompressError("not today")

    monkeypatch.setattr("compress.bench.profile.profile", refuse)
    monkeypatch.setattr("compress.timed.cores", lambda: 2)
    config = LatencyConfig(batch_sizes=(8, 1, 32), threads=(1, 2), rounds=6, seconds=0.001)
    bench([models / "runs/tiny/dist/model.fp32.onnx"], BenchSettings(config), Silent())
    assert asked == [(1, 2)] == [main_setting(config)]
    # More threads than cores wait for each other: they are shown first only where there is nothing else, the fewest.
    assert main_setting(LatencyConfig(batch_sizes=(4,), threads=(3, 2))) == (4, 2)
    assert main_setting(LatencyConfig(batch_sizes=(4,), threads=(4, 3))) == (4, 3)


def test_no_times_per_node_on_cuda_are_told_where_they_were_asked_for(models, untimed):
    target, told = models / "runs/tiny/dist/model.fp32.onnx", "time by operator is measured on the CPU only"
    assert bench([target], BenchSettings(ONE_CALL, "cuda"), Silent()).warnings == (told,)
    assert bench([target], BenchSettings(ONE_CALL, "cuda", with_profile=False), Silent()).warnings == ()


def test_what_latency_warns_of_is_kept(models, monkeypatch):
    def measure(variants, config, progress, reference=None):
        progress.warn("too noisy")
        progress.note("only told")
        return Measured({variant.name: () for variant in variants}, (), ())

    monkeypatch.setattr("compress.bench.latency.measure", measure)
    progress = Recorded()
    target = models / "runs/tiny/dist/model.fp32.onnx"
    results = bench([target], BenchSettings(ONE_CALL, with_profile=False), progress)
    assert results.warnings == ("too noisy",)
    assert progress.warnings == ["too noisy"]
    assert progress.notes[-1] == "only told"


def test_results_name_no_folder(models, project, tiny, tmp_path, monkeypatch):
    """Everything is given by its whole path, and nothing can be measured."""
    folder = tmp_path / "secret place"
    folder.mkdir()
    other = onnx.load(models / "runs/tiny/dist/model.fp32.onnx")
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7
    del other.graph.value_info[:]
    onnx.save(other, folder / "other.onnx")
    checkpoint = checkpoints(project)[1]
    (checkpoint / "measured.onnx").unlink()  # is converted, into a scratch folder

    def measure(variants, config, progress, reference=None):
        setting = {"device": "cpu", "backend": "onnxruntime", "precision": "fp32", "batch_size": 1, "threads": 1}
        told = [f"Load model from {one.path.resolve()} (of {one.checkpoint}) failed" for one in variants]
        records = [NotMeasured(name=v.name, reason=r, **setting) for v, r in zip(variants, told, strict=True)]
        return Measured({variant.name: () for variant in variants}, (), tuple(records))

    def refuse(path, *_, **__):
        raise CompressError(f"profile of '{path}': no")

    monkeypatch.setattr("compress.bench.latency.measure", measure)
    monkeypatch.setattr("compress.bench.profile.profile", refuse)
    pipeline = tiny.pipeline(tmp_path, data={**tiny.data, "classes": ["a", "b", "c", "d"]})
    settings = BenchSettings(ONE_CALL, pipeline=pipeline, trust_code=True)
    results = bench([folder / "other.onnx", checkpoint.absolute()], settings, Silent())
    first, second, *profiles = results.warnings
    assert first.startswith("no accuracy of 'other': other.onnx: does not run on the data's inputs: ")
    assert second.startswith("'train' was made for other classes")
    assert profiles == [
        "no times per node of 'other': profile of 'other.onnx': no",
        "no times per node of 'train': profile of 'measured.onnx': no",
    ]
    assert [one.reason for one in results.missing] == [
        "Load model from other.onnx (of None) failed",
        f"Load model from measured.onnx (of {checkpoint.name}) failed",
    ]
    content = results.model_dump_json()
    places = (tmp_path, tiny.root, Path.home(), Path(tempfile.gettempdir()))
    assert not [place for place in places if str(place) in content]


def test_folders_are_taken_out_of_messages_and_nothing_else():
    here, home, temporary = Path.cwd(), Path.home(), Path(tempfile.gettempdir())
    for text, places, expected in (
        (f"{here}/a/x.onnx: bad", (), "a/x.onnx: bad"),
        (f"{here}/a/x.onnx: bad", (Path("a/x.onnx"),), "x.onnx: bad"),
        ("a/x.onnx: bad at a/x.onnx", (Path("a/x.onnx"),), "x.onnx: bad at x.onnx"),
        ("../b c/x.onnx: bad", (Path("../b c/x.onnx"),), "x.onnx: bad"),
        ("'/srv/m/x.onnx' of /srv/m/y/z", (Path("/srv/m/x.onnx"),), "'x.onnx' of y/z"),
        (f"{home}/x and {temporary}/y", (), "x and y"),
        ("node '/conv1/Conv' of shape 3/4, /other/srv/m/z", (Path("/srv/m/x"), Path("x")), None),
        ("x.onnx is not /x.onnx", (Path("/x.onnx"), Path("x.onnx")), None),
    ):
        assert without_folders(text, places) == (text if expected is None else expected)


# --- shapes of open inputs -------------------------------------------------------------------------------------------


def write_sum(path, **inputs):
    """A network that adds its inputs, each (n, …), which it leaves open as far as they are names."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    # What older files do: a constant that is an input as well.
    constant = onnx.helper.make_tensor("bias", onnx.TensorProto.FLOAT, [1], [1.0])
    values.append(onnx.helper.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, [1]))
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node("Sum", [*inputs, "bias"], ["out"], name="/sum")
    graph = onnx.helper.make_graph([node], "sum", values, [out], initializer=[constant])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return Path(path)


def test_shapes_reach_the_models_that_have_such_an_input(untimed, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "compress.bench.profile.profile", lambda path, *_, shapes: asked.append((path.name, shapes)) or None
    )
    one = write_sum("one.onnx", image=["n", 3, "h", "w"])
    two = write_sum("two.onnx", image=["n", 3, "h", "w"], mask=["n", 1, "h", "w"])
    other = write_sum("other.onnx", tokens=["n", "t"])
    shapes = {"image": (3, 5, 4), "mask": (1, 5, 4), "": (7,)}
    bench([one, two, other], BenchSettings(ONE_CALL, shapes=shapes), Silent())
    expected = [
        ("one.onnx", {"image": (3, 5, 4)}),  # by its name rather than as the only one
        ("two.onnx", {"image": (3, 5, 4), "mask": (1, 5, 4)}),
        ("other.onnx", {"tokens": (7,)}),
    ]
    assert asked == expected
    assert [(variant.path.name, variant.shapes) for variant in untimed[0][0]] == expected


def test_a_shape_that_no_model_takes_is_an_error(untimed):
    two = write_sum("two.onnx", image=["n", "h"], mask=["n", "h"])
    with pytest.raises(CompressError) as caught:
        bench([two], BenchSettings(ONE_CALL, shapes={"imgae": (3,)}), Silent())
    assert str(caught.value) == (
        "--shape: no model has an input 'imgae' (there are image, mask); did you mean 'image'?"
    )
    with pytest.raises(CompressError) as caught:
        bench([two], BenchSettings(ONE_CALL, shapes={"": (3,)}), Silent())
    assert str(caught.value) == "--shape: no model has one input only: name it (there are image, mask)"
    assert untimed == []


# --- tables ----------------------------------------------------------------------------------------------------------


def example_bench(**changes):
    """Two models in two settings."""
    rows = example_results("digits", stages=("source", "train", "export")).rows[1:]
    targets = [
        Target(
            name=name,
            file=f"{name}.onnx",
            sha256="a" * 64,
            precision=row.precision,
            size=row.size,
            accuracy=row.accuracy,
            quality=row.quality,
            comparison=row.comparison,
            latency=row.latency,
            profile=row.profile,
        )
        for name, row in zip(("resnet56", "resnet56-int8"), rows, strict=True)
    ]
    content = {
        "created": "2026-07-01T12:00:00Z",
        "command": "compress bench",
        "git_revision": None,
        "machine": example_machine(),
        "rounds": 10,
        "seconds": 0.05,
        "targets": targets,
        "repeats": [example_repeat("resnet56", 1, 1), example_repeat("resnet56", 1, 2, is_noisy=True)],
    }
    return BenchResults(**{**content, **changes})


def missing(name, backend="openvino", threads=1, reason="openvino is not installed"):
    return NotMeasured(
        name=name, device="cpu", backend=backend, precision="fp32", batch_size=1, threads=threads, reason=reason
    )


def test_tables_show_every_figure():
    shown = tables(example_bench())
    for text in (
        "Latency: cpu, batch 1, 1 thread, onnxruntime",
        "Latency: cpu, batch 1, 2 threads, onnxruntime",
        "2.31 [2.27, 2.36]",
        "7.25 [7.11, 7.40]",
        "resnet56 fp32 against itself in onnxruntime: 1.005× (0.993 to 1.017)",
        "23.03",
        "148,702",
        "98.33 [96.4, 99.2]",
        "−0.56 [−1.64, +0.53]",
        "90 %",
        "16 QLinearConv",
    ):
        assert text in shown, text
    assert shown.count("caution: this machine was too noisy") == 1
    assert shown.count("first") >= 4


def test_tables_of_few_settings_fit_a_terminal_and_cut_nothing():
    results = example_bench()
    narrow, wide = tables(results, 100), tables(results)
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 100
    for line in wide.splitlines():
        assert all(figure in narrow for figure in re.findall(r"\S*\d\.\d+\S*", line)), line


def test_what_is_missing_is_a_row_and_below_it_the_reason():
    reasons = [missing(name, threads=threads) for name in ("resnet56", "resnet56-int8") for threads in (1, 2)]
    reasons += [missing("resnet56-int8", "torch", 2, "PyTorch runs\x07 checkpoints")]
    lines = tables(example_bench(missing=tuple(reasons))).splitlines()
    dashes = [line.split() for line in lines if line.split()[:1] and line.split()[-1] == "—" and "openvino" in line]
    assert [row[0] for row in dashes] == ["resnet56", "resnet56-int8"] * 2
    told = [line for line in lines if line.startswith("— ")]
    assert told == [
        "— openvino on cpu, all models: openvino is not installed",
        "— torch on cpu, resnet56-int8 (cpu, batch 1, 2 threads): PyTorch runs� checkpoints",
    ]


def test_tables_of_bare_files_have_no_empty_parts():
    bare = [
        target.model_copy(
            update={"accuracy": None, "quality": None, "comparison": None, "profile": None, "latency": ()}
        )
        for target in example_bench().targets
    ]
    shown = tables(example_bench(targets=tuple(bare), repeats=()))
    assert shown.splitlines()[0].strip() == "Size"
    for heading in ("Accuracy", "Time by operator", "Latency"):
        assert heading not in shown


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_are_read():
    config = latency_config("1,8, 32,8", "2", 7, 0.5)
    assert (config.batch_sizes, config.threads, config.rounds, config.seconds) == ((1, 8, 32), (2,), 7, 0.5)
    assert chosen("torch, openvino,torch", ("torch", "openvino"), "--backend") == ("torch", "openvino")
    assert input_shapes(["3x224x224", "a=b=5", "x=1x2"]) == {"": (3, 224, 224), "a=b": (5,), "x": (1, 2)}
    writable(None, "--json")
    writable(Path("new/folder/file.json"), "--json")
    Path("there.json").write_text("old")
    writable(Path("there.json"), "--json")
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("there.json", "old")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threads", "0"), "--threads: must be greater than or equal to 1, got 0"),
        (("--batch-size", "1,-8"), "--batch-size: must be greater than or equal to 1, got -8"),
        (
            ("--batch-size", "1,x"),
            "--batch-size: must be whole numbers with commas between them, such as 1,8,32, got '1,x'",
        ),
        (("--threads", ""), "--threads: must be whole numbers with commas between them, such as 1,8,32, got ''"),
        (("--rounds", "5"), "--rounds: must be greater than or equal to 6, got 5"),
        (("--seconds", "0"), "--seconds: must be greater than 0, got 0.0"),
        (("--seconds", "nan"), "--seconds: must be a finite number, got nan"),
        (
            ("--backend", "onnxrutime"),
            "--backend: there is no 'onnxrutime' (there are onnxruntime, torch, torch-compile, ",
        ),
        (("--backend", "onnxrutime"), "did you mean 'onnxruntime'?"),
        (("--backend", ""), "--backend: there is no ''"),
        (("--device", "gpu"), "--device: there is no 'gpu' (there are cpu, cuda)"),
        (("--json", "."), "--json .: is a folder; name a file in it"),
        (("--json", f"{'x' * 300}.json"), ": cannot be written: File name too long"),
        (("--json", "/dev/null"), "--json /dev/null: is no ordinary file, and would be replaced by one"),
        (
            ("--shape", "3x-1"),
            "where a file has several, such as 3x224x224 or image=3x224x224, got '3x-1'",
        ),
        (("--shape", "image="), "got 'image='"),
        (("--shape", "=3x2"), "got '=3x2'"),
        (("--shape", "3x0x2"), "got '3x0x2'"),
        (("--shape", "image=3,224"), "got 'image=3,224'"),
        (("--shape", "a=3", "--shape", "a=4"), "--shape: input 'a' has two shapes"),
        (("--shape", "3", "--shape", "4"), "--shape: the only input has two shapes"),
        (("--set", "seed=1"), "--set: changes the file of --pipeline, which is not given"),
        (("--pipeline", "nope.yaml"), "nope.yaml: no such file"),
    ],
)
def test_bad_options_are_one_message(command, words, message):
    code, out, err = command("x.onnx", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["compress", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return command


def test_two_files_end_to_end(command, models):
    """Really timed: processes, the repeat, the profile, JSON."""
    dist = models / "runs/tiny/dist"
    quick = ("--rounds", 6, "--seconds", 0.001, "--threads", 1, "--batch-size", "1,4", "--json", "out/bench.json")
    code, out, err = command(dist / "model.fp32.onnx", dist / "model.int8.onnx", *quick)
    assert code == 0
    assert "latency of all models" in err
    results = BenchResults.model_validate_json(Path("out/bench.json").read_text())
    assert results.command == (
        "compress bench model.fp32.onnx model.int8.onnx --batch-size 1,4 --threads 1 --rounds 6 --seconds 0.001"
    )
    assert [target.name for target in results.targets] == ["model.fp32", "model.int8"]
    assert [(one.batch_size, one.threads) for one in results.targets[1].latency] == [(1, 1), (4, 1)]
    assert {one.ratio.against for one in results.targets[1].latency} == {"model.fp32"}
    assert [repeat.name for repeat in results.repeats] == ["model.fp32"] * 2
    assert all(target.profile.nodes for target in results.targets)
    assert "Latency: cpu, batch 4, 1 thread, onnxruntime" in out
    assert out.endswith("json: out/bench.json\n")
    assert "latency of all models" not in out  # what is piped on is tables


def test_open_shapes_end_to_end(command):
    """Really timed: without the option nothing can be measured, with it both latency and nodes are."""
    file = write_sum("sum.onnx", image=["n", 3, "h", "w"])
    quick = ("--rounds", 6, "--seconds", 0.001, "--threads", 1, "--batch-size", 2, "--json", "b.json")
    assert command(file, "--no-profile", *quick)[0] == 1
    code, _, err = command(file, "--shape", "3x5x4", *quick)
    assert code == 0, err
    results = BenchResults.model_validate_json(Path("b.json").read_text())
    (target,) = results.targets
    assert len(target.latency) == 1
    assert [node.operator for node in target.profile.nodes] == ["Sum"]
    assert "--shape 3x5x4" in results.command


def test_what_was_measured_is_on_disk_before_it_is_shown(command, monkeypatch):
    def broken(results):
        raise CompressError("the pipe is closed")

    monkeypatch.setattr("compress.benchmark.bench", lambda *_: example_bench())
    monkeypatch.setattr("compress.terminal.bench.bench_tables", broken)
    assert command("a.onnx", "--json", "b.json") == (2, "", "error: the pipe is closed\n")
    assert BenchResults.model_validate_json(Path("b.json").read_text()) == example_bench()


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_of_the_first_line_costs_no_results(models):
    """`compress bench … --json FILE | head -1`, its end of the pipe closed before anything is measured."""
    file = models / "runs/tiny/dist/model.fp32.onnx"
    words = ("--rounds", "6", "--seconds", "0.001", "--threads", "1", "--no-profile", "--json", "b.json")
    with subprocess.Popen(
        [sys.executable, "-m", "compress", "bench", file, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        child.stdout.close()
        err = child.stderr.read()
        child.wait(timeout=100)
    assert "Traceback" not in err
    (target,) = BenchResults.model_validate_json(Path("b.json").read_text()).targets
    assert target.latency


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(command, monkeypatch):
    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr("compress.benchmark.bench", never)
    if Path("/proc/self").exists():
        code, out, err = command("a.onnx", "--json", "/proc/x.json")
        assert (code, out) == (2, "")
        assert err.startswith("error: --json /proc/x.json: cannot be written: ")
    Path("file").write_text("")
    code, _, err = command("a.onnx", "--json", "file/x.json")
    assert (code, err) == (2, "error: --json file/x.json: cannot be written there: file is not a folder\n")


def test_what_cannot_be_measured_is_a_row_and_where_that_is_all_code_1(command, models):
    """PyTorch really started on a checkpoint whose code is not trusted."""
    words = (
        "--backend",
        "torch",
        "--rounds",
        6,
        "--seconds",
        0.001,
        "--threads",
        1,
        "--no-profile",
        "--json",
        "b.json",
    )
    code, out, err = command(checkpoints(models)[1], *words)
    assert code == 1
    assert err.endswith("nothing measured: no model has a latency in any setting; the reasons stand above\n")
    assert re.search(r"^— torch on cpu, all models: .*model\.py:make.*--trust-code", out, re.MULTILINE)
    (target,) = json.loads(Path("b.json").read_text())["targets"]
    assert target["latency"] == []


def test_an_interrupt_is_code_130(command, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.benchmark.bench", stopped)
    code, _, err = command("x.onnx")
    assert (code, err) == (130, "\nstopped; nothing was kept\n")


def test_no_target_is_code_2(command):
    code, _, err = command()
    assert code == 2
    assert "Missing argument 'TARGET...'" in err


def test_pipeline_and_overrides_reach_the_measurement(command, monkeypatch, models, tiny, tmp_path):
    asked = []

    def record(targets, settings, progress):
        asked.append((targets, settings))
        return example_bench()

    tiny.pipeline(tmp_path)
    monkeypatch.setattr("compress.benchmark.bench", record)
    code, _, err = command(
        "a.onnx",
        "b.onnx",
        "--pipeline",
        tmp_path / "pipeline.yaml",
        "--set",
        "seed=3",
        "--device",
        "cuda",
        "--shape",
        "x=3x4",
        "--no-profile",
    )
    assert (code, err) == (0, "")
    ((targets, settings),) = asked
    assert targets == [Path("a.onnx"), Path("b.onnx")]
    assert settings.pipeline == load_pipeline(tmp_path / "pipeline.yaml", ("seed=3",))
    assert settings.device == "cuda"
    assert settings.shapes == {"x": (3, 4)}
    assert settings.command == (
        "compress bench a.onnx b.onnx --device cuda --shape x=3x4 --pipeline pipeline.yaml --set seed=3 --no-profile"
    )
