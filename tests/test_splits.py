"""One convolution as a vertical and a horizontal one, and as three with a smaller core: exactness, errors, costs."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.methods.lowrank import split
from compress.methods.spatial import merged_spatial, spatial_cost, spatial_values, split_spatial
from compress.methods.tucker import merged_tucker, split_tucker, tucker_cost
from compress.models.cost import macs

# torch says once that this may be slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CLOSE = {"rtol": 0, "atol": 1e-9}
SHAPES = [(7, 4, 3, 3), (4, 7, 3, 5), (6, 2, 1, 3), (3, 5, 2, 1), (5, 4, 1, 1), (1, 1, 3, 3)]
SETTINGS = [
    {},
    {"padding": (1, 2)},
    {"stride": (2, 3), "padding": (2, 1)},
    {"padding": (2, 1), "dilation": (2, 1), "stride": (1, 2)},
    {"padding": "same", "dilation": (1, 2)},
]
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


def weight(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs_for(shape):
    return weight((2, shape[1], 9, 13), seed=1)


def axis_of(settings, axis):
    """The part of a convolution's settings that belongs to one axis."""
    neutral = {"stride": 1, "padding": 0, "dilation": 1}
    pairs = {name: value for name, value in settings.items() if not isinstance(value, str)}
    parts = {name: tuple(v if n == axis else neutral[name] for n, v in enumerate(pair)) for name, pair in pairs.items()}
    return {**settings, **parts}


# Vertical and horizontal


def rearranged(tensor):
    """One row for each input and row of the kernel, one column for each output and column of the kernel; by loops."""
    out, inp, height, width = tensor.shape
    matrix = np.zeros((inp * height, out * width))
    for o, i, y, x in np.ndindex(out, inp, height, width):
        matrix[i * height + y, o * width + x] = tensor[o, i, y, x]
    return matrix


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_vertical_and_horizontal_do_what_their_merged_weight_does(shape, settings):
    tensor, inputs, bias = weight(shape), inputs_for(shape), weight(shape[:1], seed=2)
    largest = min(shape[0] * shape[3], shape[1] * shape[2])
    for rank in {1, largest}:
        first, second = split_spatial(tensor, rank)
        assert first.shape == (rank, shape[1], shape[2], 1)
        assert second.shape == (shape[0], rank, 1, shape[3])
        assert first.is_contiguous()
        assert second.is_contiguous()
        middle = F.conv2d(inputs, first, **axis_of(settings, 0))
        found = F.conv2d(middle, second, bias, **axis_of(settings, 1))
        torch.testing.assert_close(found, F.conv2d(inputs, merged_spatial(first, second), bias, **settings), **CLOSE)
    torch.testing.assert_close(found, F.conv2d(inputs, tensor, bias, **settings), **CLOSE)


@given(SIZES, st.integers(0, 1000))
def test_no_vertical_and_horizontal_pair_lies_closer(shape, seed):
    tensor = weight(shape, seed)
    values = np.linalg.svd(rearranged(tensor), compute_uv=False)
    np.testing.assert_allclose(spatial_values(tensor), values, atol=1e-12)
    for rank in range(1, len(values) + 1):
        error = (tensor - merged_spatial(*split_spatial(tensor, rank))).norm()
        assert float(error) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-9)


def test_a_merged_pair_by_loops():
    first, second = weight((2, 3, 2, 1)), weight((4, 2, 1, 3), seed=1)
    merged = merged_spatial(first, second)
    assert merged.shape == (4, 3, 2, 3)
    for o, i, y, x in np.ndindex(4, 3, 2, 3):
        assert float(merged[o, i, y, x]) == pytest.approx(sum(second[o, r, 0, x] * first[r, i, y, 0] for r in range(2)))


def test_separable_filters_need_one_channel():
    vertical, horizontal = weight((1, 3, 5, 1)), weight((4, 1, 1, 3), seed=1)
    tensor = merged_spatial(vertical, horizontal)
    torch.testing.assert_close(merged_spatial(*split_spatial(tensor, 1)), tensor, **CLOSE)


def test_a_kernel_of_one_by_one_has_nothing_spatial():
    tensor = weight((5, 4, 1, 1))
    first, second = split(tensor, 2)
    spatial = merged_spatial(*split_spatial(tensor, 2))
    torch.testing.assert_close(spatial.flatten(1), second @ first.flatten(1), **CLOSE)


# Tucker


def multiplied(first, core, last):
    """The three by loops."""
    first, core, last = (part.numpy() for part in (first, core, last))
    (rank_in, inp), (out, rank_out) = first.shape[:2], last.shape[:2]
    merged = np.zeros((out, inp, *core.shape[2:]))
    for o, i, q, p in np.ndindex(out, inp, rank_out, rank_in):
        merged[o, i] += last[o, q, 0, 0] * core[q, p] * first[p, i, 0, 0]
    return merged


def higher_order_svd(tensor, rank_out, rank_in):
    """The truncated higher-order SVD by numpy: projections on the leading directions of both unfoldings."""
    array = tensor.numpy()
    left = np.linalg.svd(array.reshape(len(array), -1))[0][:, :rank_out]
    right = np.linalg.svd(array.transpose(1, 0, 2, 3).reshape(array.shape[1], -1))[0][:, :rank_in]
    return np.einsum("oihw,oa,ib,ca,db->cdhw", array, left, right, left, right)


