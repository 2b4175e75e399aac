"""torchvision's sets, on tiny files in the formats of MNIST (train=), GTSRB (split=) and EuroSAT (neither)."""

import numpy as np
import pytest
import torch
from PIL import Image

from compress.config.data import TorchvisionConfig, Validation
from compress.data import torchvision_sets
from compress.data.load import load_data
from compress.errors import DataError

RNG = np.random.default_rng(0)
FROM_TEST = Validation.model_validate({"from": "test", "size": 10})


def mnist(root, name="MNIST", n=40):
    """Files in the idx format: a magic number, sizes as big-endian int32, then the bytes."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        pictures = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return root


def picture(path, width, height):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def gtsrb(root):
    base = root / "gtsrb"
    for i in range(16):
        picture(base / "GTSRB" / "Training" / f"{i % 2:05}" / f"{i}.ppm", 10 + i, 12)
    lines = ["Filename;ClassId"]
    for i in range(4):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", 9, 12 + i)
        lines.append(f"{i}.ppm;{i % 2}")
    (base / "GT-final_test.csv").write_text("\n".join(lines))
    return root


def eurosat(root):
    for i in range(20):
        picture(root / "eurosat" / "2750" / ("Forest", "River")[i % 2] / f"{i}.png", 9, 6)
    return root


def config(root, name, **settings):
    return TorchvisionConfig(kind="torchvision", name=name, root=root, **settings)


def test_set_with_train_argument(tmp_path):
    data = load_data(config(mnist(tmp_path), "MNIST", channels=1, validation=FROM_TEST), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 30)
    assert data.inputs[0].shape == (1, 28, 28)
    assert data.classes[3] == "3 - three"
    stored = np.random.default_rng(40).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    batch = next(data.train.batches(40))
    back = (batch.inputs[0] * data.inputs[0].std[0] + data.inputs[0].mean[0]).mul(255).round().to(torch.uint8)
    assert np.array_equal(back[:, 0].numpy(), stored)


def test_grey_set_as_three_channels_resized(tmp_path):
    data = load_data(config(mnist(tmp_path, "KMNIST"), "KMNIST", image_size=16, validation=FROM_TEST), seed=0)
    assert data.inputs[0].shape == (3, 16, 16)


def test_set_with_split_argument_and_images_of_many_sizes(tmp_path):
    with pytest.raises(DataError, match=r"data.image_size: GTSRB has images of 12×10 and 12×20 pixels; set one size"):
        load_data(config(gtsrb(tmp_path), "GTSRB"), seed=0)
    data = load_data(config(tmp_path, "GTSRB", image_size=8), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (14, 2, 4)
    assert data.inputs[0].shape == (3, 8, 8)


def test_set_without_a_test_split(tmp_path):
    data = load_data(config(eurosat(tmp_path), "EuroSAT", test_size=0.5), seed=0)
    assert data.classes == ("Forest", "River")
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 10)
    assert data.inputs[0].shape == (3, 6, 9)


def test_too_large_sets_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_sets, "MAX_DECODED_BYTES", 10_000)
    with pytest.raises(DataError, match=r"MNIST train decodes to .* GB, more than 0; set a smaller data.image_size"):
        load_data(config(mnist(tmp_path), "MNIST"), seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cifar10", "data.name: torchvision.datasets has no 'Cifar10'; did you mean 'CIFAR10'"),
        ("ImageFolder", "data.name: ImageFolder reads your own files; use `kind: image_folder`"),
        ("CIFAR10", "data.root: CIFAR10 is not in .*; `download: true` fetches it"),
        ("EMNIST", "data.name: EMNIST needs the argument 'split'; use `kind: python`"),
    ],
)
def test_refused_names(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path, name), seed=0)


def test_no_such_root(tmp_path):
    with pytest.raises(DataError, match=r"data.root: no such folder: .*x; `download: true` fetches the files"):
        load_data(config(tmp_path / "x", "MNIST"), seed=0)


def test_failed_download_is_one_message(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("network is unreachable\nsecond line")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=r"CIFAR10 could not be fetched into .*: network is unreachable$"):
        load_data(config(tmp_path, "CIFAR10", download=True), seed=0)


def test_set_that_is_no_classification(tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(DataError, match=r"data.name: CocoDetection needs the argument 'annFile'"):
        load_data(config(tmp_path, "CocoDetection"), seed=0)
