"""What a result depends on: the code that made it, and not where it lies or how it is explained."""

from __future__ import annotations

import json
import os

import pytest

from compress import provenance
from compress.config import ModelConfig, PruneConfig
from compress.config.prune import PruneTarget
from compress.provenance import closure, code_digest, differences, identity, key_digest, versions
from compress.stages import SOURCE_MODULE, STAGES

STAGE_MODULES = {name: stage.module for name, stage in STAGES.items()} | {"source": SOURCE_MODULE}
USED = {
    "source": {"models.source", "models.factory", "models.weights", "models.state", "models.cifar", "checkpoint"},
    "train": {"training", "methods.losses.logits", "methods.schedules", "surgery", "checkpoint"},
    "distill": {"training", "methods.losses.logits", "models.source", "models.factory"},
    "prune": {"training", "methods.groups", "methods.importance", "methods.trial", "surgery", "models.cost"},
    "factorize": {"training", "methods.lowrank", "methods.seen", "surgery", "models.cost", "bench.trial_worker"},
    "quantize": {"onnx_io.convert", "onnx_io.quantize", "data.splits"},
    "export": {"onnx_io.convert", "onnx_io.session"},
}
MEASURES = {
    "bench",
    "bench.single_answer",
    "bench.trial_latency",
    "bench.trial_worker",
    "bench.latency_process",
    "bench.latency_worker",
    "bench.backends",
    "bench.backends.base",
    "bench.backends.onnx_runtime",
}
LIBRARIES = {
    "train": {"torch", "accelerate"},
    "prune": {"torch", "torch-pruning"},
    "factorize": {"torch", "onnx", "onnxruntime"},
    "quantize": {"torch", "onnx", "onnxruntime"},
    "export": {"torch", "onnx", "onnxruntime"},
}


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_a_stage_depends_on_the_modules_it_uses(stage):
    found = {name.removeprefix("compress.") for name in closure(STAGE_MODULES[stage])}
    assert USED[stage] | {f"stages.{stage}"} <= found
    assert LIBRARIES.get(stage, set()) <= set(versions(STAGE_MODULES[stage]))


@pytest.mark.parametrize("module", [*STAGE_MODULES.values(), "compress.bench.measure", "compress.data.load"])
def test_nothing_depends_on_face_or_report(module):
    faces = (
        "cli",
        "console",
        "inspection",
        "pipeline",
        "plan",
        "report",
        "bench",
        "config",
        "results",
        "errors",
        "events",
    )
    faces = tuple(face for face in faces if not module.startswith(f"compress.{face}"))
    # A split is kept where it is faster, and channels go until a model is fast enough: there what measures decides, and it alone.
    measures = MEASURES if module in (STAGE_MODULES["prune"], STAGE_MODULES["factorize"]) else set()
    found = {name for name in closure(module) if name.removeprefix("compress.") not in measures}
    parts = {name.split(".")[1] if "." in name else "" for name in found}
    assert not parts & {*faces, ""}, parts


def test_no_stage_depends_on_another():
    stages = {f"compress.stages.{name}" for name in STAGES}
    for name, module in STAGE_MODULES.items():
        assert stages & set(closure(module)) <= {f"compress.stages.{name}"}


