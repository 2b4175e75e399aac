"""The shipped pipelines that need data and weights of the user's, from end to end on tiny stand-ins for both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import write_arrays
from PIL import Image

from compress import load_pipeline, run
from compress.plan import make_plan

PIPELINES = Path(__file__).parent.parent / "pipelines"
IMAGENET = PIPELINES / "resnet50_imagenet.yaml"
CIFAR10 = PIPELINES / "resnet56_cifar10.yaml"
# ImageNet's first five folders, to be sorted; torchvision's weights number them in this order.
SYNSETS = ["n01443537", "n01484850", "n01440764", "n01494475", "n01491361"]
FIVE_CLASSES = f"{{num_classes: {len(SYNSETS)}}}"
NO_TIME = ["device=cpu", "threads=1", "bench.latency=null", "bench.batch_size=8", "stages.export.agreement=0.01"]


def patterns(classes, n, shape):
    """`n` images of every class, uint8 (n · classes, *shape), and labels: a pattern of its own per class, with noise."""
    height, width, channels = shape
    coarse = np.random.default_rng(0).uniform(0, 255, (classes, 4, 4, channels))
    sharp = coarse.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]
    labels = np.arange(n * classes) % classes
    noisy = sharp[labels] + np.random.default_rng(n).normal(0, 20, (len(labels), *shape))
    return noisy.clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """A folder laid out as ImageNet, with five classes, of images that are not square."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, n in (("train", 3), ("val", 4)):
        for index, (image, label) in enumerate(zip(*patterns(len(SYNSETS), n, (72, 96, 3)), strict=True)):
            folder = root / split / SYNSETS[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.{'JPEG' if index % 2 else 'png'}")
    return root


def small_imagenet(root):
    """What makes the pipeline tiny; everything else stays as it is shipped."""
    return [
        *NO_TIME,
        f"data.root={root}",
        "data.image_size=64",
        "data.resize=72",
        "data.workers=0",
        "data.validation.size=8",
        f"model.kwargs={FIVE_CLASSES}",
        "model.weights=null",
        "stages.prune.recovery.epochs=1",
        "stages.factorize.recovery.epochs=1",
        "stages.factorize.faster_by=0.0",
        "stages.quantize.calibration.samples=5",
    ]


STUDENT = [
    f"stages.distill.student.kwargs={FIVE_CLASSES}",
    "stages.distill.student.weights=null",
    "stages.distill.epochs=1",
]


def stand_ins(factory):
    """Tiny networks: the exporter alone takes a quarter of a minute for each row of the real ones."""
    sizes = {"model": 32, "stages.distill.student": 16}
    kwargs = "{{num_classes: {}, channels: 3, width: {}}}"
    named = [f"{place}.factory={factory}" for place in sizes]
    return [*named, *(f"{place}.kwargs={kwargs.format(len(SYNSETS), width)}" for place, width in sizes.items())]


def answers(path, shape):
    """Logits of an ONNX file for one sample and for three."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = np.random.default_rng(0).standard_normal((3, *shape), np.float32)
    return [session.run(None, {"input": batch})[0] for batch in (inputs[:1], inputs)]


def check_run(pipeline, runs, shape, classes):
    """Run a pipeline; what is in `dist/` works, and the stages are those that were planned."""
    planned = [step.planned.label for step in make_plan(pipeline, runs)]
    results = run(pipeline, runs=runs)
    assert [row.stage for row in results.rows] == planned
    dist = runs / pipeline.name / "dist"
    assert {path.name for path in dist.iterdir()} == {"model.int8.onnx", "model.fp32.onnx", "metadata.json"}
    for file in ("model.int8.onnx", "model.fp32.onnx"):
        for logits, n in zip(answers(dist / file, shape), (1, 3), strict=True):
            assert logits.shape == (n, len(classes))
            assert np.isfinite(logits).all()
    assert results.rows[-1].precision == "int8"
    assert results.rows[-1].size_bytes == (dist / "model.int8.onnx").stat().st_size
    assert json.loads((dist / "metadata.json").read_bytes())["classes"] == list(classes)
    assert results.budget is not None
    return results


STAGES = ["source", "distill", "prune", "factorize", "quantize", "export"]


def check_imagenet(imagenet, runs, settings):
    pipeline = load_pipeline(IMAGENET, [*small_imagenet(imagenet), *STUDENT, *settings])
    results = check_run(pipeline, runs, (3, 64, 64), sorted(SYNSETS))
    assert [row.stage for row in results.rows] == STAGES
    source, student, pruned, split, *_ = results.rows
    assert student.parameters < source.parameters / 3
    assert pruned.macs <= 0.8 * student.macs
    assert split.macs <= 0.95 * pruned.macs
    assert results.rows[0].accuracy.validation.n == 8
    assert results.rows[0].accuracy.test.n == 4 * len(SYNSETS) - 8
    return results


def test_imagenet_with_small_networks(imagenet, tiny, tmp_path):
    check_imagenet(imagenet, tmp_path, stand_ins(tiny.factory))


@pytest.mark.slow
def test_imagenet(imagenet, tmp_path):
    results = check_imagenet(imagenet, tmp_path, [])
    *_, split, quantized, _ = results.rows
    assert quantized.size_bytes < split.size_bytes / 2


def without_student(folder):
    """The pipeline with the stages and the budget that stand commented out at its end."""
    text = IMAGENET.read_text()
    head, found, _ = text.partition("\nstages:\n")
    assert found
    commented = text[text.rindex("\n# stages:\n") + 1 :].splitlines()
    assert all(line.startswith("# ") for line in commented)
    path = folder / "without_student.yaml"
    path.write_text("\n".join([head, *(line.removeprefix("# ") for line in commented), ""]))
    return path


def test_the_alternative_in_the_comment_is_a_pipeline(tmp_path):
    pipeline = load_pipeline(without_student(tmp_path))
    assert [entry.kind for entry in pipeline.stages] == [
        stage for stage in STAGES if stage not in ("source", "distill")
    ]
    assert pipeline.budget.accuracy_drop < load_pipeline(IMAGENET).budget.accuracy_drop


@pytest.mark.slow
def test_the_alternative_in_the_comment_runs(imagenet, tmp_path):
    pipeline = load_pipeline(without_student(tmp_path), small_imagenet(imagenet))
    results = check_run(pipeline, tmp_path / "runs", (3, 64, 64), sorted(SYNSETS))
    source, pruned, split, *_ = results.rows
    assert pruned.macs <= 0.5 * source.macs
    assert split.macs <= 0.95 * pruned.macs


def test_without_a_network_the_published_weights_are_one_clear_error(imagenet, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    # A proxy that refuses at once stands in for the missing network, wherever this test runs.
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and "CACHE" not in name}
    closed = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = kept | closed | {"HOME": str(home), "TORCH_HOME": str(tmp_path / "torch")}
    command = [sys.executable, "-m", "compress", "run", str(IMAGENET), "--runs", str(tmp_path / "runs")]
    command += ["--set", f"data.root={imagenet}", "--set", "data.validation.size=8", "--set", "device=cpu"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    said = " ".join(ended.stderr.split())
    assert ended.returncode == 2, said
    assert "model.weights: 'IMAGENET1K_V2' of 'torchvision:resnet50' cannot be fetched" in said
    assert "download the file where there is a network and give its path" in said
    assert "Traceback" not in said
    assert not (home / ".cache" / "torch").exists()
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert not list((tmp_path / "runs").rglob("checkpoint.json"))


@pytest.fixture
def cifar10(tmp_path):
    """What makes a pipeline for CIFAR-10 tiny."""
    import torch
    from safetensors.torch import save_file

    from compress.models.cifar import CifarResNet

    shape = (32, 32, 3)
    root = write_arrays(tmp_path / "cifar10", train=patterns(10, 4, shape), test=patterns(10, 5, shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_file(CifarResNet(20, 10).state_dict(), tmp_path / "resnet20.safetensors")
    return [
        *NO_TIME,
        f"data.root={root}",
        "data.validation.size=20",
        "model.factory=cifar:resnet20",
        f"model.weights={tmp_path / 'resnet20.safetensors'}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "left", "more"),
    [
        ("resnet56_prune_cifar10", "prune", 0.476, ["stages.quantize.calibration.samples=10"]),
        ("resnet20_svd_cifar10", "factorize", 0.357, []),
    ],
)
def test_one_stage_alone_for_comparison_with_papers(name, stage, left, more, cifar10, tmp_path):
    pipeline = load_pipeline(PIPELINES / f"{name}.yaml", [*cifar10, *more, f"stages.{stage}.recovery.epochs=1"])
    source, made, *_ = run(pipeline, runs=tmp_path / "runs").rows
    assert made.stage == stage
    assert 0.97 * left * source.macs <= made.macs <= left * source.macs


def test_cifar10(cifar10, tmp_path):
    settings = [
        *cifar10,
        "stages.factorize.recovery.epochs=1",
        "stages.factorize.faster_by=0.0",
        "stages.quantize.calibration.samples=10",
    ]
    pipeline = load_pipeline(CIFAR10, settings)
    results = check_run(pipeline, tmp_path / "runs", (3, 32, 32), pipeline.data.classes)
    source, pruned, split, *_ = results.rows
    assert [row.stage for row in results.rows] == [stage for stage in STAGES if stage != "distill"]
    assert results.warnings == ()  # weights are given, and the validation images are not among those they have seen
    assert pruned.macs <= 0.5 * source.macs
    assert split.macs <= 0.95 * pruned.macs
