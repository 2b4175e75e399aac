"""Splits are disjoint, cover everything, keep the class frequencies, and depend on the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.config.data import Validation
from compress.data.splits import divide, halves, stratified_sample
from compress.errors import DataError

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CLASSES = tuple("abcdefgh")


def validation(source="train", size=0.2):
    return Validation.model_validate({"from": source, "size": size})


def labels_of(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@quick
@given(
    counts=st.lists(st.integers(20, 60), min_size=1, max_size=6),
    test_counts=st.none() | st.lists(st.integers(20, 60), min_size=1, max_size=6),
    source=st.sampled_from(["train", "test"]),
    size=st.floats(0.05, 0.7) | st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_splits_are_disjoint_and_cover(counts, test_counts, source, size, seed):
    labels = {"train": labels_of(counts)}
    if test_counts is not None:
        labels["test"] = labels_of(test_counts)
    parts = divide(labels, validation(source, size), 0.3, seed, CLASSES)
    taken = [(part.origin, int(i)) for part in parts.values() for i in part.indices]
    assert len(taken) == len(set(taken))
    assert set(taken) == {(name, i) for name, values in labels.items() for i in range(len(values))}
    assert set(parts) == {"train", "validation", "test"}
    assert all(len(part.indices) and (np.diff(part.indices) > 0).all() for part in parts.values())
    if isinstance(size, int):
        assert len(parts["validation"].indices) == size
    if test_counts is not None and source == "test":
        assert len(parts["train"].indices) == len(labels["train"])
    again = divide(labels, validation(source, size), 0.3, seed, CLASSES)
    assert all((again[name].indices == part.indices).all() for name, part in parts.items())


@quick
@given(
    counts=st.lists(st.integers(20, 200), min_size=1, max_size=6),
    fraction=st.floats(0.1, 0.8),
    seed=st.integers(0, 99),
)
def test_splits_keep_class_frequencies(counts, fraction, seed):
    labels = labels_of(counts)
    part = divide({"train": labels, "test": labels}, validation(size=fraction), 0.3, seed, CLASSES)["validation"]
    n = len(part.indices)
    assert n == max(1, round(fraction * len(labels)))
    drawn = np.bincount(labels[part.indices], minlength=len(counts))
    assert np.abs(drawn - np.array(counts) * n / sum(counts)).max() <= 1.0


@quick
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_stratified_sample(counts, n, seed):
    labels = labels_of(counts)
    sample = stratified_sample(labels, n, seed)
    assert sample == sorted(set(sample)) == stratified_sample(labels, n, seed)
    assert len(sample) == min(n, len(labels))
    drawn = np.bincount(labels[sample], minlength=len(counts))
    if n >= len(counts):
        assert (drawn >= 1).all()


def test_other_seed_other_split():
    labels = {"train": labels_of([50, 50])}
    one, two = (divide(labels, validation(), 0.3, seed, CLASSES) for seed in (0, 1))
    for name in one:
        assert not np.array_equal(one[name].indices, two[name].indices)


def test_sample_is_no_subset_chosen_by_the_split():
    """One seed must not make the calibration sample and the validation split the same draw."""
    labels = labels_of([50, 50])
    split = divide({"train": labels, "test": labels}, validation(size=20), 0.3, 7, CLASSES)["validation"]
    assert stratified_sample(labels, 20, 7) != split.indices.tolist()


def test_rare_classes_are_on_both_sides():
    labels = {"train": labels_of([200, 2, 3, 2])}
    parts = divide(labels | {"test": labels["train"]}, validation(size=0.05), 0.3, 0, CLASSES)
    for name in ("train", "validation"):
        assert set(labels["train"][parts[name].indices]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("counts", "settings_", "message"),
    [
        ([10, 1], validation(), "class 'b' has 1 sample and needs at least 2"),
        ([10, 10], validation(size=20), "cannot split 20 of 20 train samples off for validation"),
        ([10, 10], validation(size=500), "cannot split 500 of 20 train samples"),
        ([10, 10], validation("given"), "is 'given', but the data brings no validation split"),
    ],
)
def test_messages(counts, settings_, message):
    labels = {"train": labels_of(counts), "test": labels_of([10, 10])}
    with pytest.raises(DataError, match=message):
        divide(labels, settings_, 0.3, 0, CLASSES)


@quick
@given(counts=st.lists(st.integers(2, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_halves_are_disjoint_stratified_and_everything(counts, seed):
    labels = labels_of(counts)
    first, second = halves(labels, seed)
    assert sorted(first + second) == list(range(len(labels)))
    assert (first, second) == (sorted(first), sorted(second))
    assert len(first) - len(second) in (0, 1)
    each = [np.bincount(labels[half], minlength=len(counts)) for half in (first, second)]
    assert np.abs(each[0] - each[1]).max() <= 1
    assert halves(labels, seed) == (first, second)


def test_halves_depend_on_the_seed():
    labels = labels_of([40, 40])
    assert halves(labels, 0) != halves(labels, 1)
