"""Views and shards: what decides how a sample is augmented, and which process gets which samples."""

import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from compress.config.data import (
    ArraysConfig,
    Augment,
    DigitsConfig,
    ImageFolderConfig,
    Normalize,
    PythonConfig,
    TorchvisionConfig,
    Validation,
)
from compress.data import folder as folder_module
from compress.data.augment import draw_moves, move
from compress.data.base import WHOLE, Shard
from compress.data.images import random_crop
from compress.data.load import load_data
from compress.data.order import grouped

PLAIN = Normalize(mean=(0.0,) * 3, std=(1.0,) * 3)
MOVED = Augment(crop=2, flip=True)
FROM_TEST = Validation.model_validate({"from": "test", "size": 4})
PYTHON = """
import numpy as np
def pixels(n): return np.random.default_rng(n).integers(0, 256, (n, 6, 9, 3), dtype=np.uint8)
class Own:
    def __len__(self): return 23
    def __getitem__(self, i): return pixels(23)[i], i % 2
def arrays(): return {"train": (pixels(23), np.arange(23) % 2), "test": (pixels(10), np.arange(10) % 2)}
def data_set(): return {"train": Own(), "test": (pixels(10), np.arange(10) % 2)}
def tested_by_a_data_set(): return {"train": (pixels(23), np.arange(23) % 2), "test": Own()}
"""


def arrays(root, **settings):
    for split, n in (("train", 23), ("test", 10)):
        np.save(root / f"{split}_images.npy", np.random.default_rng(n).integers(0, 256, (n, 6, 9, 3), dtype=np.uint8))
        np.save(root / f"{split}_labels.npy", np.arange(n) % 2)
    return ArraysConfig(kind="arrays", root=root, **settings)


def python(root, function="arrays", **settings):
    (root / "own.py").write_text(textwrap.dedent(PYTHON))
    return PythonConfig(kind="python", callable=f"{root / 'own.py'}:{function}", **settings)


def folder(root, **settings):
    for split, n in (("train", 23), ("test", 10)):
        for i in range(n):
            path = root / split / ("cat", "dog")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (12, 14 + i % 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return ImageFolderConfig(kind="image_folder", root=root, image_size=8, resize=9, **{"workers": 0, **settings})


def torchvision_set(root, **settings):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 23), ("t10k", 10)):
        pictures = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pictures), ("labels-idx1", (np.arange(n) % 2).astype(np.uint8))):
            head = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return TorchvisionConfig(kind="torchvision", name="MNIST", root=root, **settings)


def digits(root, **settings):
    return DigitsConfig(kind="digits", image_size=8, per_class=3, **{**settings, "validation": Validation()})


KINDS = {"arrays": arrays, "folder": folder, "torchvision": torchvision_set, "python": python, "digits": digits}


@pytest.fixture(params=KINDS)
def train(request, tmp_path):
    """The train split of each kind of data, augmented."""
    settings = KINDS[request.param](tmp_path, normalize=PLAIN, augment=MOVED, validation=FROM_TEST)
    return load_data(settings, seed=3).train


@pytest.fixture
def of_arrays(tmp_path):
    """Makes the train split of a few arrays."""

    def make(seed=3, augment=MOVED, **settings):
        config = arrays(tmp_path, normalize=PLAIN, augment=augment, validation=FROM_TEST, **settings)
        return load_data(config, seed=seed).train

    return make


def whole(split, batch_size=7, **kwargs):
    """Inputs and indices of all batches."""
    batches = list(split.batches(batch_size, **kwargs))
    return torch.cat([b.inputs[0] for b in batches]), torch.cat([b.indices for b in batches])


def by_index(split, **kwargs):
    """Inputs in the order of the split, whatever order they came in."""
    inputs, indices = whole(split, **kwargs)
    assert sorted(indices.tolist()) == list(range(len(split)))
    return inputs[indices.argsort()]


# Where samples come from


@pytest.mark.parametrize("seed", [None, 5])
def test_indices_say_where_samples_come_from(train, seed):
    plain, _ = whole(train.take(range(len(train))))
    for batch in train.take(range(len(train))).batches(7, seed=seed):
        assert batch.indices.dtype == torch.int64
        assert torch.equal(batch.inputs[0], plain[batch.indices])
        assert torch.equal(batch.labels, train.labels[batch.indices])


# Views


def test_a_view_alone_decides_how_a_sample_is_augmented(train):
    expected = by_index(train, view=1)
    for others in (
        {"seed": 4},
        {"seed": 5, "batch_size": 3},
        {"seed": 4, "batch_size": len(train)},
        {"batch_size": 1},
    ):
        assert torch.equal(by_index(train, view=1, **others), expected)
    for view in (0, 2):
        assert not torch.equal(by_index(train, view=view), expected)
    assert not torch.equal(by_index(train), expected)


