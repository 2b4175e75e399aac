"""What a user can get wrong ends in one message that says where, what and how to mend it, with exit code 2."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, images, write_arrays
from PIL import Image

from compress import cli

FILE = """\
name: tiny
device: cpu
threads: 1
data:
  kind: arrays
  root: data
  classes: [north, east, south, west]
  validation: {from: given}
model: {factory: "model.py:make"}
stages:
  - train: {epochs: 1, batch_size: 16}
  - prune: {target: {macs: 0.7}, recovery: null}
bench: {latency: null}
"""
MORE = '''

class Short(Tiny):
    """Answers three classes whatever it is asked for."""

    def forward(self, x):
        return super().forward(x)[:, :3]


class Wavering(Tiny):
    """Forgets that dropout is for training."""

    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5)


def fails(width):
    raise KeyError(width)


short, wavering = Short, Wavering
'''


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A small project: `model.py`, arrays and images."""
    root = tmp_path_factory.mktemp("project")
    (root / "model.py").write_text(MODEL + MORE)
    write_arrays(root / "data", train=images(32, 1), validation=images(16, 2), test=images(16, 3))
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 7), (40 * number, 0, 200)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def project(files, tmp_path, monkeypatch):
    """A copy of the project as the working directory."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def compress(project, monkeypatch, capsys, one_thread):
    """Runs a command that must fail: the lines of its message, without 'error: ' and the project's folder."""

    def compress(*words):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2, out + err
        lines = err.splitlines()
        assert lines
        assert all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ").replace(f"{project}/", "") for line in lines]

    return compress


@pytest.fixture
def refused(compress, project):
    """The one line about a pipeline file, after which nothing lies in the run's folder."""

    def refused(text, *words, command="run"):
        Path("p.yaml").write_text(text)
        (line,) = compress(command, "p.yaml", *words)
        run = project / "runs" / "tiny"
        assert not run.exists() or not list(run.iterdir())
        return line

    return refused


def changed(*pairs):
    """The pipeline file with parts replaced."""
    text = FILE
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def model(factory="model.py:make", **settings):
    """The pipeline file with another model."""
    inner = "".join(f", {key}: {value}" for key, value in settings.items())
    return changed(('{factory: "model.py:make"}', f'{{factory: "{factory}"{inner}}}'))


IMAGES = changed(
    ("kind: arrays\n  root: data\n  classes: [north, east, south, west]\n  validation: {from: given}",
     "kind: image_folder\n  root: images\n  image_size: 8\n  workers: 0\n  validation: {from: test, size: 2}"),
    ('"model.py:make"', '"cifar:resnet20", kwargs: {num_classes: 2}'),
)  # fmt: skip


# The pipeline file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed(("name: tiny", "name: my run/1")),
            "p.yaml:1: name: must be up to 64 letters (A to z), digits, '_', '-' and '.', the first a letter or digit, got",
        ),
        (
            changed(("name: tiny", "name: my run/1")),
            "got \"my run/1\"; 'my-run-1' would do",
        ),
        (changed(("name: tiny", "name: '€'")), 'the first a letter or digit, got "€"'),
        (
            changed(("- prune:", "- prnue:")),
            "1.prnue: unknown stage (there are: train, distill, prune, factorize, quantize, export); did you mean 'prune'?",
        ),
        (changed(("epochs: 1", "epoch: 1")), "p.yaml:11: stages.0.train.epoch: unknown key (allowed: epochs, "),
        (
            changed(("epochs: 1", "epochs: 1, optimizer: adm")),
            "p.yaml:11: stages.0.train.optimizer: must be 'sgd', 'adam', 'adamw' or 'rmsprop', got \"adm\"; did you mean 'adam'?",
        ),
        (changed(("epochs: 1", "epochs: '1'")), 'p.yaml:11: stages.0.train.epochs: must be a whole number, got "1"'),
    ],
)
def test_bad_settings(refused, text, message):
    for command in ("run", "validate"):
        assert message in refused(text, command=command)


