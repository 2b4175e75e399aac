"""Cache keys, what a run would do, and what it says about it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compress import load_pipeline, machine, manifest
from compress.errors import CompressError, ConfigError, DataError
from compress.files import write_file
from compress.manifest import ArchRecord, HistoryEntry, InputRecord
from compress.measured import METRICS, Accuracy, SplitAccuracy
from compress.plan import Cache, Keys, Planned, make_plan, planned_stages, reference_position, selected
from compress.provenance import key_digest

STAGES = [{"train": {"epochs": 1}}, {"prune": None}, {"quantize": None}, {"export": None}]


@pytest.fixture
def project(tmp_path):
    """A pipeline on arrays with a user's own model, and everything it names."""

    def make(folder="project", overrides=(), **settings):
        root = tmp_path / folder
        (root / "data").mkdir(parents=True, exist_ok=True)
        if not (root / "net.py").exists():
            (root / "net.py").write_text("def make(): ...\n")
            (root / "w.pth").write_bytes(b"weights")
            for split in ("train", "test"):
                np.save(root / "data" / f"{split}_images.npy", np.zeros((8, 4, 4, 1), np.uint8))
                np.save(root / "data" / f"{split}_labels.npy", np.arange(8) % 2)
        document = {
            "name": "tiny",
            "device": "cpu",
            "threads": 1,
            "data": {"kind": "arrays", "root": "data"},
            "model": {"factory": "net.py:make", "weights": "w.pth"},
            "stages": STAGES,
            **settings,
        }
        (root / "p.yaml").write_text(json.dumps(document))
        return load_pipeline(root / "p.yaml", overrides)

    return make


def record(key, stage, form="float", parent=None, width=1):
    """A manifest as a stage would leave it; `width` stands for what the model computes."""
    return manifest.seal(
        {
            "arch": ArchRecord(factory="net.py:make", kwargs={"width": width}),
            "form": form,
            "inputs": [InputRecord(name="input", shape=(1, 4, 4), mean=(0.5,), std=(0.5,))],
            "classes": ["0", "1"],
            "history": (HistoryEntry(stage=stage, parent=parent, settings={}, seconds=1.0),),
            "key": key,
            "files": {},
        }
    )


def keep(folder, made):
    write_file(folder / manifest.FILE_NAME, manifest.dump(made))


def all_keys(pipeline, widths=(), data_of=None):
    """The key of every stage, where each made a checkpoint; by label."""
    keys, found, parent, reference = Keys(data_of or pipeline), {}, None, None
    for planned in planned_stages(pipeline):
        key = keys.stage(planned, parent, reference, None)
        found[planned.label] = key
        parent = record(key, planned.name, width=dict(widths).get(planned.label, 1))
        if planned.position <= reference_position(pipeline):
            reference = parent
    return found


def changed(first, second):
    """Labels whose own key differs, with the fields."""
    return {
        label: {field for field in first[label] if first[label][field] != second[label][field]}
        for label in first
        if first[label] != second[label]
    }


def run_all(pipeline, runs):
    """Leave behind what a whole run would: a checkpoint for every stage, with contents that depend on the key."""
    while True:
        step = next((step for step in make_plan(pipeline, runs) if step.status != "cached"), None)
        if step is None:
            return
        keys, cache = Keys(pipeline), Cache(runs / pipeline.name)
        parent = reference = None
        for planned in planned_stages(pipeline):
            key = keys.stage(planned, parent, reference, None)
            made = record(key, planned.name, width=int(key_digest(key)[:6], 16))
            if planned == step.planned:
                keep(cache.folder_for(planned, key), made)
                break
            parent = made
            if planned.position <= reference_position(pipeline):
                reference = made


# --- stages of a plan ------------------------------------------------------------------------------------------------


def test_labels_are_unique_and_so_are_seeds(project):
    stages = planned_stages(project(stages=[{"train": {}}, {"prune": None}, {"factorize": None}, {"prune": None}]))
    assert [stage.label for stage in stages] == ["source", "train", "prune", "factorize", "prune-2"]
    assert [stage.position for stage in stages] == [0, 1, 2, 3, 4]
    assert len({stage.seed for stage in stages}) == 5


