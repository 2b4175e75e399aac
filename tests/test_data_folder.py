"""Image folders: geometry as torchvision's, EXIF, modes, determinism over workers, messages."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from compress.config.data import Augment, ImageFolderConfig, Normalize, Validation
from compress.data import folder as folder_module
from compress.data.images import centre, open_image, pixels, random_crop
from compress.data.load import load_data
from compress.errors import DataError

PLAIN = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def picture(seed, width=23, height=17, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def tree(root, splits=("train", "test"), classes=("cat", "dog"), n=6):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                picture(100 * s + 10 * c + i, width=23 + i).save(root / split / name / f"{i}.png")
    return root


def config(root, **settings):
    settings = {"image_size": 8, "resize": 10, "workers": 0} | settings
    return ImageFolderConfig(kind="image_folder", root=root, **settings)


def whole(split, **kwargs):
    return torch.cat([batch.inputs[0] for batch in split.batches(5, **kwargs)])


def test_splits_classes_and_geometry(tmp_path):
    validation = Validation.model_validate({"from": "test", "size": 4})
    data = load_data(config(tree(tmp_path), normalize=PLAIN, validation=validation), seed=0)
    assert data.classes == ("cat", "dog")
    assert data.inputs[0].shape == (3, 8, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 8)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    reference = transforms.Compose([transforms.Resize(10), transforms.CenterCrop(8), transforms.ToTensor()])
    expected = [
        reference(Image.open(tmp_path / "train" / name / f"{i}.png")) for name in ("cat", "dog") for i in range(6)
    ]
    assert torch.equal(whole(data.train), torch.stack(expected))


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (9, 40), (8, 8)])
def test_centre_is_torchvisions(size):
    image = picture(0, *size)
    reference = transforms.Compose([transforms.Resize(11), transforms.CenterCrop(8)])
    assert np.array_equal(np.asarray(centre(image, 11, 8)), np.asarray(reference(image)))


def test_statistics_are_measured_on_the_train_split(tmp_path):
    data = load_data(config(tree(tmp_path)), seed=0)
    train = whole(data.train)
    assert train.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (train.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


def test_statistics_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.data.load._MEASURED_FILES", 4)
    root = tree(tmp_path)
    assert load_data(config(root), seed=0).inputs == load_data(config(root), seed=0).inputs


def test_given_validation_and_test_split_off_train(tmp_path):
    root = tree(tmp_path, splits=("train", "val"))
    settings = config(
        root, test=None, given="val", test_size=0.5, validation=Validation.model_validate({"from": "given"})
    )
    data = load_data(settings, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 12, 6)


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "cores", lambda: 2)
    root = tree(tmp_path)
    found = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for workers in (0, 2):
        settings = config(root, workers=workers, normalize=PLAIN, augment=Augment(crop=1, flip=True))
        data = load_data(settings, seed=0)
        found.append((whole(data.train, seed=3), whole(data.train)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_drawn_per_seed_and_image(tmp_path):
    settings = config(tree(tmp_path), normalize=PLAIN, augment=Augment(crop=1, flip=True))
    train = load_data(settings, seed=0).train
    one = torch.cat([b.inputs[0] for b in train.batches(3, seed=3)])
    assert torch.equal(one, whole(train, seed=3))
    assert not torch.equal(one, whole(train, seed=4))
    assert [len(b.labels) for b in train.batches(4, seed=3, drop_last=True)] == [4] * (len(train) // 4)


def test_crop_zero_keeps_the_centre_and_flip_only_mirrors(tmp_path):
    root = tree(tmp_path)
    plain = load_data(config(root, normalize=PLAIN), seed=0).train
    flipped = load_data(config(root, normalize=PLAIN, augment=Augment(flip=True)), seed=0).train
    mirrored = 0
    for one, other in zip(whole(plain, seed=1), whole(flipped, seed=1), strict=True):
        assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
        mirrored += not torch.equal(one, other)
    assert 0 < mirrored < len(plain)


def test_take_and_other_splits_are_not_augmented(tmp_path):
    settings = config(tree(tmp_path), normalize=PLAIN, augment=Augment(crop=1, flip=True))
    data = load_data(settings, seed=0)
    taken = data.train.take([4, 0, 0])
    assert torch.equal(whole(taken), whole(data.train)[[4, 0, 0]])
    key = lambda rows: sorted(row.numpy().tobytes() for row in rows)  # noqa: E731
    for split in (taken, data.test):
        assert key(whole(split, seed=2)) == key(whole(split))


def test_random_crop_of_very_long_images():
    rng = np.random.default_rng(0)
    for size in ((400, 2), (2, 400), (1, 1), (50, 40)):
        assert random_crop(picture(0, *size), 8, rng).size == (8, 8)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(0, width=20, height=10)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270°
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png", 3)
    assert found.size == (10, 20)
    assert np.array_equal(np.asarray(found), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_modes(tmp_path):
    grey = picture(0, mode="L")
    saved = {
        "grey": grey,
        "alpha": grey.convert("RGBA"),
        "sixteen": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
    }
    for name, image in saved.items():
        image.save(tmp_path / f"{name}.png")
        for channels in (1, 3):
            found = pixels(open_image(tmp_path / f"{name}.png", channels))
            assert found.shape == (channels, 17, 23)
            assert np.array_equal(found[0], np.asarray(grey)), (name, channels)
    palette = picture(1).quantize(16)
    palette.info["transparency"] = bytes(range(16))
    palette.save(tmp_path / "palette.png")
    assert pixels(open_image(tmp_path / "palette.png", 3)).shape == (3, 17, 23)


def test_32_bit_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(DataError, match=r"depth.tiff cannot be decoded: it has 32-bit pixels"):
        open_image(tmp_path / "depth.tiff", 1)


def test_hidden_files_are_no_images(tmp_path):
    root = tree(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "._0.png").write_bytes(b"AppleDouble")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    data = load_data(config(root, validation=Validation.model_validate({"from": "test"})), seed=0)
    assert data.classes == ("cat", "dog")
    assert len(data.train) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_image_is_named_without_a_traceback(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(folder_module, "cores", lambda: 2)
    root = tree(tmp_path)
    cut = io.BytesIO()
    picture(5).save(cut, format="PNG")
    (root / "train" / "dog" / "3.png").write_bytes(cut.getvalue()[:300])
    validation = Validation.model_validate({"from": "test", "size": 2})
    data = load_data(config(root, normalize=PLAIN, validation=validation, workers=workers), seed=0)
    with pytest.raises(DataError, match=r"dog/3.png cannot be decoded") as caught:
        whole(data.train)
    assert "Traceback" not in str(caught.value)


def empty_class(root):
    (root / "train" / "owl").mkdir()
    (root / "test" / "owl").mkdir()


def other_class(root):
    (root / "test" / "dogs").mkdir()


def no_classes(root):
    (root / "new").mkdir()


@pytest.mark.parametrize(
    ("prepare", "settings", "message"),
    [
        (empty_class, {}, r"data.train: class folder .*owl holds no image \(accepted: .bmp, .jpeg, "),
        (
            other_class,
            {},
            "data.root: .*the test folder has the class 'dogs', the train folder has not; did you mean 'dog'",
        ),
        (no_classes, {"train": "new"}, "data.train: .*new has no class folders"),
        (None, {"train": "trian"}, r"data.train: no such folder: .*trian; did you mean 'train'\?"),
        (None, {"resize": 7}, r"data.resize: must be at least image_size \(8\), got 7"),
        (None, {"validation": Validation.model_validate({"from": "given"})}, "data.given: must name the folder"),
        (None, {"channels": 1, "normalize": PLAIN}, "data.normalize: has 3 values, the images 1 channels"),
    ],
)
def test_refused_folders(tmp_path, prepare, settings, message):
    root = tree(tmp_path)
    if prepare:
        prepare(root)
    with pytest.raises(DataError, match=message):
        load_data(config(root, **settings), seed=0)


def test_no_such_root(tmp_path):
    with pytest.raises(DataError, match=r"data.root: no such folder: .*pets"):
        load_data(config(tmp_path / "pets"), seed=0)