def test_several_problems_are_told_at_once(compress):
    Path("p.yaml").write_text(changed(("name: tiny", "name: my run"), ("epochs", "epoch"), ("- prune:", "- prnue:")))
    first, second, third = compress("run", "p.yaml", "--set", "stages.0.train.batch_size=16")
    assert first.startswith("p.yaml:1: name: must be up to 64 letters")
    assert second.startswith("p.yaml:11: stages.0.train.epoch: unknown key")
    assert third.startswith("p.yaml:12: stages.1.prnue: unknown stage")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("quantize", "prune"), "'prune' cannot come after 'quantize' (stages.0, line 11): it takes a float model"),
        (("export", "export"), "'export' cannot come after 'export' (stages.0, line 11)"),
        (("export", "distill"), "'distill' cannot come after 'export' (stages.0, line 11)"),
    ],
)
def test_orders_that_cannot_work_name_both_stages(refused, stages, message):
    settings = {"distill": " {student: {factory: 'cifar:resnet20'}}"}
    text = FILE.partition("  - train")[0] + "".join(f"  - {name}:{settings.get(name, '')}\n" for name in stages)
    line = refused(text)
    assert line.startswith(f"p.yaml:12: stages.1: {message}")
    assert line.endswith("leave out one of the two" if stages[0] == stages[1] else f"put '{stages[1]}' before it")


@pytest.mark.parametrize(
    ("file", "near"),
    [("pp.yaml", "p.yaml"), ("p.yml", "p.yaml"), ("p", "p.yaml"), ("q.yaml", None), ("no/p.yaml", None)],
)
def test_a_missing_pipeline_file_is_told_with_its_nearest(compress, file, near):
    Path("p.yaml").write_text(FILE)
    assert compress("run", file) == [f"{file}: no such file" + (f"; did you mean '{near}'?" if near else "")]


def test_a_slip_in_the_folder_of_the_pipeline_file_is_found(compress):
    Path("pipelines").mkdir()
    Path("pipelines/p.yaml").write_text(FILE)
    assert compress("run", "piplines/p.yaml") == ["piplines/p.yaml: no such file; did you mean 'pipelines/p.yaml'?"]
    assert compress("run", "pipelines") == ["pipelines: is a folder, not a pipeline file; in it are p.yaml"]


# Files that are not there


@pytest.mark.parametrize("command", ["run", "validate"])
def test_everything_that_is_missing_is_told_at_once_with_its_line(compress, command):
    Path("best.pth").touch()
    Path("p.yaml").write_text(model("modle.py:make", weights="bset.pth").replace("root: data", "root: dta"))
    assert compress(command, "p.yaml") == [
        "p.yaml:6: data.root: no such folder or .npz file: dta; did you mean 'data'?",
        "p.yaml:9: model.weights: no such file: bset.pth; did you mean 'best.pth'?",
        "p.yaml:9: model.factory: no such file: modle.py; did you mean 'model.py'?",
    ]


@pytest.mark.parametrize(
    ("there", "text", "near"),
    [
        ("resnet56_cifar10.yaml", FILE.replace("root: data", "root: cifar10"), ""),
        ("cifar.npz", FILE.replace("root: data", "root: cifar10"), "; did you mean 'cifar.npz'?"),
        ("cifar.npz", IMAGES.replace("root: images", "root: cifar10"), ""),
        ("cifar/", IMAGES.replace("root: images", "root: cifar10"), "; did you mean 'cifar'?"),
        ("best.yaml", model(weights="bset.pth"), ""),
        ("best.pth/", model(weights="bset.pth"), ""),
        ("best.safetensors", model(weights="bset.pth"), "; did you mean 'best.safetensors'?"),
        ("model/", model("modle.py:make").replace("modle", "modell"), "; did you mean 'model.py'?"),
    ],
)
def test_only_what_could_be_meant_is_suggested(refused, there, text, near):
    if there.endswith("/"):
        Path(there).mkdir()
    else:
        Path(there).touch()
    line = refused(text)
    assert "no such " in line
    assert line.partition("; did you mean")[1:] == tuple(near.partition("; did you mean")[1:])


def test_what_is_missing_of_the_command_line_is_told_as_such(refused):
    line = refused(FILE, "--set", "data.root=dta")
    assert line == "--set: data.root: no such folder or .npz file: dta; did you mean 'data'?"
    line = refused(FILE, "--set", "model.weights=best.pht")
    assert line.startswith("--set: model.weights: must be a file that ends in .safetensors, .pth, ")
    assert line.endswith("got 'best.pht'")