@pytest.mark.parametrize(
    ("stages", "position"),
    [
        ([], 0),
        (["prune"], 0),
        (["train"], 1),
        (["train", "train", "prune"], 2),
        (["train", "prune", "train"], 1),
    ],
)
def test_the_reference_is_the_last_train_at_the_head(project, stages, position):
    assert reference_position(project(stages=[{name: None} for name in stages])) == position


def test_until(project):
    stages = planned_stages(project())
    assert [stage.label for stage in selected(stages, "prune")] == ["source", "train", "prune"]
    assert [stage.label for stage in selected(stages, "source")] == ["source"]
    assert selected(stages, None) == stages
    expected = r"--until: there is no stage 'prun' \(there are source, train, prune, quantize, export\); did you mean 'prune'\?"
    with pytest.raises(CompressError, match=expected):
        selected(stages, "prun")


# --- what changes a key ----------------------------------------------------------------------------------------------


def test_the_same_pipeline_has_the_same_keys(project):
    assert all_keys(project()) == all_keys(project())


def test_a_setting_changes_the_key_of_its_stage_only(project):
    first, second = all_keys(project()), all_keys(project(overrides=["stages.prune.target.macs=0.25"]))
    assert changed(first, second) == {"prune": {"settings"}}


def test_what_a_stage_makes_changes_the_key_of_the_next(project):
    pipeline = project()
    first, second = all_keys(pipeline), all_keys(pipeline, {"prune": 2})
    assert changed(first, second) == {"quantize": {"parent"}}
    first, second = all_keys(pipeline), all_keys(pipeline, {"train": 2})
    assert changed(first, second) == {  # the reference of all that follows
        "prune": {"parent", "reference"},
        "quantize": {"reference"},
        "export": {"reference"},
    }


def test_seed_and_threads_matter(project):
    first = all_keys(project())
    assert changed(first, all_keys(project(overrides=["seed=1"]))) == {label: {"seed"} for label in first}
    trained = {label: {"machine"} for label in first if label != "source"}
    assert changed(first, all_keys(project(overrides=["threads=2"]))) == trained


def test_threads_left_out_are_those_of_the_machine(project, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 3)
    assert Keys(project(overrides=["threads=null"])).threads == 3
    assert Keys(project()).threads == 1


def test_data_matters_by_content_and_settings(project, tmp_path):
    pipeline = project()
    first = all_keys(pipeline)
    everywhere = {label: {"data"} for label in first}
    assert changed(first, all_keys(project(overrides=["data.augment.flip=true"]))) == everywhere
    np.save(tmp_path / "project" / "data" / "train_images.npy", np.ones((8, 4, 4, 1), np.uint8))
    assert changed(first, all_keys(pipeline)) == everywhere


def test_content_of_weights_and_of_the_factory_matters(project, tmp_path):
    pipeline = project()
    first = all_keys(pipeline)
    for name in ("w.pth", "net.py"):
        path = tmp_path / "project" / name
        path.write_bytes(path.read_bytes() + b"# more")
        os.utime(path, ns=(1, 1))  # the change must be seen by content: times come back after a checkout
        second = all_keys(pipeline)
        assert changed(first, second) == {"source": {"settings"}}
        first = second


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "budget.accuracy_drop=1",
        "bench.latency=null",
        "bench.batch_size=3",
        "stages.train.epochs=1",
        "data.validation.from=train",
    ],
)
def test_what_changes_nothing_changes_no_key(project, override):
    assert all_keys(project()) == all_keys(project(overrides=[override]))


def test_places_change_no_key(project, tmp_path):
    first = all_keys(project())
    shutil.copytree(tmp_path / "project", tmp_path / "elsewhere" / "project")
    assert all_keys(project("elsewhere/project")) == first
    assert str(tmp_path) not in json.dumps(first)


def test_arguments_of_callables_count_as_they_are(project):
    keys = [all_keys(project(model={"factory": "net.py:make", "kwargs": {"root": root}})) for root in ("/a/x", "/b/x")]
    assert changed(*keys) == {"source": {"settings"}}


