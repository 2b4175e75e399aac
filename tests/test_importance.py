"""Scores of channels: what they are, how they scale, who goes first."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.importance import l1_norm, lowest, sum_by_root

SHAPES = [(5, 3, 2, 4), (5, 3), (5,), (4, 1, 3, 3), (3, 2, 4)]


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shape", "axis"), [(shape, axis) for shape in SHAPES for axis in range(len(shape))])
def test_l1_norm_is_the_sum_of_magnitudes(shape, axis):
    tensor = weight(shape)
    others = tuple(other for other in range(len(shape)) if other != axis)
    np.testing.assert_allclose(l1_norm(tensor, axis), np.abs(tensor.numpy()).sum(axis=others), rtol=1e-12)


@given(st.integers(0, 4), st.floats(-100, 100), st.sampled_from([0, 1]))
def test_scaling_a_channel_scales_its_score_alone(channel, factor, axis):
    tensor = weight((5, 6, 3, 2))
    before = l1_norm(tensor, axis)
    tensor.select(axis, channel).mul_(factor)
    expected = before.clone()
    expected[channel] *= abs(factor)
    torch.testing.assert_close(l1_norm(tensor, axis), expected)


def test_coupled_scores_add_up_by_the_channel_they_follow():
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])]
    roots = [torch.tensor([2, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])]  # a flattened map: two inputs a channel
    assert sum_by_root(scores, roots, 4).tolist() == [32.0, 73.0, 111.0, 0.0]


def test_scores_and_roots_come_in_pairs():
    with pytest.raises(ValueError, match="shorter"):
        sum_by_root([torch.ones(2)], [], 2)


def test_of_equal_scores_the_lower_index_goes_first():
    scores = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 0.0, 2.0])
    assert [lowest(scores, count) for count in range(8)] == [
        [],
        [5],
        [1, 5],
        [1, 3, 5],
        [1, 3, 4, 5],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
    ]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_the_lowest_are_those_that_sorting_puts_first(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])
    assert lowest(torch.tensor(values, dtype=torch.float64), count) == expected