# Factories


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("cifar:resnet65", "there is no 'cifar:resnet65'; did you mean 'resnet56'?"),
        ("cifar:vgg", "there is no 'cifar:vgg'; there are resnet20, resnet32, resnet44, resnet56, resnet110"),
        ("torchvision:resnet_18", "there is no 'torchvision:resnet_18'; did you mean 'resnet18'?"),
        ("timm:resnet18x", "there is no 'timm:resnet18x'; did you mean 'resnet18'?"),
        ("model.py:mak", "model.py has no callable 'mak'; did you mean 'make'?"),
        ("model.py:zzz", "model.py has no callable 'zzz'; it has Branches, Mortal, Separable, "),
        ("collections:OrderedDic", "collections has no callable 'OrderedDic'; did you mean 'OrderedDict'?"),
        ("cifr:resnet20", "'cifr:resnet20': No module named 'cifr'; did you mean 'cifar'?"),
        ("no_such:make", "'no_such:make': No module named 'no_such'; a file is named path/to/file.py:callable"),
    ],
)
def test_factories_that_do_not_exist(refused, factory, message):
    assert refused(model(factory)).startswith(f"p.yaml:9: model.factory: {message}")


def test_a_factory_that_fails_is_told_with_its_line(refused, project):
    number = (MODEL + MORE).splitlines().index("    raise KeyError(width)") + 1
    line = refused(model("model.py:fails", kwargs="{width: 3}"))
    assert (
        line == f"p.yaml:9: model: 'model.py:fails' fails with kwargs {{'width': 3}}: KeyError: 3 (model.py:{number})"
    )
    (project / "model.py").write_text("import torch\n\n1 / 0\n")
    assert refused(FILE).endswith("model.py: ZeroDivisionError: division by zero (model.py:3)")


# Models that do not fit the data


def test_a_forward_that_raises_is_told_with_its_line(refused):
    number = (MODEL + MORE).splitlines().index('        raise ValueError("no forward today")') + 1
    line = refused(model("model.py:stubborn"))
    assert line.startswith("p.yaml:9: model: the forward pass fails on inputs of shape (1, 12, 8): no forward today")
    assert line.endswith(f"(model.py:{number})")


@pytest.mark.parametrize(
    ("text", "answers"), [(model(kwargs="{num_classes: 10}"), "(2, 10)"), (model("model.py:short"), "(2, 3)")]
)
def test_another_number_of_classes(refused, text, answers):
    line = refused(text)
    assert line.startswith(f"p.yaml:9: model: answers {answers} for 2 samples, but the data has 4 classes")
    assert line.endswith("set its kwargs to {num_classes: 4}, or what its factory calls it")


def test_a_forward_that_is_random_in_evaluation(refused):
    told = "answers differently each time it is called in evaluation mode: dropout without training=self.training?"
    assert refused(model("model.py:wavering")) == f"p.yaml:9: model: {told}"
    line = refused(changed(("- prune: {target: {macs: 0.7}, recovery: null}",
                            "- distill: {student: {factory: 'model.py:wavering'}}")))  # fmt: skip
    assert line == f"p.yaml:12: stages.1.distill.student: {told}"


@pytest.mark.parametrize(
    ("factory", "kwargs", "remedy"),
    [
        ("model.py:make", "{channels: 3}", "; or set model.kwargs: {in_channels: 1}, or what its factory calls it"),
        ("cifar:resnet20", "{num_classes: 4}", "; or set model.kwargs: {in_channels: 1}"),
        ("timm:test_resnet", "{num_classes: 4}", "; or set model.kwargs: {in_chans: 1}"),
        ("torchvision:squeezenet1_1", "{num_classes: 4}", ""),
    ],
)
def test_grey_data_for_a_model_of_three_channels(refused, factory, kwargs, remedy):
    assert refused(model(factory, kwargs=kwargs)) == (
        f"p.yaml:9: model: takes inputs of 3 channels, but the data has 1: give data with 3 channels{remedy}"
    )