def test_only_the_export_depends_on_accuracies(project):
    pipeline = project()
    keys = Keys(pipeline)

    accuracy = Accuracy(correct=9, n=10, percent=90.0, low=60.0, high=98.0)
    measured = SimpleNamespace(accuracy=SplitAccuracy(validation=accuracy, test=accuracy))
    for planned in planned_stages(pipeline):
        same = keys.stage(planned, None, None, measured) == keys.stage(planned, None, None, None)
        assert same == (planned.name != "export")


def test_keys_cover_code_versions_data_and_machine(project):
    for label, key in all_keys(project()).items():
        assert len(key["code"]) == 64
        assert len(key["data"]["code"]) == 64  # a mended loader must not leave old results standing
        assert "numpy" in key["data"]["versions"]
        assert "torch" in key["versions"]
        assert (key["machine"] is None) == (label == "source")
    key = Keys(project()).measurement(record({}, "train"))
    assert {"checkpoint", "data", "seed", "batch_size", "sensitivity", "machine", "versions", "code"} == set(key)


def test_measurements_are_one_cpus_checkpoints_are_not(project, monkeypatch):
    """A measurement holds how many samples a second were answered."""
    pipeline, made = project(), record({}, "train")
    (stages, measurement) = all_keys(pipeline), Keys(pipeline).measurement(made)
    monkeypatch.setattr(machine, "cpu_model", lambda: "Another CPU")
    assert all_keys(pipeline) == stages
    other = Keys(pipeline).measurement(made)
    assert other["machine"]["cpu"] == "Another CPU" != measurement["machine"]["cpu"]
    assert {**other, "machine": measurement["machine"]} == measurement


@pytest.mark.parametrize(
    ("stage", "is_timed"),
    [
        ({"factorize": {"faster_by": 0.0}}, False),
        ({"factorize": {"faster_by": 0.1}}, True),
        ({"prune": {"target": {"macs": 0.5}}}, False),
        ({"prune": {"target": {"latency": 0.5}}}, True),
        ({"prune": {"multiple": "auto"}}, True),
    ],
)
def test_what_is_decided_by_the_clock_is_one_cpus(stage, is_timed, project, monkeypatch):
    pipeline = project(stages=[stage])
    before = all_keys(pipeline)
    monkeypatch.setattr(machine, "cpu_model", lambda: "Another CPU")
    assert (all_keys(pipeline) != before) == is_timed


def test_missing_data_is_told_before_keys_are_made(project):
    pipeline = project()
    shutil.rmtree(pipeline.data.root)
    with pytest.raises(DataError, match=r"data\.root: no such folder or \.npz file"):
        Keys(pipeline)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "runs" / "tiny")


@pytest.fixture
def prune(project):
    return next(stage for stage in planned_stages(project()) if stage.name == "prune")


def test_find_needs_the_whole_key(cache, prune):
    key = {"settings": {"x": 1}}
    assert cache.find(prune, key) is None
    folder = cache.folder_for(prune, key)
    assert folder.name == f"02-prune-{key_digest(key)[:8]}"
    keep(folder, record(key, "prune"))
    found = cache.find(prune, key)
    assert found == (folder, record(key, "prune"))
    assert cache.find(prune, {"settings": {"x": 2}}) is None


def test_find_does_not_care_at_which_position_it_was_made(cache, prune):
    key = {"settings": 1}
    keep(cache.folder_for(prune, key), record(key, "prune"))
    moved = Planned(7, prune.name, prune.label, prune.settings, prune.seed, prune.module)
    assert cache.find(moved, key) is not None


def test_two_keys_that_share_eight_digits_live_side_by_side(cache, prune, monkeypatch):
    monkeypatch.setattr("compress.plan.key_digest", lambda key: "abcdef01" + key_digest(key)[8:])
    first, second = {"settings": 1}, {"settings": 2}
    keep(cache.folder_for(prune, first), record(first, "prune", width=1))
    assert cache.folder_for(prune, first).name == "02-prune-abcdef01"
    assert cache.find(prune, second) is None
    other = cache.folder_for(prune, second)
    assert other.name == f"02-prune-abcdef01{key_digest(second)[8:16]}"
    keep(other, record(second, "prune", width=2))
    for key, width in ((first, 1), (second, 2)):
        assert cache.find(prune, key)[1].arch.kwargs == {"width": width}
        assert cache.folder_for(prune, key) == cache.find(prune, key)[0]


