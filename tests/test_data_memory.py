"""Digits and arrays: what is read, how it is normalised and augmented, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.config.data import ArraysConfig, Augment, DigitsConfig, Normalize, Validation
from compress.data.arrays import find_layout
from compress.data.augment import Moves, draw_moves, move
from compress.data.base import Input
from compress.data.load import load_data
from compress.data.normalise import measure, normalise
from compress.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared"
FROM_TEST = Validation.model_validate({"from": "test", "size": 10})


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write(root, *, form="folder", **arrays):
    if form == "npz":
        np.savez(root / "set.npz", **arrays)
        return root / "set.npz"
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    return root


def small_set(root, *, shape=(6, 9, 3), form="folder", **changes):
    """40 training and 20 test samples of 4 classes, non-square."""
    arrays = {
        "train_images": images(40, *shape),
        "train_labels": np.arange(40) % 4,
        "test_images": images(20, *shape, seed=1),
        "test_labels": np.arange(20) % 4,
    }
    return write(root, form=form, **{name: array for name, array in (arrays | changes).items() if array is not None})


def config(root, **settings):
    return ArraysConfig(kind="arrays", root=root, **settings)


def whole(split, **kwargs):
    batches = list(split.batches(7, **kwargs))
    return torch.cat([b.inputs[0] for b in batches]), torch.cat([b.labels for b in batches])


# Digits


def test_digits():
    data = load_data(DigitsConfig(kind="digits"), seed=0)
    assert data.classes == tuple("0123456789")
    assert data.inputs[0].shape == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (1222, 216, 359)
    batch = next(data.train.batches(16))
    (inputs,) = batch.inputs
    assert inputs.shape == (16, 3, 32, 32)
    assert inputs.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert inputs.is_contiguous()
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert torch.equal(batch.labels, data.train.labels[:16])


def test_digits_are_normalised_with_the_train_split():
    data = load_data(DigitsConfig(kind="digits", image_size=8, channels=1), seed=3)
    train, _ = whole(data.train)
    assert train.mean().item() == pytest.approx(0, abs=1e-4)
    assert train.std().item() == pytest.approx(1, abs=1e-4)
    validation, _ = whole(data.validation)
    assert abs(validation.mean().item()) > 1e-4


def test_digits_at_their_own_size_are_the_stored_values():
    from sklearn.datasets import load_digits

    plain = Normalize(mean=(0.0,), std=(1.0,))
    data = load_data(DigitsConfig(kind="digits", image_size=8, channels=1, normalize=plain), seed=0)
    found = {image.numpy().tobytes() for split in (data.train, data.validation, data.test) for image in whole(split)[0]}
    stored = {(image / 16).astype(np.float32).tobytes() for image in load_digits().images}
    assert found == stored


# Arrays


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_arrays_of_uint8_images(tmp_path, form):
    root = small_set(tmp_path, form=form)
    settings = config(root, normalize=Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), validation=FROM_TEST)
    data = load_data(settings, seed=0)
    assert data.inputs[0].shape == (3, 6, 9)
    assert data.classes == ("0", "1", "2", "3")
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 10)
    inputs, labels = whole(data.train)
    scaled = images(40, 6, 9, 3).astype(np.float32) / np.float32(255)
    expected = (scaled - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    assert torch.equal(inputs, torch.from_numpy(expected.transpose(0, 3, 1, 2)))
    assert labels.tolist() == [i % 4 for i in range(40)]


def test_measured_statistics_are_those_of_the_train_split(tmp_path):
    data = load_data(config(small_set(tmp_path), validation=FROM_TEST), seed=0)
    scaled = images(40, 6, 9, 3) / 255
    assert data.inputs[0].mean == pytest.approx(scaled.mean(axis=(0, 1, 2)), abs=1e-6)
    assert data.inputs[0].std == pytest.approx(scaled.std(axis=(0, 1, 2)), abs=1e-6)


def test_train_split_off_is_kept_out_of_the_statistics(tmp_path):
    pictures = np.zeros((40, 5, 7, 1), np.uint8)
    root = small_set(tmp_path, train_images=pictures, test_images=None, test_labels=None)
    data = load_data(config(root), seed=0)
    held_out = [*(data.validation.labels.tolist()), *(data.test.labels.tolist())]
    assert len(held_out) == 8 + 5
    assert data.inputs[0].mean == (0.0,)
    assert data.inputs[0].std == (1.0,), "a constant channel must not divide by zero"


def test_constant_channel_normalises_to_zero():
    grey = torch.full((2, 1, 2, 3), 0.25)
    mean, std = measure([grey])
    assert (mean, std) == ((0.25,), (1.0,))
    assert torch.equal(normalise(grey, mean, std), torch.zeros_like(grey))


def test_given_validation(tmp_path):
    root = small_set(tmp_path, validation_images=images(8, 6, 9, 3), validation_labels=np.arange(8) % 4)
    data = load_data(config(root, validation=Validation.model_validate({"from": "given"})), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 8, 20)


def test_layouts_give_the_same_images(tmp_path):
    found = []
    for name, axes, settings in (
        ("a", (0, 1, 2, 3), {}),
        ("b", (0, 3, 1, 2), {}),
        ("c", (0, 3, 1, 2), {"layout": "nchw"}),
    ):
        (tmp_path / name).mkdir()
        changed = {
            k: images(n, 6, 9, 3, seed=s).transpose(axes)
            for k, n, s in (("train_images", 40, 0), ("test_images", 20, 1))
        }
        found.append(whole(load_data(config(small_set(tmp_path / name, **changed), **settings), seed=0).train)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_floats_in_zero_to_one_are_images(tmp_path):
    floats = {
        name: (images(n, 6, 9, 3, seed=s) / 255) for name, n, s in (("train_images", 40, 0), ("test_images", 20, 1))
    }
    (tmp_path / "float").mkdir()
    given = load_data(config(small_set(tmp_path / "float", **floats)), seed=0)
    (tmp_path / "uint8").mkdir()
    stored = load_data(config(small_set(tmp_path / "uint8")), seed=0)
    torch.testing.assert_close(whole(given.train)[0], whole(stored.train)[0])


def test_grey_images_without_a_channel_axis(tmp_path):
    data = load_data(config(small_set(tmp_path, shape=(6, 9))), seed=0)
    assert data.inputs[0].shape == (1, 6, 9)
    assert len(data.inputs[0].mean) == 1


@pytest.mark.parametrize("settings", [{}, {"layout": "any"}])
def test_other_tensors_are_passed_through(tmp_path, settings):
    values = np.random.default_rng(0).normal(0, 50, (40, 11))
    root = small_set(tmp_path, train_images=values, test_images=values[:20].astype(">f4"))
    data = load_data(config(root, validation=FROM_TEST, **settings), seed=0)
    assert data.inputs == (Input("input", (11,)),)
    inputs, _ = whole(data.train)
    assert torch.equal(inputs, torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((5, 6, 9, 3), "uint8", "nhwc"),
        ((5, 3, 6, 9), "uint8", "nchw"),
        ((5, 3, 6, 9), "float32", "nchw"),
        ((5, 6, 9), "uint8", "nhw"),
        ((5, 6, 9), "float32", "any"),
        ((5, 6), "float64", "any"),
        ((5, 6, 9, 3, 2), "float32", "any"),
        ((5, 12), "int64", "any"),
        ((5, 6, 9, 3), "int32", "any"),
    ],
)
def test_auto_layout(shape, dtype, layout):
    assert find_layout(shape, np.dtype(dtype), "auto", "x", "say which") == layout


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 3, 9, 3), "uint8", "both the second and the last axis could be the channels.*say which"),
        ((5, 7, 9, 5), "float32", "neither the second nor the last axis.*say which"),
        ((5, 7), "uint8", "holds no images; say which"),
        ((5, 6, 9, 3), "int16", "images must be uint8, or floats .*say which"),
        ((5, 6, 9, 3), "bool", "images must be uint8, or floats"),
        ((5, 6), "complex64", "holds complex64"),
    ],
)
def test_unclear_layout(shape, dtype, message):
    with pytest.raises(DataError, match=message):
        find_layout(shape, np.dtype(dtype), "auto", "x", "say which")


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


FLOATS = images(40, 6, 9, 3) / 255
LABELS = np.arange(40) % 4


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"train_labels": LABELS[:39]}, {}, "'train_images' has 40 samples, 'train_labels' has 39"),
        ({"train_labels": changed(LABELS, 7, -1)}, {}, r"'train_labels'\[7\] is -1; labels are integers from 0"),
        ({"train_labels": LABELS.astype(float)}, {}, "'train_labels' is float64 of shape .*must be integers"),
        ({"train_labels": LABELS[:, None]}, {}, r"shape \(40, 1\); labels must be integers of shape \(n,\)"),
        (
            {"train_labels": LABELS + 1, "test_labels": LABELS[:20] + 1},
            {},
            "go up to 4 but 0 never occurs; labels count from 0",
        ),
        ({}, {"classes": ("a", "b", "c")}, r"'train_labels'\[3\] is 3; with 3 classes labels are 0 to 2"),
        ({"train_labels": LABELS % 3}, {}, "class '3' occurs in the validation split but never in the train split"),
        (
            {"train_images": changed(FLOATS, (5, 1, 1, 0), np.nan)},
            {},
            r"'train_images'\[5\] holds a value that is not fin",
        ),
        (
            {"train_images": changed(FLOATS, (6, 1, 1, 0), 1.5)},
            {},
            r"'train_images'\[6\] holds values from .* to 1.5;.*layout",
        ),
        ({"test_images": images(20, 6, 8, 3)}, {}, r"'test_images' has samples uint8 \(6, 8, 3\), 'train_images' has"),
        ({"train_images": np.array([{}] * 40)}, {}, "'train_images' in .* cannot be read: .*Python objects"),
        ({}, {"normalize": Normalize(mean=(0.5,), std=(0.5,))}, "data.normalize: has 1 values, the images 3 channels"),
        ({}, {"augment": Augment(crop=6)}, r"data.augment.crop: shifts by up to 6 pixels, the images are \(6, 9\)"),
        ({}, {"layout": "any", "augment": Augment(flip=True)}, "data.augment: is for images"),
        ({}, {"layout": "any", "normalize": Normalize(mean=(0.5,), std=(0.5,))}, "data.normalize: is for images"),
        ({"test_labels": None}, {}, r"data.labels: no array 'test_labels' in .* did you mean 'test_images'"),
        ({}, {"inputs": "{split}_imags"}, "data.inputs: no array 'train_imags' .* did you mean 'train_images'"),
        ({}, {"labels": "train_labels"}, "data.labels: must contain {split}"),
        ({}, {"validation": Validation.model_validate({"from": "given"})}, "no array 'validation_images'"),
    ],
)
def test_refused_arrays(tmp_path, changes, settings, message):
    settings = {"validation": FROM_TEST} | settings
    if "train_images" in changes and changes["train_images"].dtype == float:
        changes = {"test_images": FLOATS[:20]} | changes
    with pytest.raises(DataError, match=message):
        load_data(config(small_set(tmp_path, **changes), **settings), seed=0)


def test_missing_root_names_the_nearest(tmp_path):
    (tmp_path / "cifar").mkdir()
    with pytest.raises(DataError, match=r"data.root: no such folder or .npz file: .*cifa; did you mean 'cifar'\?"):
        load_data(config(tmp_path / "cifa"), seed=0)


def test_damaged_files(tmp_path):
    (tmp_path / "set.npz").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"set.npz is not a readable .npz file"):
        load_data(config(tmp_path / "set.npz"), seed=0)
    root = small_set(tmp_path)
    whole_file = (root / "train_images.npy").read_bytes()
    (root / "train_images.npy").write_bytes(whole_file[:500])
    with pytest.raises(DataError, match=r"array 'train_images' in .*train_images.npy cannot be read"):
        load_data(config(root), seed=0)


# Batches


def test_batches_sizes_and_drop_last(tmp_path):
    train = load_data(config(small_set(tmp_path), validation=FROM_TEST), seed=0).train
    assert [len(b.labels) for b in train.batches(16)] == [16, 16, 8]
    assert [len(b.labels) for b in train.batches(16, drop_last=True)] == [16, 16]
    assert len(train) == 40


def test_batches_are_deterministic_and_leave_the_global_generator_alone(tmp_path):
    settings = config(small_set(tmp_path), augment=Augment(crop=2, flip=True), validation=FROM_TEST)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = whole(load_data(settings, seed=0).train, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(3)
    again = whole(load_data(settings, seed=0).train, seed=5)
    other = whole(load_data(settings, seed=0).train, seed=6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_augmentation_does_not_depend_on_the_batch_size(tmp_path):
    settings = config(small_set(tmp_path), augment=Augment(crop=2, flip=True), validation=FROM_TEST)
    train = load_data(settings, seed=0).train
    one = torch.cat([b.inputs[0] for b in train.batches(40, seed=5)])
    many = torch.cat([b.inputs[0] for b in train.batches(3, seed=5)])
    assert torch.equal(one, many)


def test_only_the_seeded_train_split_is_augmented(tmp_path):
    root = small_set(tmp_path)
    plain = load_data(config(root, validation=FROM_TEST), seed=0)
    augmented = load_data(config(root, validation=FROM_TEST, augment=Augment(crop=2, flip=True)), seed=0)
    assert torch.equal(whole(augmented.train)[0], whole(plain.train)[0])
    assert not torch.equal(whole(augmented.train, seed=1)[0], whole(plain.train, seed=1)[0])
    for name in ("validation", "test"):
        one, other = getattr(augmented, name), getattr(plain, name)
        assert torch.equal(whole(one, seed=1)[0], whole(other, seed=1)[0])
    assert torch.equal(whole(augmented.train.take(range(40)), seed=1)[0], whole(plain.train.take(range(40)), seed=1)[0])


def test_seed_shuffles_all_samples(tmp_path):
    train = load_data(config(small_set(tmp_path), validation=FROM_TEST), seed=0).train
    ordered, shuffled = whole(train)[0], whole(train, seed=1)[0]
    assert not torch.equal(ordered, shuffled)
    key = lambda rows: sorted(row.numpy().tobytes() for row in rows)  # noqa: E731
    assert key(ordered) == key(shuffled)


def test_take_keeps_order_and_nests(tmp_path):
    train = load_data(config(small_set(tmp_path), validation=FROM_TEST), seed=0).train
    inputs, labels = whole(train)
    taken = train.take([9, 3, 3, 20]).take([2, 0])
    assert torch.equal(whole(taken)[0], inputs[[3, 9]])
    assert torch.equal(taken.labels, labels[[3, 9]])
    assert taken.name == "train"


def test_decisions_have_no_test_split(tmp_path):
    decisions = load_data(config(small_set(tmp_path)), seed=0).for_decisions()
    assert not hasattr(decisions, "test")


# Augmentation, on non-square images


def moves(down, right, mirror):
    return Moves(torch.tensor([down]), torch.tensor([right]), torch.tensor([mirror]))


def test_move_shifts_and_repeats_the_edge():
    image = torch.arange(1.0, 31.0).view(1, 2, 3, 5)
    moved = move(image, moves(1, -2, False))
    assert torch.equal(moved[..., 1:, :3], image[..., :2, 2:])
    assert torch.equal(moved[..., 0, :], moved[..., 1, :])
    assert torch.equal(moved[..., 3:], moved[..., 2:3].expand(1, 2, 3, 2))


def test_move_mirrors_left_to_right_after_the_shift():
    image = torch.arange(1.0, 31.0).view(1, 2, 3, 5)
    assert torch.equal(move(image, moves(0, 0, True)), image.flip(-1))
    assert torch.equal(move(image, moves(2, 1, True)), move(image, moves(2, 1, False)).flip(-1))


def test_each_image_gets_its_own_move():
    batch = torch.randn(6, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    drawn = draw_moves(6, Augment(crop=3, flip=True), torch.Generator().manual_seed(1))
    together = move(batch, drawn)
    for i in range(6):
        assert torch.equal(together[i : i + 1], move(batch[i : i + 1], drawn.of(torch.tensor([i]))))


def test_moves_are_uniform_and_within_range():
    drawn = draw_moves(20_000, Augment(crop=2, flip=True), torch.Generator().manual_seed(0))
    for shift in (drawn.down, drawn.right):
        assert shift.unique().tolist() == [-2, -1, 0, 1, 2]
        assert torch.bincount(shift + 2).min() > 3_700
    assert 0.48 < drawn.mirror.float().mean() < 0.52
    still = draw_moves(100, Augment(), torch.Generator().manual_seed(0))
    assert not still.mirror.any()
    assert not still.down.any()


# Real data


@pytest.mark.realdata
def test_cifar10_as_published():
    root = SHARED / "data" / "cifar10"
    if not root.is_dir():
        pytest.skip(f"no CIFAR-10 in {root}")
    settings = config(root, validation=Validation.model_validate({"from": "test", "size": 2000}))
    data = load_data(settings, seed=0)
    assert data.inputs[0].shape == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 2_000, 8_000)
    assert data.inputs[0].mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-4)
    assert data.inputs[0].std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-4)
    assert torch.bincount(data.validation.labels).tolist() == [200] * 10
    assert torch.bincount(data.test.labels).tolist() == [800] * 10
    published = np.load(root / "test_images.npy", mmap_mode="r")
    held = torch.cat([b.inputs[0] for split in (data.validation, data.test) for b in split.batches(1000)])
    mean, std = torch.tensor(data.inputs[0].mean).view(3, 1, 1), torch.tensor(data.inputs[0].std).view(3, 1, 1)
    back = (held * std + mean).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert {image.tobytes() for image in back} == {image.tobytes() for image in published}