def test_rgb_data_for_a_model_of_one_channel(refused, project):
    for split in ("train", "validation", "test"):
        path = project / "data" / f"{split}_images.npy"
        np.save(path, np.load(path).repeat(3, axis=3))
    assert refused(FILE) == (
        "p.yaml:9: model: takes inputs of 1 channel, but the data has 3: give data with 1 channel; or set model.kwargs: "
        "{in_channels: 3}, or what its factory calls it"
    )
    text = IMAGES.replace("num_classes: 2", "num_classes: 2, in_channels: 1").replace("8\n", "8\n  channels: 3\n", 1)
    assert refused(text) == (
        "p.yaml:11: model: takes inputs of 1 channel, but the data has 3: set data.channels: 1 (p.yaml:8); or set "
        "model.kwargs: {in_channels: 3}"
    )


def test_a_students_channels_are_told_at_the_student(refused):
    line = refused(changed(("- prune: {target: {macs: 0.7}, recovery: null}",
                            "- distill: {student: {factory: 'cifar:resnet20', kwargs: {num_classes: 4}}}")))  # fmt: skip
    assert line.startswith("p.yaml:12: stages.1.distill.student: takes inputs of 3 channels, but the data has 1: ")
    assert line.endswith("or set stages.1.distill.student.kwargs: {in_channels: 1}")


# Weights that do not fit


def test_weights_that_are_not_finite(refused):
    space = {}
    exec(MODEL, space)
    state = space["Tiny"]().state_dict()
    state["conv2.bias"][1] = float("nan")
    torch.save(state, "nan.pth")
    line = refused(model(weights="nan.pth"))
    assert line == "p.yaml:9: model.weights: nan.pth: 'conv2.bias' holds values that are not finite"


@pytest.mark.parametrize(
    ("maker", "kwargs", "words"),
    [
        (
            "Tiny",
            {"num_classes": 10},
            [
                "2 tensors have another shape, first 'head.weight' (model (4, 32), file (10, 32))",
                "only the last layer differs: the file is for 10 classes, the model is made for 4",
                "set model.kwargs: {num_classes: 10}",
            ],
        ),
        (
            "Tiny",
            {"channels": 3},
            ["'conv1.weight' (model (16, 1, 3, 3), file (16, 3, 3, 3))", "the file is for 3 channels"],
        ),
        ("Tiny", {"width": 8}, ["first 'conv1.weight' (model (16, 1, 3, 3), file (8, 1, 3, 3))", "check model.kwargs"]),
        (
            "Separable",
            {},
            [
                "15 tensors are missing, first 'conv1.weight'",
                "10 tensors have no place in the model, first 'stem.weight'",
            ],
        ),
    ],
)
def test_weights_of_another_architecture(refused, maker, kwargs, words):
    space = {}
    exec(MODEL, space)
    torch.save(space[maker](**kwargs).state_dict(), "w.pth")
    line = refused(model(weights="w.pth"))
    assert line.startswith("p.yaml:9: model.weights: w.pth: does not fit the model: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, not the file itself"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not a file of weights; the download went wrong"),
        (b"", "is empty"),
        (b"PK\x03\x04 cut short", "cannot be read; the file is damaged, cut short, or no file of weights"),
    ],
)
def test_files_that_are_no_weights(refused, content, message):
    Path("w.pth").write_bytes(content)
    assert refused(model(weights="w.pth")).startswith(f"p.yaml:9: model.weights: w.pth: {message}")


# Data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: np.where(np.arange(len(y)) == 5, 9, y), "'train_labels'[5] is 9; with 4 classes labels are 0 to 3"),
        (lambda y: np.where(np.arange(len(y)) == 5, -1, y), "'train_labels'[5] is -1; labels are integers from 0"),
        (lambda y: y.astype(np.float64), "'train_labels' is float64 of shape (32,); labels must be integers"),
        (lambda y: y[:-3], "'train_images' has 32 samples, 'train_labels' has 29"),
    ],
)
def test_bad_labels(refused, change, message):
    labels = np.load("data/train_labels.npy")
    np.save("data/train_labels.npy", change(labels))
    assert refused(FILE).startswith(f"p.yaml:4: data: {message}")