def test_a_damaged_checkpoint_counts_as_missing_and_is_replaced_in_place(cache, prune):
    key = {"settings": 1}
    folder = cache.folder_for(prune, key)
    keep(folder, record(key, "prune"))
    path = folder / manifest.FILE_NAME
    for damage in (b"", b"{", b"[]", b"\xff", path.read_bytes().replace(b'"prune"', b'"train"')):
        path.write_bytes(damage)
        assert cache.find(prune, key) is None
        assert cache.folder_for(prune, key) == folder
        assert cache.why_missing(prune, key) == f"the checkpoint {folder.name} is damaged"


def test_why_missing_names_what_changed_against_the_most_similar(cache, prune):
    key = {"settings": {"a": 1, "b": [1]}, "parent": "0" * 64, "seed": 1}
    assert cache.why_missing(prune, key) == "it has not run yet"
    far = {"settings": {"a": 9, "b": [9]}, "parent": "f" * 64, "seed": 9, "code": "x"}
    keep(cache.root / "02-prune-00000001", record(far, "prune"))
    # What the user changed comes first.
    assert cache.why_missing(prune, key) == "changed: settings.a: 9 → 1, settings.b: [9] → [1], seed: 9 → 1 and 2 more"
    keep(cache.root / "05-prune-00000002", record({**key, "settings": {"a": 1, "b": [2]}}, "prune"))
    assert cache.why_missing(prune, key) == "changed: settings.b: [2] → [1]"


def test_why_missing_looks_at_its_own_label_only(cache, prune):
    keep(cache.root / "04-prune-2-00000001", record({"settings": 2}, "prune"))
    assert cache.why_missing(prune, {"settings": 1}) == "it has not run yet"


def test_sweep_removes_what_was_half_written_and_nothing_else(cache, prune):
    key = {"settings": 1}
    folder = cache.folder_for(prune, key)
    keep(folder, record(key, "prune"))
    (cache.root / ".tmp-02-prune-x").mkdir()
    (cache.root / ".tmp-02-prune-x" / "model").write_bytes(b"half")
    (cache.root / ".tmp-results.json-y").write_bytes(b"half")
    (folder / ".tmp-metrics.json-z").write_bytes(b"half")
    cache.sweep()
    cache.sweep()
    assert sorted(path.name for path in cache.root.rglob("*")) == sorted([folder.name, manifest.FILE_NAME])
    Cache(cache.root / "nowhere").sweep()


def test_scratch_folders_differ_by_key(cache, prune):
    assert cache.scratch_for(prune, {"a": 1}) != cache.scratch_for(prune, {"a": 2})
    assert cache.scratch_for(prune, {"a": 1}).parent.name == ".work"


def test_a_measurement_of_an_older_version_counts_as_missing(cache, prune):
    key = {"checkpoint": "ab"}
    folder = cache.folder_for(prune, key)
    keep(folder, record(key, "prune"))
    (folder / "model.onnx").write_bytes(b"model")
    sha256 = hashlib.sha256(b"model").hexdigest()
    accuracy = {"correct": 9, "n": 10, "percent": 90.0, "low": 60.0, "high": 98.0}
    content = {
        "key": key,
        "precision": "fp32",
        "accuracy": {"validation": accuracy, "test": accuracy},
        "parameters": 1,
        "macs": 1,
        "model": "model.onnx",
        "sha256": sha256,
    }
    older = {**content, "correct": {"validation": "ff80", "test": "ff80"}, "size_bytes": 5}
    quality = {"top5": None, "confusion": None, "classes": [], "samples_per_second": 1.0}
    quality |= dict.fromkeys(("precision", "recall", "f1", "calibration_error"), 50.0)
    size = {"activation_peak_bytes": None, "layers": []}
    size |= dict.fromkeys(("size_bytes", "gzip_bytes", "weight_bytes", "parameters", "nonzero_parameters", "macs"), 5)
    packed = {"validation": "", "test": ""}
    newer = {
        **content,
        "quality": {"validation": quality, "test": quality},
        "answers": packed,
        "confidences": packed,
        "size": size,
    }
    for found, holds in (
        (older, False),
        (newer, True),
        ({**newer, "key": {}}, False),
        ({**newer, "sha256": "0"}, False),
    ):
        (folder / METRICS).write_text(json.dumps(found))
        assert (cache.measurement(folder, key) is not None) == holds