def test_the_seed_decides_the_order_within_a_view(train):
    orders = [whole(train, view=1, seed=seed)[1].tolist() for seed in (4, 4, 5, None)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == list(range(len(train)))
    assert orders[0] == whole(train, seed=4)[1].tolist()


def test_batches_name_their_view(train):
    def views(split, **kwargs):
        return {batch.view for batch in split.batches(7, **kwargs)}

    assert views(train, view=2, seed=1) == {2}
    assert views(train, seed=1) == views(train) == {None}
    assert views(train.take([3, 1]), view=2) == views(train.take([3, 1]), seed=1) == {0}


def test_another_seed_of_the_data_has_other_views(of_arrays):
    assert torch.equal(by_index(of_arrays(seed=3), view=0), by_index(of_arrays(seed=3), view=0))
    assert not torch.equal(by_index(of_arrays(seed=3), view=0), by_index(of_arrays(seed=4), view=0))


def test_without_augmentation_there_is_one_view(of_arrays):
    still = of_arrays(augment=Augment())
    assert torch.equal(by_index(still, view=0), by_index(still, view=3))
    assert {batch.view for batch in still.batches(7, view=3, seed=1)} == {0}


def test_views_leave_the_global_generators_alone(train):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole(train, view=1, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_no_view(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(folder_module, "cores", lambda: 2)
    settings = folder(tmp_path, normalize=PLAIN, augment=MOVED, validation=FROM_TEST)
    expected = by_index(load_data(settings, seed=3).train, view=1, seed=2)
    settings = settings.model_copy(update={"workers": workers})
    assert torch.equal(by_index(load_data(settings, seed=3).train, view=1, batch_size=4), expected)


# Without a view, what the seed alone gave before there were views


def test_without_a_view_arrays_are_shuffled_and_moved_from_one_stream(of_arrays):
    split = of_arrays()
    plain, _ = whole(split)
    generator = torch.Generator().manual_seed(9)
    order = torch.randperm(len(split), generator=generator)
    expected = move(plain, draw_moves(len(split), MOVED, generator))[order]
    assert torch.equal(whole(split, seed=9)[0], expected)


def test_without_a_view_files_are_drawn_from_seed_and_position(tmp_path):
    root = tmp_path
    split = load_data(folder(root, normalize=PLAIN, augment=Augment(crop=1), validation=FROM_TEST), seed=3).train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(9))
    inputs, indices = whole(split, seed=9)
    assert torch.equal(indices, order)
    files = [path for name in ("cat", "dog") for path in sorted((root / "train" / name).iterdir())]
    for image, index in zip(inputs, indices.tolist(), strict=True):
        drawn = random_crop(Image.open(files[index]), 8, np.random.default_rng([9, index]))
        assert np.array_equal((image * 255).round().numpy(), np.asarray(drawn).transpose(2, 0, 1))


# Shards


@given(
    n=st.integers(0, 40),
    batch_size=st.integers(1, 17),
    world=st.integers(1, 6),
    drop_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_parts_of_all_processes_are_the_batch(n, batch_size, world, drop_last, seed):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    together = grouped(order, batch_size, drop_last=drop_last, shard=WHOLE)
    parts = [grouped(order, batch_size, drop_last=drop_last, shard=Shard(rank, world)) for rank in range(world)]
    assert len(together) == (n // batch_size if drop_last else -(-n // batch_size))
    for batch, *shares in zip(together, *parts, strict=True):
        assert torch.equal(torch.cat(shares), batch)
        sizes = [len(share) for share in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kwargs", [{}, {"seed": 5}, {"seed": 5, "view": 2}, {"seed": 5, "view": 0, "drop_last": True}])
@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_a_batch_are_the_batch(train, kwargs, world):
    expected = list(train.batches(7, **kwargs))
    parts = [list(train.batches(7, shard=Shard(rank, world), **kwargs)) for rank in range(world)]
    assert [len(each) for each in parts] == [len(expected)] * world
    for batch, *shares in zip(expected, *parts, strict=True):
        assert torch.equal(torch.cat([share.inputs[0] for share in shares]), batch.inputs[0])
        assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
        assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
        assert {share.view for share in shares} == {batch.view}


def test_a_process_may_get_nothing_of_a_batch(train):
    parts = [list(train.batches(len(train) - 1, shard=Shard(rank, 3))) for rank in range(3)]
    assert [len(each[-1].labels) for each in parts] == [1, 0, 0]
    empty = parts[2][-1].inputs[0]
    assert empty.shape[1:] == parts[0][0].inputs[0].shape[1:]
    assert empty.dtype == torch.float32


def test_a_process_decodes_its_own_part_only(tmp_path, monkeypatch):
    split = load_data(folder(tmp_path, normalize=PLAIN, validation=FROM_TEST), seed=3).train
    opened = []
    original = folder_module.open_image
    monkeypatch.setattr(folder_module, "open_image", lambda path, *rest: opened.append(path) or original(path, *rest))
    taken = torch.cat([batch.indices for batch in split.batches(8, seed=1, shard=Shard(1, 2))])
    assert len(opened) == len(set(opened)) == len(taken) == 11  # of batches of 8, 8 and 7 samples


# What comes again


def test_data_that_is_read_comes_again(train):
    assert train.repeats
    assert train.take([0]).repeats


@pytest.mark.parametrize(
    ("function", "repeats"),
    [
        ("arrays", {"train": True, "validation": True}),
        ("data_set", {"train": False, "validation": True}),
        ("tested_by_a_data_set", {"train": True, "validation": False}),
    ],
)
def test_what_the_users_own_data_set_makes_may_not_come_again(tmp_path, function, repeats):
    data = load_data(python(tmp_path, function, validation=FROM_TEST), seed=0)
    assert {name: getattr(data, name).repeats for name in repeats} == repeats
    assert data.train.take([1, 0]).repeats == repeats["train"]
