"""Scores of channels against slow formulas, how they are brought together, and what a ranking over groups makes of them."""

import math
from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.methods import importance
from compress.methods.importance import (
    geometric_median,
    l1_norm,
    l2_norm,
    lamp,
    lowest,
    mean_magnitude,
    obd,
    random,
    scale,
    sum_by_root,
    taylor,
)
from compress.methods.ranking import below, isomorphic, normalised, reduced

SHAPES = [(5, 3, 2, 4), (5, 3), (5,), (4, 1, 3, 3), (3, 2, 4), (1, 6)]
EVERY_AXIS = [(shape, axis) for shape in SHAPES for axis in range(-len(shape), len(shape))]
OF_WEIGHTS = [l1_norm, l2_norm, geometric_median, lamp]
HOW = ["sum", "mean", "max", "product"]
SCALES = ["none", "mean", "max", "sum", "standardize"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels_of(tensor, axis):
    """The numbers of each channel, one vector per channel."""
    array = np.moveaxis(tensor.double().numpy(), axis, 0)
    return [array[channel].ravel() for channel in range(len(array))]


def slow_l1(weight, axis):
    return [sum(abs(value) for value in channel) for channel in channels_of(weight, axis)]


def slow_l2(weight, axis):
    return [math.sqrt(sum(value**2 for value in channel)) for channel in channels_of(weight, axis)]


def slow_median(weight, axis):
    found = channels_of(weight, axis)
    return [sum(math.dist(one, other) for other in found) for one in found]


def slow_lamp(weight, axis):
    squares = [sum(value**2 for value in channel) for channel in channels_of(weight, axis)]
    ranks = [(square, index) for index, square in enumerate(squares)]
    return [rank[0] / sum(other[0] for other in ranks if other >= rank) if rank[0] else 0.0 for rank in ranks]


SLOW = {l1_norm: slow_l1, l2_norm: slow_l2, geometric_median: slow_median, lamp: slow_lamp}


@pytest.mark.parametrize(("shape", "axis"), EVERY_AXIS)
@pytest.mark.parametrize("score", OF_WEIGHTS)
def test_a_score_of_weights_is_its_formula(score, shape, axis):
    tensor = normal(*shape)
    np.testing.assert_allclose(score(tensor, axis), SLOW[score](tensor, axis), rtol=1e-10)


@pytest.mark.parametrize(("shape", "axis"), EVERY_AXIS)
def test_taylor_squares_what_a_channel_s_weights_change_together(shape, axis):
    weight, gradient = normal(*shape), normal(*shape, seed=1)
    products = [w @ g for w, g in zip(channels_of(weight, axis), channels_of(gradient, axis), strict=True)]
    np.testing.assert_allclose(taylor(weight, gradient, axis), np.square(products), rtol=1e-10)


@pytest.mark.parametrize(("shape", "axis"), EVERY_AXIS)
def test_obd_is_half_the_curvature_times_the_squared_weights(shape, axis):
    weight, curvature = normal(*shape), normal(*shape, seed=1).square()
    pairs = zip(channels_of(weight, axis), channels_of(curvature, axis), strict=True)
    expected = [sum(h * w * w / 2 for w, h in zip(*pair, strict=True)) for pair in pairs]
    np.testing.assert_allclose(obd(weight, curvature, axis), expected, rtol=1e-10)


@pytest.mark.parametrize(("shape", "axis"), EVERY_AXIS)
def test_mean_magnitude_averages_all_but_the_channels(shape, axis):
    output = normal(*shape)
    expected = [np.mean(np.abs(channel)) for channel in channels_of(output, axis)]
    np.testing.assert_allclose(mean_magnitude(output, axis), expected, rtol=1e-12)


def test_taylor_is_the_squared_change_of_a_linear_loss():
    weight, coefficients = normal(4, 3, 2, 2).requires_grad_(), normal(4, 3, 2, 2, seed=1)
    (weight * coefficients).sum().backward()
    for axis in (0, 1):
        changes = []
        for channel in range(weight.shape[axis]):
            cut = weight.detach().clone()
            cut.select(axis, channel).zero_()
            changes.append((((cut - weight.detach()) * coefficients).sum() ** 2).item())
        np.testing.assert_allclose(taylor(weight.detach(), weight.grad, axis), changes, rtol=1e-10)


def test_obd_is_the_rise_of_a_quadratic_loss_from_its_minimum():
    least, curvature = normal(4, 3, 2), normal(4, 3, 2, seed=1).square()
    rises = []
    for channel in range(3):
        cut = least.clone()
        cut[:, channel] = 0
        rises.append((curvature * (cut - least) ** 2 / 2).sum().item())
    np.testing.assert_allclose(obd(least, curvature, 1), rises, rtol=1e-12)


def test_batches_that_pull_in_opposite_directions_still_count():
    weight, gradient = normal(4, 3), normal(4, 3, seed=1)
    each = torch.stack([taylor(weight, gradient, 0), taylor(weight, -gradient, 0)])
    assert (each.mean(0) > 0).all()
    torch.testing.assert_close(each.mean(0), taylor(weight, gradient, 0))


def test_gradients_have_the_weight_s_shape():
    for score in (taylor, obd):
        with pytest.raises(jaxtyping.TypeCheckError):
            score(normal(4, 3), normal(4, 1), 0)


def test_scale_is_the_size_of_the_factor():
    assert scale(torch.tensor([0.5, -2.0, 0.0])).tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_scores_of_narrow_types_are_wide(dtype, axis):
    weight, gradient = normal(6, 40).mul(300).to(dtype), normal(6, 40, seed=1).to(dtype)
    for score in (l2_norm, geometric_median, lamp):
        found = score(weight, axis)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, SLOW[score](weight, axis), rtol=1e-6)
    for found, expected in (
        (taylor(weight, gradient, axis), taylor(weight.double(), gradient.double(), axis)),
        (obd(weight, gradient.abs(), axis), obd(weight.double(), gradient.double().abs(), axis)),
        (mean_magnitude(weight, axis), mean_magnitude(weight.double(), axis)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("score", OF_WEIGHTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_order_of_channels_goes_with_them(score, axis):
    weight, permutation = normal(6, 6, 3), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(score(weight.index_select(axis, permutation), axis), score(weight, axis)[permutation])


@pytest.mark.parametrize("score", OF_WEIGHTS)
def test_inputs_are_left_alone(score):
    weight = normal(5, 4)
    before = weight.clone()
    score(weight, 0)
    assert torch.equal(weight, before)


# The geometric median


@pytest.mark.parametrize("channels", [8, 60])  # distances are computed in another way from 26 rows on
def test_a_common_shift_changes_no_distance(channels):
    weight = normal(channels, 7)
    shifted = geometric_median(weight + 1e3 * normal(1, 7, seed=1), 0)
    torch.testing.assert_close(shifted, geometric_median(weight, 0), rtol=1e-9, atol=0)


def test_the_channel_in_the_middle_goes_first_and_not_the_smallest():
    weight = torch.tensor([[0.0, 0.1], [5.0, 5.0], [5.1, 5.0], [9.0, 9.0]], dtype=torch.float64)
    assert lowest(l2_norm(weight, 0), 1) == [0]
    assert lowest(geometric_median(weight, 0), 2) == [1, 2]


@pytest.mark.parametrize("channels", [1, 8, 60])
def test_channels_that_are_all_the_same_are_at_no_distance(channels):
    weight = normal(1, 7).expand(channels, 7)
    assert geometric_median(weight, 0).max() < 1e-12


def test_distances_come_in_parts(monkeypatch):
    weight = normal(90, 6)
    monkeypatch.setattr(importance, "_ROWS_AT_ONCE", 32)
    np.testing.assert_allclose(geometric_median(weight, 0), slow_median(weight, 0), rtol=1e-8)


def test_no_more_than_some_distances_are_held_at_once(monkeypatch):
    held, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *rows: held.append(cdist(*rows)) or held[-1])
    found = geometric_median(normal(2500, 2), 0)
    assert found.shape == (2500,)
    assert max(each.numel() for each in held) <= 1024 * 2500


# LAMP


@given(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=12))
def test_lamp_orders_as_the_norm_does_ties_included(rows):
    weight = torch.tensor(rows, dtype=torch.float64)
    scores = lamp(weight, 0)
    for count in range(len(rows) + 1):
        assert lowest(scores, count) == lowest(l2_norm(weight, 0), count)
    assert scores.max() == (1.0 if weight.any() else 0.0)
    assert scores.min() >= 0


def test_of_equal_channels_each_has_one_fewer_left_with_it():
    assert lamp(torch.ones(4, 3), 0).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


def test_lamp_knows_proportions_only():
    weight = normal(6, 5)
    for factor in (1e-12, 1e9):
        torch.testing.assert_close(lamp(weight * factor, 0), lamp(weight, 0))


def test_lamp_of_zeros_is_zero():
    assert lamp(torch.zeros(3, 4), 1).tolist() == [0.0] * 4
    assert lamp(torch.tensor([[0.0], [2.0], [0.0]]), 0).tolist() == [0.0, 1.0, 0.0]


# Random scores


def test_random_scores_depend_on_their_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random(1000, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(random(1000, seed=7), first)
    assert not torch.equal(random(1000, seed=8), first)


def test_random_scores_are_uniform():
    scores = random(4000, seed=0)
    assert scores.min() >= 0
    assert scores.max() < 1
    tenths = torch.histc(scores, 10, 0, 1)
    assert ((tenths - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, 99.9 %


# Bringing together


def coupled(seed=0):
    """Three tensors: one follows every channel, one has two slices a channel, one leaves channels 1 and 4 out."""
    roots = [torch.tensor([2, 0, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([3, 0, 2])]
    return [normal(len(each), seed=seed + index).abs() for index, each in enumerate(roots)], roots


def slow_reduced(scores, roots, channels, how):
    said = [[] for _ in range(channels)]
    for score, root in zip(scores, roots, strict=True):
        own = {}
        for value, channel in zip(score.tolist(), root.tolist(), strict=True):
            own[channel] = own.get(channel, 0.0) + value
        for channel, value in own.items():
            said[channel].append(value)
    combine = {
        "sum": sum,
        "mean": lambda values: sum(values) / len(values),
        "max": max,
        "product": lambda values: math.prod(values) ** (1 / len(values)),
    }
    return [combine[how](values) if values else 0.0 for values in said]


@pytest.mark.parametrize("how", HOW)
def test_tensors_are_combined_after_their_own_slices_are_added_up(how):
    scores, roots = coupled()
    found = reduced(scores, roots, 5, how)
    np.testing.assert_allclose(found, slow_reduced(scores, roots, 5, how), rtol=1e-12)
    assert found[4] == 0


def test_the_sum_is_sum_by_root_to_the_last_bit():
    for seed in range(20):
        scores, roots = coupled(seed)
        assert torch.equal(reduced(scores, roots, 5, "sum"), sum_by_root(scores, roots, 5))


@pytest.mark.parametrize("how", HOW)
def test_a_single_tensor_speaks_for_itself(how):
    scores = [normal(6).abs()]
    torch.testing.assert_close(reduced(scores, [torch.arange(6)], 6, how), scores[0])


def test_a_tensor_that_says_a_channel_is_worth_nothing_is_not_one_that_says_nothing():
    everything, scores = torch.tensor([0, 1]), [torch.tensor([4.0, 4.0]), torch.tensor([0.0])]
    roots = [everything, torch.tensor([0])]
    found = {how: reduced(scores, roots, 2, how).tolist() for how in HOW}
    assert found == {
        "sum": [4.0, 4.0],
        "mean": [2.0, 4.0],
        "max": [4.0, 4.0],
        "product": [0.0, pytest.approx(4.0)],
    }


def test_products_of_many_tensors_stay_in_range_and_in_order():
    values, roots = torch.tensor([3e-12, 1e-12, 2e-12, 0.0]), [torch.arange(4)] * 100
    for factor in (1.0, 1e20):
        found = reduced([values * factor] * 100, roots, 4, "product")
        torch.testing.assert_close(found, (values * factor).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", HOW)
def test_a_group_without_scores_gets_zeros(how):
    assert reduced([], [], 3, how).tolist() == [0.0] * 3


@pytest.mark.parametrize("how", HOW)
def test_scores_and_roots_come_in_pairs(how):
    for scores, roots in (([torch.ones(2)], []), ([], [torch.arange(2)])):
        with pytest.raises(ValueError, match=r"is shorter|is longer"):
            reduced(scores, roots, 2, how)


# Normalising


SLOW_SCALES = {
    "none": lambda values: values,
    "mean": lambda values: values / (np.sum(values) / len(values)),
    "max": lambda values: values / max(values),
    "sum": lambda values: values / sum(values),
    "standardize": lambda values: (values - np.mean(values)) / np.sqrt(np.mean((values - np.mean(values)) ** 2)),
}


@pytest.mark.parametrize("how", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_scores_are_the_formula(how, dtype):
    scores = normal(9).abs().to(dtype)
    found = normalised(scores, how)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, SLOW_SCALES[how](scores.double().numpy()), rtol=1e-12)


@pytest.mark.parametrize("how", SCALES)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.sampled_from([1e-30, 1.0, 1e30]))
def test_normalising_keeps_the_order(how, values, factor):
    scores = torch.tensor(values, dtype=torch.float64) * factor
    found = normalised(scores, how)
    assert torch.isfinite(found).all()
    for count in range(len(values) + 1):
        assert lowest(found, count) == lowest(scores, count)


@pytest.mark.parametrize("how", ["mean", "max", "sum", "standardize"])
def test_a_common_factor_changes_nothing(how):
    scores = normal(9).abs()
    torch.testing.assert_close(normalised(scores * 1e-9, how), normalised(scores, how))


def test_a_common_shift_changes_no_standardized_score():
    scores = normal(9).abs()
    torch.testing.assert_close(normalised(scores + 50, "standardize"), normalised(scores, "standardize"))


@pytest.mark.parametrize("channels", [1, 3, 10])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-300, 7.0])
@pytest.mark.parametrize("how", SCALES)
def test_equal_scores_stay_equal(how, value, channels):
    found = normalised(torch.full((channels,), value, dtype=torch.float64), how)
    expected = {"none": value, "mean": 1.0, "max": 1.0, "sum": 1 / channels, "standardize": 0.0}[how]
    assert found.tolist() == pytest.approx([expected if value else 0.0] * channels, rel=1e-12, abs=0)


def test_rounding_is_no_spread():
    scores = torch.tensor([1.0, 1.0 + 1e-7, 1.0 - 1e-7], dtype=torch.float64)
    assert normalised(scores, "standardize").tolist() == [0.0] * 3
    assert normalised(torch.tensor([1.0, 1.001]), "standardize").tolist() == pytest.approx([-1, 1])


# Ranking over groups


GROUPS = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 2.0, 5.0, 0.5]), torch.tensor([0.1])]


def test_what_goes_grows_with_every_threshold():
    gone = [
        sum(below(scores, value) for scores in GROUPS)
        for value in [*sorted({value for scores in GROUPS for value in scores.tolist()}), math.inf]
    ]
    assert gone == [0, 1, 2, 3, 6, 7, 8]
    assert all(fewer < more for fewer, more in pairwise(gone))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=15), st.floats(-1, 6))
def test_those_below_are_those_that_go_first(values, threshold):
    scores = torch.tensor(values, dtype=torch.float64)
    expected = [index for index, value in enumerate(values) if value < threshold]
    assert below(scores, threshold) == len(expected)
    assert lowest(scores, below(scores, threshold)) == expected


def test_a_threshold_is_not_rounded_to_the_scores_type():
    scores = torch.tensor([0.1])  # float32: 0.100000001
    assert below(scores, 0.1) == 0
    assert below(scores, 0.1000000016) == 1


def test_equal_signatures_come_together_in_first_seen_order():
    signatures = {"stem": ("conv", 0), "mlp.0": ("linear", 0), "late": ("conv", 0), "heads": ("attention",)}
    signatures["mlp.1"] = ("linear", 0)
    assert isomorphic(signatures) == [["stem", "late"], ["mlp.0", "mlp.1"], ["heads"]]
    assert isomorphic({}) == []


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=12))
def test_every_name_is_in_the_one_group_of_its_signature(signatures):
    groups = isomorphic(signatures)
    assert sorted(name for group in groups for name in group) == sorted(signatures)
    assert [{signatures[name] for name in group} for group in groups] == [
        {s} for s in dict.fromkeys(signatures.values())
    ]
