"""Several inputs: how they are named and read, what is checked, and that images of a sample stay aligned."""

import json

import numpy as np
import pytest
import torch

from compress import load_pipeline
from compress.config.data import ArraysConfig, Augment, Normalize, PythonConfig, Validation
from compress.data.base import Input
from compress.data.fingerprint import fingerprint
from compress.data.load import load_data
from compress.errors import ConfigError, DataError

FROM_TEST = Validation.model_validate({"from": "test", "size": 8})
SHAPES = {"left": (6, 9, 3), "right": (6, 9, 3), "meta": (5,)}
PATTERNS = ("{split}_left", "{split}_right", "{split}_meta", "{split}_ids")


def arrays_of(split, n):
    """Two images that agree, numbers, and tokens."""
    rng = np.random.default_rng(n)
    left = rng.integers(0, 256, (n, 6, 9, 3), dtype=np.uint8)
    return {
        f"{split}_left": left,
        f"{split}_right": 255 - left.transpose(0, 3, 1, 2),
        f"{split}_meta": rng.normal(0, 50, (n, 5)),
        f"{split}_ids": rng.integers(-3, 70_000, (n, 7)).astype(np.int32),
        f"{split}_labels": np.arange(n) % 4,
    }


def write(root, **changes):
    for name, array in ({**arrays_of("train", 40), **arrays_of("test", 20)} | changes).items():
        np.save(root / f"{name}.npy", array)
    return root


def config(root, inputs=PATTERNS, **settings):
    return ArraysConfig(kind="arrays", root=root, inputs=inputs, **{"validation": FROM_TEST, **settings})