def rank_pairs(shape):
    out, inp, area = shape[0], shape[1], shape[2] * shape[3]
    pairs = [(a, b) for a in range(1, out + 1) for b in range(1, inp + 1)]
    return [(a, b) for a, b in pairs if a <= b * area and b <= a * area]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_convolutions_do_what_their_merged_weight_does(shape, settings):
    tensor, inputs, bias = weight(shape), inputs_for(shape), weight(shape[:1], seed=2)
    for ranks in {rank_pairs(shape)[0], rank_pairs(shape)[-1]}:
        parts = split_tucker(tensor, *ranks)
        assert [part.shape for part in parts] == [
            (ranks[1], shape[1], 1, 1),
            (*ranks, *shape[2:]),
            (shape[0], ranks[0], 1, 1),
        ]
        assert all(part.is_contiguous() for part in parts)
        np.testing.assert_allclose(merged_tucker(*parts), multiplied(*parts), atol=1e-9)
        middle = F.conv2d(F.conv2d(inputs, parts[0]), parts[1], **settings)
        expected = F.conv2d(inputs, merged_tucker(*parts), bias, **settings)
        torch.testing.assert_close(F.conv2d(middle, parts[2], bias), expected, **CLOSE)


@given(SIZES, st.integers(0, 1000))
def test_tucker_is_exact_at_the_ranks_of_the_weight(shape, seed):
    out, inp, height, width = shape
    area = height * width
    ranks = min(out, inp * area), min(inp, out * area)
    tensor = weight(shape, seed)
    for rounds in (0, 2):
        torch.testing.assert_close(merged_tucker(*split_tucker(tensor, *ranks, rounds)), tensor, **CLOSE)


@given(SIZES, st.integers(0, 1000), st.data())
def test_alternating_never_worsens_the_higher_order_svd(shape, seed, data):
    tensor = weight(shape, seed)
    ranks = data.draw(st.sampled_from(rank_pairs(shape)))
    start = merged_tucker(*split_tucker(tensor, *ranks, rounds=0))
    np.testing.assert_allclose(start, higher_order_svd(tensor, *ranks), atol=1e-7)
    errors = [(tensor - merged_tucker(*split_tucker(tensor, *ranks, rounds))).norm() for rounds in range(5)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


def test_alternating_improves_the_higher_order_svd():
    tensor = weight((12, 10, 3, 3))
    before, after = ((tensor - merged_tucker(*split_tucker(tensor, 4, 3, rounds))).norm() for rounds in (0, 5))
    assert after < 0.995 * before


def test_after_many_rounds_neither_side_can_be_improved_alone():
    tensor = weight((6, 5, 3, 2))
    first, core, last = split_tucker(tensor, 3, 2, rounds=200)
    # With one side given, the squared norm of the core is at most the sum of the leading eigenvalues there.
    given_in = np.einsum("oihw,pi->ophw", tensor, first.flatten(1)).reshape(6, -1)
    given_out = np.einsum("oihw,oq->iqhw", tensor, last.flatten(1)).reshape(5, -1)
    for side, rank in ((given_in, 3), (given_out, 2)):
        most = (np.linalg.svd(side, compute_uv=False)[:rank] ** 2).sum()
        assert float(core.square().sum()) == pytest.approx(most, rel=1e-6)


@given(SIZES, st.integers(0, 1000), st.data())
def test_the_error_is_what_the_core_does_not_hold(shape, seed, data):
    tensor = weight(shape, seed)
    first, core, last = split_tucker(tensor, *data.draw(st.sampled_from(rank_pairs(shape))))
    for outer in (first.flatten(1), last.flatten(1).T):
        torch.testing.assert_close(outer @ outer.T, torch.eye(len(outer), dtype=torch.float64), **CLOSE)
    error = (tensor - merged_tucker(first, core, last)).square().sum()
    torch.testing.assert_close(error, tensor.square().sum() - core.square().sum(), **CLOSE)


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (6, 5), (5, 5), (3, 1), (1, 3)])
def test_ranks_that_do_not_fit_are_named(ranks):
    with pytest.raises(
        ValueError, match=rf"ranks of {ranks[0]} outputs and {ranks[1]} inputs do not fit .*\(5, 4, 1, 2\)"
    ):
        split_tucker(weight((5, 4, 1, 2)), *ranks)


# Both


def test_the_same_weight_is_split_the_same_way_in_its_own_dtype():
    tensor = weight((6, 5, 3, 3), dtype=torch.float32)
    for parts in (lambda: split_spatial(tensor, 4), lambda: split_tucker(tensor, 4, 3)):
        for once, again in zip(parts(), parts(), strict=True):
            assert once.dtype == torch.float32
            assert torch.equal(once, again)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_costs_are_those_of_the_layers(settings):
    shape, example = (6, 5, 3, 2), (torch.zeros(1, 5, 9, 13),)
    layer = nn.Conv2d(5, 6, (3, 2), **settings)
    vertical = nn.Conv2d(5, 4, (3, 1), **axis_of(settings, 0))
    horizontal = nn.Conv2d(4, 6, (1, 2), **axis_of(settings, 1))
    _, _, height, width = layer(*example).shape
    whole, pair = spatial_cost(*shape, height * example[0].shape[3], height * width, 4)
    assert whole == macs(layer, example)
    assert pair == macs(nn.Sequential(vertical, horizontal), example)
    three = nn.Sequential(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 4, (3, 2), **settings), nn.Conv2d(4, 6, 1))
    assert tucker_cost(*shape, 9 * 13, height * width, 4, 2) == (whole, macs(three, example))