def test_all_ways_to_read_data_count():
    kinds = {"digits", "arrays", "folder", "torchvision_sets", "python_data", "splits", "augment", "normalise"}
    assert {f"compress.data.{kind}" for kind in kinds} <= set(closure("compress.data.load"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `pack` in place of this one: `pack.stage` uses `pack.maths`, and `pack.cli` uses both."""
    sources = {
        "__init__": "from pack.cli import main\n",
        "stage": '"""Says."""\nimport numpy\nfrom pack import maths\n\n\ndef run(x):\n    """Runs."""\n    return maths.f(x)\n',
        "maths": "def f(x):\n    from pack.deep.inner import g\n\n    return g(x) + 1\n",
        "deep/__init__": "",
        "deep/inner": "import torch\n\n\ndef g(x):\n    return x\n",
        "cli": "from pack.stage import run\n\n\ndef main():\n    run(1)\n",
    }
    for name, text in sources.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "pack")
    functions = [
        getattr(provenance, name) for name in ("closure", "code_digest", "versions", "_tree", "_imports", "_code_of")
    ]

    def forget():
        for function in functions:
            function.cache_clear()

    def edit(name, old, new):
        path = tmp_path / "pack" / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        forget()
        return code_digest("pack.stage")

    forget()
    yield edit
    forget()


def test_closure_follows_imports_at_any_depth_but_not_through_the_package_itself(package):
    assert closure("pack.stage") == ("pack.deep.inner", "pack.maths", "pack.stage")
    assert {"numpy", "torch"} <= set(versions("pack.stage"))
    assert versions("pack.deep.inner").keys() >= {"torch"}
    assert "numpy" not in versions("pack.deep.inner")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage", '"""Runs."""', '"""Runs fast, and is\n    explained."""'),
        ("stage", '"""Says."""\n', ""),
        ("stage", "import numpy\n", "import numpy\n\n\n# why\n"),
        ("maths", "return g(x) + 1", "return (\n        g(x)  # first\n        + 1\n    )"),
        ("cli", "run(1)", "run(2)"),
        ("__init__", "main", "main as other"),
    ],
)
def test_explanations_layout_and_the_face_do_not_count(package, name, old, new):
    before = code_digest("pack.stage")
    assert package(name, old, new) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage", "maths.f(x)", "maths.f(-x)"),
        ("maths", "+ 1", "+ 1.0"),
        ("deep/inner", "return x", "return x * 2"),
        ("deep/inner", "def g(x):", "def g(x, y=1):"),
    ],
)
def test_code_counts_wherever_it_stands_in_the_closure(package, name, old, new):
    before = code_digest("pack.stage")
    assert package(name, old, new) != before


def test_identity_has_digests_for_files_and_no_folders(tmp_path):
    found = []
    for folder in ("a", "b"):
        root = tmp_path / folder
        root.mkdir()
        (root / "net.py").write_text("x = 1\n")
        (root / "w.pth").write_bytes(b"weights")
        settings = ModelConfig(
            factory=f"{root}/net.py:make", weights=f"{root}/w.pth", kwargs={"a": None, "root": "x/y"}
        )
        found.append(identity(settings))
    assert found[0] == found[1]
    assert found[0]["factory"] == {"file": "net.py", "sha256": found[0]["factory"]["sha256"], "name": "make"}
    assert found[0]["kwargs"] == {"a": None, "root": "x/y"}
    assert str(tmp_path) not in json.dumps(found)


def test_identity_sees_a_changed_and_a_missing_file(tmp_path):
    path = tmp_path / "w.pth"
    settings = ModelConfig(factory="cifar:resnet20", weights=str(path))
    assert identity(settings)["weights"] == {"file": "w.pth", "sha256": "missing"}
    seen = set()
    for time, content in enumerate((b"1", b"2"), 1):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        seen.add(identity(settings)["weights"]["sha256"])
    assert len(seen) == 2
    assert identity(ModelConfig(factory="torchvision:resnet18", weights="DEFAULT"))["weights"] == "DEFAULT"


def test_identity_tells_none_from_default():
    assert identity(PruneConfig(recovery=None)) != identity(PruneConfig())
    assert identity(PruneConfig(target=PruneTarget(macs=0.5))) == identity(PruneConfig())


def test_key_digest_does_not_depend_on_the_order_of_keys():
    assert key_digest({"a": 1, "b": {"c": 2, "d": 3}}) == key_digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_digest({"a": 1}) != key_digest({"a": "1"})
    assert key_digest({"a": None}) != key_digest({})


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 → 2"]),
        ({"a": {"b": {"c": 0.5}}}, {"a": {"b": {"c": 0.25}}}, ["a.b.c: 0.5 → 0.25"]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ["a: 1 → 2", "b: 1 → 2"]),
        ({}, {"a": "x"}, ["a: null → x"]),
        ({"a": "f" * 64}, {"a": "0" * 64}, ["a: ffffffff → 00000000"]),
        ({"a": None}, {"a": {"b": 1}}, ['a: null → {"b":1}']),
        ({"a": [1, 2]}, {"a": ["x" * 60]}, [f'a: [1,2] → ["{"x" * 35}…']),
    ],
)
def test_differences_name_fields(old, new, lines):
    assert differences(old, new) == lines