def in_both(name):
    for split in ("train", "test"):
        os.mkdir(os.path.join(b"images", split.encode(), name))  # noqa: PTH102, PTH118  # Path takes no bytes


def empty_class():
    in_both(b"eel")


def no_images():
    for path in Path("images").rglob("*.png"):
        path.rename(path.with_suffix(".txt"))


def no_class_folders():
    for path in list(Path("images/train").rglob("*.png")):
        path.rename(Path("images/train", path.parent.name + path.name))
    for name in ("cat", "dog"):
        Path("images/train", name).rmdir()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (empty_class, "class folder images/train/eel holds no image (accepted: .bmp, .jpeg, "),
        (no_images, "class folder images/train/cat holds no image, nor does another (accepted: "),
        (no_class_folders, "images/train has no class folders; images belong in one folder per class, as in "),
    ],
)
def test_image_folders_without_images(refused, prepare, message):
    prepare()
    assert refused(IMAGES).startswith(f"p.yaml:4: data.train: {message}")


@pytest.mark.parametrize("command", ["run", "validate"])
def test_class_names_that_are_no_text(compress, command):
    try:
        in_both(b"c\xe9t")
    except OSError:
        pytest.skip("this file system takes no names but UTF-8")
    Path("p.yaml").write_text(IMAGES)
    assert compress(command, "p.yaml") == [
        rf"p.yaml:4: data.{split}: the name of the class folder b'c\xe9t' in images/{split} is not UTF-8 text; "
        "rename the folder"
        for split in ("train", "test")
    ]


# Damaged checkpoints


@pytest.fixture(scope="session")
def whole_checkpoint(shared_workshop):
    """A checkpoint folder with all files that a quantized one has."""
    from compress.checkpoint import Draft

    source = shared_workshop.source()
    model = shared_workshop.build(source)
    draft = Draft(source.arch, (), model, "int8", {"target": "x86-vnni"}, {"model.onnx": bytes(range(256))})
    return shared_workshop._keep(draft, source.history).path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is damaged: its SHA-256 is not the one in checkpoint.json"),
        ("model.onnx", "is damaged: its SHA-256 is not the one in checkpoint.json"),
        ("quantization.json", "is damaged: its SHA-256 is not the one in checkpoint.json"),
        ("checkpoint.json", "is damaged"),
    ],
)
def test_inspect_names_the_damaged_file(compress, whole_checkpoint, name, message):
    shutil.copytree(whole_checkpoint, "c")
    flip_a_bit(Path("c", name))
    (line,) = compress("inspect", "c")
    assert line.startswith(f"c/{name}: {message}")


def test_a_damaged_checkpoint_in_the_cache(compress, monkeypatch, capsys):
    Path("p.yaml").write_text(FILE)

    def succeed(*words):
        monkeypatch.setattr(sys, "argv", ["compress", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    succeed("run", "p.yaml", "--until", "source")
    (folder,) = Path("runs/tiny").glob("00-source-*")
    flip_a_bit(folder / "model.safetensors")
    (line,) = compress("run", "p.yaml", "--until", "source")
    assert line == (
        f"{folder}/model.safetensors: is damaged: its SHA-256 is not the one in checkpoint.json; remove the folder, or "
        "run with --fresh, to make it anew"
    )
    # Without its manifest a folder is no checkpoint: it would be made anew, and that is said.
    flip_a_bit(folder / "checkpoint.json")
    assert f"the checkpoint {folder.name} is damaged" in succeed("validate", "p.yaml", "--until", "source")


# Places that cannot be written


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_run_below_a_file(compress, command):
    Path("p.yaml").write_text(FILE)
    Path("file").touch()
    assert compress(command, "p.yaml", "--runs", "file/runs") == [
        "file/runs/tiny: the run cannot be written there: file is not a folder; name another with --runs"
    ]
    Path("runs").mkdir()
    Path("runs/tiny").touch()
    (line,) = compress(command, "p.yaml")
    assert line.startswith("runs/tiny: the run cannot be written there: runs/tiny is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_without_permission(compress):
    Path("p.yaml").write_text(FILE)
    Path("runs").mkdir(mode=0o500)
    assert compress("run", "p.yaml") == [
        "runs/tiny: the run cannot be written there: no permission to write in runs; name another with --runs"
    ]