# --- the plan --------------------------------------------------------------------------------------------------------


def words(steps):
    return [(step.planned.label, step.status, step.reason) for step in steps]


def test_plan_of_a_first_run(project, tmp_path):
    assert words(make_plan(project(), tmp_path / "runs")) == [
        ("source", "run", "it has not run yet"),
        ("train", "follows", "takes what 'source' makes"),
        ("prune", "follows", "takes what 'train' makes"),
        ("quantize", "follows", "takes what 'prune' makes"),
        ("export", "follows", "takes what 'quantize' makes"),
    ]
    assert not (tmp_path / "runs").exists()


def test_plan_after_a_run_and_after_a_change(project, tmp_path):
    runs = tmp_path / "runs"
    run_all(project(), runs)
    steps = make_plan(project(), runs)
    assert {step.status for step in steps} == {"cached"}
    assert all((runs / "tiny" / step.folder).is_dir() for step in steps)

    steps = make_plan(project(overrides=["stages.prune.target.macs=0.25"]), runs)
    assert words(steps) == [
        ("source", "cached", "nothing changed"),
        ("train", "cached", "nothing changed"),
        ("prune", "run", "changed: settings.target.macs: 0.5 → 0.25"),
        ("quantize", "follows", "takes what 'prune' makes"),
        ("export", "follows", "takes what 'quantize' makes"),
    ]
    steps = make_plan(project(overrides=["stages.prune.recovery=null"]), runs, until="prune")
    assert words(steps)[-1][:2] == ("prune", "run")
    assert words(steps)[-1][2].startswith("changed: settings.recovery: ")
    assert words(steps)[-1][2].endswith("→ null")
    assert make_plan(project(), runs, fresh=True)[0].reason == "--fresh"


def test_missing_files_are_listed_all_at_once(project, tmp_path):
    student = {"factory": "nte.py:make", "weights": "gone/v.pth"}
    pipeline = project(
        model={"factory": "net.py:make", "weights": "w.pht/x.pth"},
        stages=[{"distill": {"student": student}}],
        data={"kind": "arrays", "root": "date"},
    )
    with pytest.raises(ConfigError) as caught:
        make_plan(pipeline, tmp_path / "runs")
    root = tmp_path / "project"
    assert [str(problem).removeprefix(f"{root}/p.yaml:1: ") for problem in caught.value.problems] == [
        f"data.root: no such folder or .npz file: {root}/date; did you mean 'data'?",
        f"model.weights: no such file: {root}/w.pht/x.pth",
        f"stages.0.distill.student.weights: no such file: {root}/gone/v.pth",
        f"stages.0.distill.student.factory: no such file: {root}/nte.py; did you mean 'net.py'?",
    ]


def test_a_path_that_no_system_can_open_is_only_missing(project, tmp_path):
    pipeline = project(model={"factory": "net.py:make", "weights": f"{'x' * 5000}.pth"})
    with pytest.raises(ConfigError, match=r"model\.weights: no such file: "):
        make_plan(pipeline, tmp_path / "runs")


def test_planning_imports_no_torch(project, tmp_path):
    project()
    code = (
        "import sys; from pathlib import Path; from compress import load_pipeline; from compress.plan import Keys, make_plan\n"
        "pipeline = load_pipeline(sys.argv[1]); Keys(pipeline); make_plan(pipeline, Path('runs'))\n"
        "print(sorted({'torch', 'torchvision', 'onnxruntime', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    file = tmp_path / "project" / "p.yaml"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, file],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.stdout.strip() == "[]"
    assert not Path(tmp_path, "runs").exists()