def whole(split, **kwargs):
    """All inputs of a split."""
    batches = [batch.inputs for batch in split.batches(7, **kwargs)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def test_each_input_has_its_name_layout_type_and_statistics(tmp_path):
    data = load_data(config(write(tmp_path)), seed=0)
    assert [(each.name, each.shape, each.dtype) for each in data.inputs] == [
        ("left", (3, 6, 9), "float32"),
        ("right", (3, 6, 9), "float32"),
        ("meta", (5,), "float32"),
        ("ids", (7,), "int64"),
    ]
    stored = arrays_of("train", 40)
    left, right, meta, ids = whole(data.train)
    for each, images in zip(data.inputs, (stored["train_left"], 255 - stored["train_left"]), strict=False):
        assert each.mean == pytest.approx(images.mean(axis=(0, 1, 2)) / 255, abs=1e-6)
        assert each.std == pytest.approx(images.std(axis=(0, 1, 2)) / 255, abs=1e-6)
    assert data.inputs[2:] == (Input("meta", (5,)), Input("ids", (7,), "int64"))
    torch.testing.assert_close(left, -right, atol=1e-4, rtol=1e-4)  # what mean and deviation leave of opposites
    assert torch.equal(meta, torch.from_numpy(stored["train_meta"].astype(np.float32)))
    assert ids.dtype is torch.int64
    assert np.array_equal(ids.numpy(), stored["train_ids"])


def test_given_statistics_are_for_all_images(tmp_path):
    normalize = Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    data = load_data(config(write(tmp_path), normalize=normalize), seed=0)
    assert [each.mean for each in data.inputs] == [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (), ()]


def test_the_images_of_a_sample_are_moved_alike(tmp_path):
    plain = Normalize(mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = config(write(tmp_path), normalize=plain, augment=Augment(crop=2, flip=True))
    data = load_data(settings, seed=0)
    left, right, meta, ids = whole(data.train, seed=5)
    assert torch.equal((left * 255).round(), 255 - (right * 255).round())
    still = whole(load_data(config(tmp_path, normalize=plain), seed=0).train, seed=5)
    assert not torch.equal(left, still[0])
    assert torch.equal(meta, still[2])
    assert torch.equal(ids, still[3])


def test_a_layout_for_each_input(tmp_path):
    spectrum = np.random.default_rng(0).normal(0, 9, (40, 1, 8, 12))
    root = write(tmp_path, train_spectrum=spectrum, test_spectrum=spectrum[:20])
    inputs = ("{split}_left", "{split}_spectrum")
    with pytest.raises(DataError, match=r"'train_spectrum'\[0\] holds values .*set data.layout to .* as a list"):
        load_data(config(root, inputs), seed=0)
    data = load_data(config(root, inputs, layout=("auto", "any")), seed=0)
    assert [(each.shape, len(each.mean)) for each in data.inputs] == [((3, 6, 9), 3), ((1, 8, 12), 0)]


def test_one_pattern_in_a_list_names_its_input(tmp_path):
    data = load_data(config(write(tmp_path), ("{split}_left",)), seed=0)
    assert [each.name for each in data.inputs] == ["left"]
    assert load_data(config(tmp_path, "{split}_left"), seed=0).inputs[0].name == "input"


def test_every_array_is_part_of_the_fingerprint(tmp_path):
    first = fingerprint(config(write(tmp_path)))
    assert {"train_left", "train_ids", "test_meta", "train_labels"} <= set(first["content"])
    write(tmp_path, train_ids=np.zeros((40, 7), np.int32))
    second = fingerprint(config(tmp_path))
    assert {name for name in first["content"] if first["content"][name] != second["content"][name]} == {"train_ids"}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"train_meta": np.zeros((39, 5))}, {}, "'train_meta' has 39 samples, 'train_labels' has 40"),
        (
            {"test_ids": np.zeros((20, 8), int)},
            {},
            r"'test_ids' has samples int64 \(8,\), 'train_ids' has int32 \(7,\)",
        ),
        ({"test_ids": np.zeros((20, 7))}, {}, r"'test_ids' has samples float64 \(7,\), 'train_ids' has int32"),
        ({"test_meta": np.full((20, 5), np.nan)}, {}, r"'test_meta'\[0\] holds a value that is not finite"),
        (
            {},
            {"inputs": ("{split}_left", "{split}_mteta")},
            "data.inputs.1: no array 'train_mteta' .* mean 'train_meta'",
        ),
        ({}, {"inputs": ("{split}_left", "train_meta")}, "data.inputs.1: must contain {split}"),
        ({}, {"augment": Augment(crop=7)}, r"data.augment.crop: .* 7 pixels, the images 'left' are \(6, 9\)"),
        (
            {f"{split}_right": np.zeros((n, 6, 9, 1), np.uint8) for split, n in (("train", 40), ("test", 20))},
            {"normalize": Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)},
            "data.normalize: has 3 values, the images 'right' 1 channels",
        ),
        (
            {},
            {"inputs": ("{split}_meta", "{split}_ids"), "augment": Augment(flip=True)},
            r"data.augment: is for images; inputs of shape \(5,\), \(7,\) are passed through",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, settings, message):
    with pytest.raises(DataError, match=message):
        load_data(config(write(tmp_path, **changes), **settings), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": []}, "data.inputs: .* must have at least 1 item"),
        ({"inputs": 3}, "data.inputs: must be text or a list, got 3"),
        ({"inputs": ["{split}_a", "a_{split}"]}, r"data.inputs: '\{split\}_a' and 'a_\{split\}' are both called 'a'"),
        ({"inputs": ["{split}"]}, r"data.inputs: '\{split\}' gives the input no name; names are .*, got ''"),
        ({"inputs": ["{split}_logits"]}, "data.inputs: .* gives the input no name; .* not 'logits'"),
        ({"inputs": ["{split}_a-b"]}, "data.inputs: .* gives the input no name; .*, got 'a-b'"),
        ({"layout": ["any"]}, "data.layout: is a list, so inputs must be one, too"),
        ({"inputs": ["{split}_a", "{split}_b"], "layout": ["any"]}, "one item for each of the 2 inputs, got 1"),
    ],
)
def test_what_the_settings_cannot_mean_is_said_with_its_line(tmp_path, settings, message):
    document = {
        "name": "several",
        "data": {"kind": "arrays", "root": "data", **settings},
        "model": {"factory": "cifar:resnet20"},
        "stages": [{"train": {}}],
    }
    (tmp_path / "p.yaml").write_text(json.dumps(document, indent=1))
    with pytest.raises(ConfigError, match=rf"p.yaml:\d+: .*{message}"):
        load_pipeline(tmp_path / "p.yaml")


