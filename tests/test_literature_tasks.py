"""The tasks of the distillation literature, as shipped, from end to end on tiny stand-ins for data and weights."""

import re
from dataclasses import dataclass, field

import pytest
from conftest import write_arrays
from test_shipped_pipelines import NO_TIME, PIPELINES, SYNSETS, check_run, imagenet, patterns, stand_ins

from compress import load_pipeline, run
from compress.config import imitates
from compress.models.cost import parameters
from compress.models.factory import Arch, create_empty

__all__ = ["imagenet"]  # a fixture of the other module


@dataclass(frozen=True)
class Task:
    """What the name of a pipeline promises."""

    teacher: str
    student: str
    losses: dict[str, float]
    """Terms and their weights."""
    settings: dict[str, object] = field(default_factory=dict)
    """Of the stage."""


TASKS = {
    "mlp_digits": Task("classic:mlp", "classic:mlp", {"labels": 1.0, "kd": 0.5}),
    "resnet20_distill_cifar10": Task("cifar:resnet56", "cifar:resnet20", {"kd": 0.9, "labels": 0.1}),
    "lenet_cifar10": Task("cifar:resnet56", "classic:lenet5", {"kd": 4.0, "labels": 1.0}),
    "resnet50_to_resnet18": Task("torchvision:resnet50", "torchvision:resnet18", {"labels": 1.0, "dist": 1.0}),
    "resnet_to_mobilenet": Task("torchvision:resnet50", "torchvision:mobilenet_v2", {"labels": 1.0, "dkd": 1.0}),
}
IMAGENET = {"resnet50_to_resnet18": 11_179_077, "resnet_to_mobilenet": 2_230_277}
"""Parameters of the students, with five classes."""
STAGES = ["source", "distill", "quantize", "export"]


def distillation(pipeline):
    (stage,) = [entry.distill for entry in pipeline.stages if entry.distill is not None]
    return stage


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_its_name_says(name):
    task, pipeline = TASKS[name], load_pipeline(PIPELINES / f"{name}.yaml")
    stage = distillation(pipeline)
    assert pipeline.name == name
    assert (pipeline.model.factory, stage.student.factory) == (task.teacher, task.student)
    assert stage.student.weights is None  # from scratch, as in the papers
    assert {entry.kind: entry.settings.weight for entry in stage.losses} == task.losses
    assert stage.teacher_share is None
    assert any(imitates(entry, "teacher") for entry in stage.losses)
    teacher, student = (
        parameters(create_empty(Arch(model.factory, model.kwargs), trusted=()))
        for model in (pipeline.model, stage.student)
    )
    assert student < teacher / 2


def test_the_perceptrons_are_those_of_the_example():
    pipeline = load_pipeline(PIPELINES / "mlp_digits.yaml")
    assert pipeline.model.kwargs["hidden"] == [256, 256, 256]
    assert distillation(pipeline).student.kwargs["hidden"] == [128]


def test_perceptrons_on_digits(tmp_path):
    few = ["stages.train.epochs=4", "stages.distill.epochs=4", "threads=1", "device=cpu", "bench.latency=null"]
    pipeline = load_pipeline(PIPELINES / "mlp_digits.yaml", few)
    results = check_run(pipeline, tmp_path, (1, 8, 8), [str(digit) for digit in range(10)])
    _, teacher, student, quantized, _ = results.rows
    assert (teacher.parameters, student.parameters) == (150_794, 9_610)
    assert teacher.accuracy.test.percent > 90
    assert student.accuracy.test.percent > 80
    assert quantized.size_bytes < student.size_bytes / 2
    assert list((tmp_path / "mlp_digits" / "teacher").iterdir())  # what the teacher said once


def test_the_perceptron_alone_as_its_pipeline_says(tmp_path):
    text = (PIPELINES / "mlp_digits.yaml").read_text()
    command = re.search(r"compress run \S+ (--set name=(?:.*\\\n#)?.*)\n", text).group(1)
    settings = [one.strip("'") for one in re.findall(r"--set ('[^']+'|\S+)", command)]
    alone = distillation(load_pipeline(PIPELINES / "mlp_digits.yaml", settings))
    assert not any(imitates(entry, "teacher") for entry in alone.losses)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder laid out as CIFAR-10's, of a few images."""
    shape, root = (32, 32, 3), tmp_path_factory.mktemp("cifar")
    return write_arrays(root, train=patterns(10, 4, shape), test=patterns(10, 5, shape))


def small_teacher(factory, classes):
    """A tiny network of the user's own instead of published weights."""
    kwargs = f"{{num_classes: {classes}, channels: 3, width: 16}}"
    return [f"model.factory={factory}", f"model.kwargs={kwargs}", "model.weights=null"]


def tiny_cifar(name, root, factory, *settings):
    few = [
        f"data.root={root}",
        "data.validation.size=20",
        "stages.distill.epochs=2",
        "stages.distill.cache.views=2",
        "stages.quantize.calibration.samples=10",
    ]
    return load_pipeline(PIPELINES / f"{name}.yaml", [*NO_TIME, *small_teacher(factory, 10), *few, *settings])


@pytest.mark.slow
def test_lenet_and_alexnet_on_cifar10_share_what_the_teacher_said(cifar, tiny, tmp_path):
    lenet = tiny_cifar("lenet_cifar10", cifar, tiny.factory, "budget={accuracy_drop: 100}")
    results = check_run(lenet, tmp_path, (3, 32, 32), lenet.data.classes)
    assert [row.stage for row in results.rows] == STAGES
    assert results.rows[1].parameters == 62_006
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "lenet_cifar10" / "teacher").rglob("*.npy")}
    assert len(answers) == 2  # a file per view
    alexnet = tiny_cifar("lenet_cifar10", cifar, tiny.factory, "stages.distill.student.factory=classic:alexnet")
    assert run(alexnet, runs=tmp_path, until="distill").rows[1].parameters == 485_082
    assert answers == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "lenet_cifar10" / "teacher").rglob("*.npy")
    }


@pytest.mark.slow
def test_resnet20_on_cifar10(cifar, tiny, tmp_path):
    pipeline = tiny_cifar("resnet20_distill_cifar10", cifar, tiny.factory)
    results = run(pipeline, runs=tmp_path, until="distill")
    assert results.rows[1].parameters == 269_722
    assert len(results.rows[1].training) == 2


def tiny_imagenet(root):
    return [
        *NO_TIME,
        f"data.root={root}",
        "data.image_size=64",
        "data.resize=72",
        "data.workers=0",
        "data.validation.size=8",
        "model.weights=null",
        "stages.distill.epochs=1",
        "stages.quantize.calibration.samples=5",
        "stages.export.agreement=0",
    ]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_with_small_networks(name, imagenet, tiny, tmp_path):  # the fixture
    pipeline = load_pipeline(PIPELINES / f"{name}.yaml", [*tiny_imagenet(imagenet), *stand_ins(tiny.factory)])
    results = run(pipeline, runs=tmp_path, until="distill")
    assert results.rows[1].parameters < results.rows[0].parameters / 2
    assert len(results.rows[1].training) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet(name, imagenet, tmp_path):  # the fixture
    classes = f"{{num_classes: {len(SYNSETS)}}}"
    settings = [f"model.kwargs={classes}", f"stages.distill.student.kwargs={classes}"]
    pipeline = load_pipeline(PIPELINES / f"{name}.yaml", [*tiny_imagenet(imagenet), *settings])
    results = check_run(pipeline, tmp_path, (3, 64, 64), sorted(SYNSETS))
    assert [row.stage for row in results.rows] == STAGES
    assert results.rows[1].parameters == IMAGENET[name]
