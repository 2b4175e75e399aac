"""Fingerprints: the same wherever the data lies, different where it differs, without torch."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from compress.config.data import (
    ArraysConfig,
    Augment,
    DigitsConfig,
    ImageFolderConfig,
    PythonConfig,
    TorchvisionConfig,
)
from compress.data.files import torchvision_names
from compress.data.fingerprint import fingerprint, missing
from compress.errors import DataError
from compress.names import callable_file


def arrays(root):
    root.mkdir()
    np.save(root / "train_images.npy", np.zeros((4, 2, 3), np.uint8))
    np.save(root / "train_labels.npy", np.arange(4))
    return ArraysConfig(kind="arrays", root=root)


def archive(root):
    root.mkdir()
    np.savez(root / "a.npz", train_images=np.zeros((4, 2, 3), np.uint8), train_labels=np.arange(4))
    return ArraysConfig(kind="arrays", root=root / "a.npz")


def folder(root):
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "train" / name / "1.png")
    return ImageFolderConfig(kind="image_folder", root=root, test=None)


def torchvision_set(root):
    (root / "MNIST" / "raw").mkdir(parents=True)
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"12345")
    return TorchvisionConfig(kind="torchvision", name="MNIST", root=root)


def own(root):
    root.mkdir()
    (root / "own.py").write_text("def load(): ...\n")
    return PythonConfig(kind="python", callable=f"{root / 'own.py'}:load")


def touched(path):
    path.write_bytes(path.read_bytes() + b"#")
    os.utime(path, ns=(1, 1))


KINDS = {
    "arrays": (arrays, "train_images.npy"),
    "archive": (archive, "a.npz"),
    "image_folder": (folder, "train/cat/1.png"),
    "torchvision": (torchvision_set, "MNIST/raw/train-images-idx3-ubyte"),
    "python": (own, "own.py"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_moving_the_folder_changes_nothing(tmp_path, kind):
    make, _ = KINDS[kind]
    config = make(tmp_path / "here")
    before = fingerprint(config)
    assert str(tmp_path) not in json.dumps(before)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "elsewhere" / "there")
    key = "callable" if kind == "python" else "root"
    moved = str(getattr(config, key)).replace("here", "elsewhere/there", 1)
    config = config.model_copy(update={key: moved if kind == "python" else type(config.root)(moved)})
    assert fingerprint(config) == before


@pytest.mark.parametrize("kind", KINDS)
def test_changed_content_changes_it(tmp_path, kind):
    make, file = KINDS[kind]
    config = make(tmp_path / "here")
    before = fingerprint(config)
    path = tmp_path / "here" / file
    if kind == "torchvision":
        path.write_bytes(b"longer than it was")
    elif kind == "archive":
        np.savez(path, train_images=np.ones((4, 2, 3), np.uint8), train_labels=np.arange(4))
    else:
        touched(path)
    assert fingerprint(config) != before


def test_settings_belong_to_it_but_not_how_files_are_read(tmp_path):
    config = folder(tmp_path / "here")
    before = fingerprint(config)
    assert fingerprint(config.model_copy(update={"workers": 7})) == before
    assert fingerprint(config.model_copy(update={"image_size": 7})) != before
    assert fingerprint(config.model_copy(update={"augment": Augment(flip=True)})) != before


def test_new_image_changes_it(tmp_path):
    config = folder(tmp_path / "here")
    before = fingerprint(config)
    shutil.copy(tmp_path / "here/train/cat/1.png", tmp_path / "here/train/cat/2.png")
    after = fingerprint(config)
    assert (before["content"]["files"], after["content"]["files"]) == (2, 3)
    assert before != after


def test_digits():
    assert fingerprint(DigitsConfig(kind="digits")) == fingerprint(DigitsConfig(kind="digits"))
    assert fingerprint(DigitsConfig(kind="digits")) != fingerprint(DigitsConfig(kind="digits", image_size=8))


def test_torchvision_files_are_the_sets_own(tmp_path):
    config = torchvision_set(tmp_path / "root")
    before = fingerprint(config)
    (tmp_path / "root" / "cifar-10-batches-py").mkdir()
    (tmp_path / "root" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"1")
    (tmp_path / "root" / "cifar-100-python").mkdir()
    (tmp_path / "root" / "cifar-100-python" / "train").write_bytes(b"2")
    (tmp_path / "root" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"3")
    assert fingerprint(config) == before
    cifar = fingerprint(TorchvisionConfig(kind="torchvision", name="CIFAR10", root=tmp_path / "root"))
    assert cifar["content"]["files"] == {"cifar-10-batches-py/data_batch_1": 1}


def test_torchvision_before_the_download(tmp_path):
    config = TorchvisionConfig(kind="torchvision", name="MNIST", root=tmp_path / "new", download=True)
    assert missing(config) == []
    assert fingerprint(config)["content"]["files"] is None


def test_missing_lists_every_problem(tmp_path):
    config = ImageFolderConfig(kind="image_folder", root=tmp_path, train="a", test="b")
    problems = missing(config)
    assert [(problem.where, problem.key) for problem in problems] == [("", "data.train"), ("", "data.test")]
    with pytest.raises(DataError, match=r"data.train: no such folder: .*\ndata.test: no such folder: "):
        fingerprint(config)


def test_missing_of_an_unreadable_archive(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    problem = missing(ArraysConfig(kind="arrays", root=tmp_path / "a.npz"))[0]
    assert (problem.key, "is not a readable .npz file" in problem.message) == ("data.root", True)


def test_modules_are_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "never_imported"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "sets.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    assert callable_file("never_imported.sets:load") == package / "sets.py"
    assert callable_file("never_imported.other:load") is None
    assert callable_file("never_imported.sets.deeper:load") is None
    assert "never_imported" not in sys.modules


def test_torchvision_names_are_the_librarys():
    import torchvision.datasets

    assert torchvision_names() == tuple(torchvision.datasets.__all__)


def test_fingerprint_imports_no_torch():
    code = """
import sys
from compress.config.data import DigitsConfig, TorchvisionConfig
from compress.data.fingerprint import fingerprint, missing
fingerprint(DigitsConfig(kind="digits"))
missing(TorchvisionConfig(kind="torchvision", name="CIFAR1O", root="/nowhere"))
print(sorted({"torch", "torchvision", "sklearn", "PIL"} & set(sys.modules)))
"""
    code = code.replace('root="/nowhere"', 'root=__import__("pathlib").Path("/nowhere")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
