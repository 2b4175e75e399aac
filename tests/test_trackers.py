"""Trackers hear the epochs that the results keep, change nothing, and are asked for before anything runs if they are missing."""

import importlib.machinery
import importlib.util
import json
import sys
import tomllib
import types
from pathlib import Path
from typing import get_args

import pytest
from training_cases import Recorder, Trainer, linear, vectors

import compress
from compress import run
from compress.config import Pipeline
from compress.errors import ConfigError
from compress.plan import Keys, planned_stages
from compress.provenance import closure
from compress.requirements import unmet
from compress.training.trackers import tracked

pytestmark = pytest.mark.usefixtures("one_thread")

SHOWN = ("loss", "learning_rate", "validation_loss", "validation_percent", "seconds", "samples_per_second")
TRAIN = {"train": {"epochs": 2, "batch_size": 16}}


@pytest.fixture
def wandb(monkeypatch):
    """A package called wandb that keeps what it is told."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)  # what makes it count as installed
    module.started, module.logged, module.finished, module.settings = [], [], 0, {}

    class Run:
        def log(self, values, step):
            if module.broken:
                raise ConnectionError("no network\nand more")
            module.logged.append((step, values))

        def finish(self):
            module.finished += 1

    def init(**options):
        module.started.append(options)
        return Run()

    module.init, module.broken = init, False
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change: module.settings.update(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train_with(trackers, folder, recorder, *, model=None, **settings):
    with tracked(trackers, "tiny", "train-0123", folder / "trackers", TRAIN, recorder) as progress:
        return Trainer(folder, vectors())(model or linear(), progress=progress, **settings)


def test_a_tracker_gets_the_numbers_of_the_rows(wandb, tmp_path):
    recorder = Recorder()
    rows = train_with(["wandb"], tmp_path, recorder, epochs=3)
    assert wandb.started == [
        {
            "project": "tiny",
            "name": "train-0123",
            "id": "tiny-train-0123",
            "dir": str(tmp_path / "trackers"),
            "resume": "allow",
        }
    ]
    assert (tmp_path / "trackers").is_dir()
    assert [step for step, _ in wandb.logged] == [1, 2, 3]
    for row, (_, values), result in zip(rows, wandb.logged, recorder.epochs, strict=True):
        assert values == {name: getattr(result, name) for name in SHOWN}
        assert {name: row[name] for name in row if name != "epoch"}.items() <= values.items()
    assert wandb.settings == {"train.epochs": 2, "train.batch_size": 16}
    assert wandb.finished == 1


def test_nothing_of_the_progress_is_lost(wandb, tmp_path):
    recorder = Recorder()
    with tracked(["wandb"], "tiny", "x", tmp_path, {}, recorder) as progress:
        progress.stage_started("x", 1, 2, "why")
        progress.stage_cached("x", 1, 2)
        progress.stage_finished("x", 1.0, "done")
        progress.work("w", 1, 2, "d")
        progress.note("n")
        progress.warn("w")
    assert (recorder.work_done, recorder.notes, recorder.warnings) == ([("w", 1, 2, "d")], ["n"], ["w"])


def test_a_stage_without_epochs_starts_no_run(wandb, tmp_path):
    with tracked(["wandb"], "tiny", "quantize-1", tmp_path / "trackers", {}, Recorder()):
        pass
    assert wandb.started == []
    assert not (tmp_path / "trackers").exists()


def test_a_tracker_that_fails_is_given_up_and_training_goes_on(wandb, tmp_path):
    recorder, wandb.broken = Recorder(), True
    rows = train_with(["wandb"], tmp_path, recorder, epochs=3)
    assert len(rows) == len(recorder.epochs) == 3
    assert recorder.warnings == ["wandb failed and gets no more epochs: no network"]
    assert wandb.finished == 1


def test_a_tracker_is_closed_when_training_fails(wandb, tmp_path):
    def then(result):
        if result.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with(["wandb"], tmp_path, Recorder(then), epochs=3)
    assert wandb.finished == 1


def test_without_trackers_the_progress_is_the_same_object(tmp_path):
    recorder = Recorder()
    with tracked([], "tiny", "x", tmp_path, {}, recorder) as progress:
        assert progress is recorder


@pytest.fixture
def mlflow(monkeypatch):
    """A package called mlflow that keeps what it is told."""
    module = types.ModuleType("mlflow")
    module.uris, module.logged, module.runs = [], [], []
    module.set_tracking_uri = module.uris.append
    module.search_experiments = lambda filter_string: []
    module.create_experiment = lambda name, artifact_location, tags: (name, artifact_location)
    module.start_run = lambda **options: module.runs.append(options)
    module.log_params = module.logged.append
    module.log_metrics = lambda values, step: module.logged.append((step, values))
    module.end_run = lambda: module.runs.append("end")
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = types.SimpleNamespace(validation=limits)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return module


def test_mlflow_writes_under_the_run_unless_told_otherwise(mlflow, tmp_path, monkeypatch):
    rows = train_with(["mlflow"], tmp_path, Recorder())
    assert mlflow.uris == [f"sqlite:///{tmp_path / 'trackers' / 'mlflow.db'}"]
    assert mlflow.runs[0]["run_name"] == "train-0123"
    assert mlflow.runs[0]["experiment_id"] == ("tiny", (tmp_path / "trackers" / "mlflow").as_uri())
    assert mlflow.runs[-1] == "end"
    parameters, *epochs = mlflow.logged
    assert parameters == {"train.epochs": 2, "train.batch_size": 16}
    assert [(step, values["loss"]) for step, values in epochs] == [(row["epoch"], row["loss"]) for row in rows]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    train_with(["mlflow"], tmp_path, Recorder())
    assert len(mlflow.uris) == 1


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_the_rows_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train_with(["tensorboard"], tmp_path, Recorder(), epochs=3)
    read = EventAccumulator(str(tmp_path / "trackers" / "tensorboard" / "train-0123")).Reload()
    found = [(event.step, event.value) for event in read.Scalars("validation_loss")]
    assert found == [(row["epoch"], pytest.approx(row["validation_loss"])) for row in rows]


@pytest.mark.slow
def test_a_run_logs_each_of_its_trainings(wandb, tiny, tmp_path):
    prune = {"prune": {"target": {"macs": 0.7}, "recovery": {"epochs": 1, "batch_size": 16}}}
    pipeline = tiny.pipeline(tmp_path, TRAIN, prune, trackers=["wandb"])
    results = run(pipeline, runs=tmp_path / "runs")
    assert [each["project"] for each in wandb.started] == ["tiny", "tiny"]
    assert [each["name"].rpartition("-")[0] for each in wandb.started] == ["train", "prune"]
    kept = [(epoch.epoch, epoch.validation_loss) for row in results.rows for epoch in row.training]
    assert [(step, values["validation_loss"]) for step, values in wandb.logged] == kept
    assert len(kept) == 3


# What is missing


def test_a_run_with_a_missing_package_ends_before_anything_is_made(tiny, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "mlflow" else found(name, *rest)
    )
    pipeline = tiny.pipeline(tmp_path, TRAIN, trackers=["mlflow"])
    with pytest.raises(ConfigError, match=r"pipeline.yaml:\d+: trackers.0: 'mlflow' is not installed: pip install"):
        run(pipeline, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def pipeline_of(tiny, **settings):
    document = {"name": "tiny", "data": tiny.data, "model": {"factory": tiny.factory}, "stages": [TRAIN], **settings}
    return Pipeline.model_validate_json(json.dumps(document))


def test_a_missing_package_is_found_before_anything_runs(tiny, monkeypatch):
    installed = {"wandb"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    found = list(unmet(pipeline_of(tiny, trackers=["wandb", "tensorboard"]), "cpu"))
    assert [str(problem) for problem in found] == [
        "trackers.1: 'tensorboard' is not installed: pip install 'compress[tensorboard]'"
    ]


@pytest.mark.parametrize(
    ("stage", "key", "message"),
    [
        ({"train": {"precision": "fp16"}}, "stages.0.train.precision", "fp16 needs a CUDA device"),
        (
            {"prune": {"recovery": {"precision": "fp16"}}},
            "stages.0.prune.recovery.precision",
            "fp16 needs a CUDA device",
        ),
        ({"train": {"batchnorm": "sync"}}, "stages.0.train.batchnorm", "'sync' needs CUDA devices"),
    ],
)
def test_what_the_device_cannot_do_is_found_before_anything_runs(tiny, stage, key, message):
    pipeline = pipeline_of(tiny, stages=[stage])
    (problem,) = unmet(pipeline, "cpu")
    assert problem.key == key
    assert message in problem.message
    assert list(unmet(pipeline, "cuda")) == []


def test_every_tracker_has_an_extra_of_its_name():
    project = tomllib.loads((Path(compress.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(get_args(get_args(Pipeline.model_fields["trackers"].annotation)[0])) <= set(
        project["optional-dependencies"]
    )


def test_trackers_are_part_of_no_cache_key(tiny):
    keys = []
    for trackers in ([], ["wandb", "mlflow"]):
        pipeline = pipeline_of(tiny, trackers=trackers)
        keys.append([Keys(pipeline).stage(planned, None, None, None) for planned in planned_stages(pipeline)])
    assert keys[0] == keys[1]
    assert "compress.training.trackers" not in closure("compress.stages.train")
