"""A part of the training split: what is left out, what stays, and that more holds less."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import load_pipeline
from compress.config.data import ArraysConfig, DataConfig, DigitsConfig, Normalize, Validation
from compress.data.fingerprint import fingerprint
from compress.data.load import load_data
from compress.data.splits import Part, used
from compress.errors import ConfigError, DataError

PLAIN = Normalize(mean=(0.0,), std=(1.0,))
CLASSES = ("a", "b", "c", "d", "e")


def labels_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def chosen(labels, seed=0, **amount):
    """Positions that are used of all samples."""
    part = used(Part("train", np.arange(len(labels))), labels, DataConfig(**amount), seed, CLASSES)
    assert part.origin == "train"
    assert (np.diff(part.indices) > 0).all()
    return part.indices


counts_of_classes = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(counts=counts_of_classes, fraction=st.floats(0.001, 1.0), seed=st.integers(0, 99))
def test_each_class_gives_its_fraction_and_at_least_one(counts, fraction, seed):
    labels = labels_of(counts)
    drawn = np.bincount(labels[chosen(labels, seed, fraction=fraction)], minlength=len(counts))
    assert (drawn >= 1).all()
    assert (np.abs(drawn - np.maximum(1, fraction * np.array(counts))) <= 0.5 + 1e-9).all()


@given(
    counts=counts_of_classes, fractions=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)), seed=st.integers(0, 99)
)
def test_a_larger_fraction_holds_the_samples_of_a_smaller_one(counts, fractions, seed):
    labels = labels_of(counts)
    few, many = (set(chosen(labels, seed, fraction=fraction)) for fraction in sorted(fractions))
    assert few <= many


@given(counts=st.lists(st.integers(4, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_as_many_of_each_class_and_more_hold_fewer(counts, seed):
    labels = labels_of(counts)
    one, three = (chosen(labels, seed, per_class=n) for n in (1, 3))
    assert np.bincount(labels[one]).tolist() == [1] * len(counts)
    assert np.bincount(labels[three]).tolist() == [3] * len(counts)
    assert set(one) <= set(three)


def test_the_seed_decides():
    labels = labels_of([30, 30])
    assert chosen(labels, 1, per_class=5).tolist() == chosen(labels, 1, per_class=5).tolist()
    assert chosen(labels, 1, per_class=5).tolist() != chosen(labels, 2, per_class=5).tolist()


def test_a_class_without_samples_gives_none():
    labels = labels_of([20, 0, 20])
    assert np.bincount(labels[chosen(labels, per_class=2)]).tolist() == [2, 0, 2]


def test_too_many_of_a_class_names_the_smallest():
    labels = labels_of([20, 7, 9])
    with pytest.raises(
        DataError, match=r"data.per_class: class 'b' has 7 samples in the training split, fewer than 8$"
    ):
        chosen(labels, per_class=8)


# In a data set


def samples_of(split):
    """The samples of a split, as bytes."""
    return [row.numpy().tobytes() for batch in split.batches(64) for row in batch.inputs[0]]


@pytest.mark.parametrize("amount", [{"fraction": 0.1}, {"per_class": 12}])
def test_validation_and_test_stay_as_they_are(amount):
    settings = DigitsConfig(kind="digits", image_size=8, channels=1, normalize=PLAIN)
    everything = load_data(settings, seed=2)
    part = load_data(settings.model_copy(update=amount), seed=2)
    for name in ("validation", "test"):
        assert samples_of(getattr(part, name)) == samples_of(getattr(everything, name))
        assert torch.equal(getattr(part, name).labels, getattr(everything, name).labels)
    few, many = samples_of(part.train), samples_of(everything.train)
    assert len(few) < 0.11 * len(many)
    assert set(few) < set(many)


def test_a_whole_fraction_is_everything():
    settings = DigitsConfig(kind="digits", image_size=8, channels=1)
    everything, same = (load_data(settings.model_copy(update=each), seed=0) for each in ({}, {"fraction": 1.0}))
    assert samples_of(same.train) == samples_of(everything.train)
    assert same.inputs == everything.inputs


def test_statistics_are_measured_on_the_part_that_is_used(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 5, 7, 3), dtype=np.uint8)
    np.save(tmp_path / "train_images.npy", pixels)
    np.save(tmp_path / "train_labels.npy", np.arange(60) % 3)
    settings = ArraysConfig(kind="arrays", root=tmp_path, per_class=2, validation=Validation(size=6))
    data = load_data(settings, seed=0)
    plain = load_data(settings.model_copy(update={"normalize": Normalize(mean=(0.0,) * 3, std=(1.0,) * 3)}), seed=0)
    inputs = torch.cat([batch.inputs[0] for batch in plain.train.batches(64)]).double()
    assert len(inputs) == 6
    assert data.inputs[0].mean == pytest.approx(inputs.mean(dim=(0, 2, 3)).tolist(), abs=1e-6)
    assert data.inputs[0].std == pytest.approx(inputs.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_the_training_split_counts_after_the_others_were_split_off(tmp_path):
    np.save(tmp_path / "train_images.npy", np.zeros((40, 5, 7, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.arange(40) % 2)
    settings = ArraysConfig(kind="arrays", root=tmp_path, classes=("cat", "dog"), per_class=18)
    with pytest.raises(DataError, match=r"data.per_class: class 'cat' has 1[0-7] samples in the training split"):
        load_data(settings, seed=0)


# Settings


def test_the_amount_is_part_of_the_fingerprint():
    settings = DigitsConfig(kind="digits")
    found = [fingerprint(settings.model_copy(update=each)) for each in ({}, {"fraction": 0.5}, {"per_class": 5})]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"fraction": 0.0}, "data.fraction: must be greater than 0"),
        ({"fraction": 1.5}, "data.fraction: must be (at most|less than or equal to) 1"),
        ({"per_class": 0}, "data.per_class: must be (at least|greater than or equal to) 1"),
        ({"per_class": 2.5}, "data.per_class: must be a whole number"),
        ({"per_class": 5, "fraction": 0.5}, r"data.per_class: there is a fraction \(0.5\), too; leave one of them out"),
    ],
)
def test_amounts_that_cannot_be_meant(tmp_path, amount, message):
    document = {
        "name": "few",
        "data": {"kind": "digits", **amount},
        "model": {"factory": "cifar:resnet20"},
        "stages": [{"train": {}}],
    }
    (tmp_path / "p.yaml").write_text(json.dumps(document, indent=1))
    with pytest.raises(ConfigError, match=rf"p.yaml:\d+: {message}"):
        load_pipeline(tmp_path / "p.yaml")