# The user's callable

HEAD = """
import numpy as np, torch
def images(n): return np.random.default_rng(0).integers(0, 256, (n, 5, 7, 3), dtype=np.uint8)
def labels(n): return np.arange(n) % 2
def tokens(n): return torch.arange(n * 6).view(n, 6)
class D:
    def __init__(self, sample): self.sample = sample
    def __len__(self): return 20
    def __getitem__(self, i): return self.sample(i), i % 2
"""


def own(tmp_path, returned, **settings):
    (tmp_path / "own.py").write_text(f"{HEAD}\ndef load(): return {returned}\n")
    return PythonConfig(kind="python", callable=f"{tmp_path / 'own.py'}:load", **settings)


@pytest.mark.parametrize(
    "train",
    [
        "({'image': images(20), 'ids': tokens(20)}, labels(20))",
        "D(lambda i: {'image': images(20)[i], 'ids': tokens(20)[i]})",
        "D(lambda i: {'ids': tokens(20)[i], 'image': images(20)[i]} if i else {'image': images(20)[i], 'ids': tokens(1)[0]})",
    ],
)
def test_a_mapping_names_the_inputs(tmp_path, train):
    data = load_data(own(tmp_path, f"{{'train': {train}}}"), seed=0)
    assert [(each.name, each.shape, each.dtype) for each in data.inputs] == [
        ("image", (3, 5, 7), "float32"),
        ("ids", (6,), "int64"),
    ]
    image, ids = whole(data.train)
    assert (image.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(ids[:, 1], ids[:, 0] + 1)


def test_the_first_split_gives_the_order(tmp_path):
    returned = """{'train': ({'image': images(20), 'ids': tokens(20)}, labels(20)),
        'test': ({'ids': tokens(9), 'image': images(9)}, labels(9)), 'layout': {'image': 'nhwc'}}"""
    data = load_data(own(tmp_path, returned), seed=0)
    assert [tuple(tensor.shape[1:]) for tensor in whole(data.test)] == [(3, 5, 7), (6,)]


def test_whole_numbers_of_one_input_stay_whole(tmp_path):
    data = load_data(own(tmp_path, "{'train': (tokens(20), labels(20))}"), seed=0)
    assert data.inputs == (Input("input", (6,), "int64"),)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("{'train': ({}, labels(4))}", "returned 'train': inputs must be an array, .* the mapping is empty"),
        (
            "{'train': ({'a b': images(4)}, labels(4))}",
            "returned 'train': inputs have the name 'a b'; names are letters",
        ),
        ("{'train': ({0: images(4)}, labels(4))}", "returned 'train': inputs have the name 0; names are letters"),
        ("{'train': ({'a': 'x'}, labels(4))}", "returned 'train': inputs: 'a' must be an array or a tensor, got str"),
        ("{'train': ({'a': tokens(4), 'b': tokens(3)}, labels(4))}", "'train b' has 3 samples, 'train labels' has 4"),
        (
            "{'train': ({'a': tokens(4)}, labels(4)), 'test': ({'b': tokens(4)}, labels(4))}",
            "returned 'test' with the inputs b; 'train' has a$",
        ),
        ("{'train': ({'a': tokens(4)}, labels(4)), 'layout': {'b': 'any'}}", "a layout for 'b'; the inputs are a$"),
        (
            "{'train': ({'a': images(4), 'b': images(4)[:, 0]}, labels(4)), 'layout': {'b': 'nhwc', 'a': 'x'}}",
            "returned layout 'x'; it must be one of",
        ),
        (
            "{'train': D(lambda i: {'a': tokens(1)} if i < 3 else {'b': tokens(1)})}",
            r"returned 'train'\[3\]: the inputs are b, the first sample's a",
        ),
        (
            "{'train': D(lambda i: {'a': tokens(1), 'b': tokens(1 + i)})}",
            r"returned 'train'\[1\]: the input 'b' is int64 \(2, 6\), the first is int64 \(1, 6\)",
        ),
    ],
)
def test_mistakes_in_a_mapping_are_named(tmp_path, returned, message):
    with pytest.raises(DataError, match=message):
        load_data(own(tmp_path, returned), seed=0)
