"""Low-rank factors that follow the inputs: against plain loops, sums over samples, and the best any rank can do."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.methods.lowrank import errors_by_rank, rank_for_energy, split
from compress.methods.whitening import (
    add_moments,
    bias_correction,
    convolution_rows,
    output_error,
    output_moment,
    output_values,
    sampled_rows,
    split_by_outputs,
    split_whitened,
    split_with_shift,
)

CLOSE = {"rtol": 0, "atol": 1e-9}
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 14), st.integers(0, 1000))


def case(out, features, samples, seed, mean=1.0):
    """A weight and inputs (samples, features), correlated, of uneven size, not centred; with few samples, singular."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.exp(rng.normal(size=features))
    inputs = rng.normal(size=(samples, features)) @ mixing + mean * rng.normal(size=features)
    return torch.tensor(rng.normal(size=(out, features))), torch.tensor(inputs)


def product(first, second):
    return second @ first.flatten(1)


def lost(weight, approximation, inputs, shift=0.0):
    """Mean squared error of the outputs, sample by sample."""
    errors = [(weight - approximation) @ row - shift for row in inputs]
    return sum(float(error @ error) for error in errors) / len(inputs)


def best_possible(outputs, rank):
    """What any matrix of this rank misses of outputs (n, out) at least: numpy's SVD of the outputs themselves."""
    return (np.linalg.svd(outputs.numpy(), compute_uv=False)[rank:] ** 2).sum() / len(outputs)


# Moments


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 100))
def test_moments_are_those_of_all_inputs_together(lengths, seed):
    rng = np.random.default_rng(seed)
    parts = [torch.tensor(rng.normal(2, 1, (length, 2, 3)), dtype=torch.float32) for length in lengths]  # tokens
    total = None
    for part in parts:
        total = add_moments(total, part)
    rows = [row.double().numpy() for part in parts for sample in part for row in sample]
    assert total.count == len(rows)
    if not rows:
        assert not total.mean.any()
        assert not total.moment.any()
        return
    mean = sum(rows) / len(rows)
    np.testing.assert_allclose(total.mean, mean, atol=1e-12)
    np.testing.assert_allclose(total.moment, sum(np.outer(row, row) for row in rows) / len(rows), atol=1e-11)
    spread = sum(np.outer(row - mean, row - mean) for row in rows) / len(rows)
    np.testing.assert_allclose(total.covariance, spread, atol=1e-11)
    assert total.mean.dtype == total.scatter.dtype == torch.float64


def test_adding_leaves_what_was_there():
    _, inputs = case(1, 3, 9, 0)
    total = add_moments(None, inputs)
    before = total.count, total.mean.clone(), total.scatter.clone()
    add_moments(total, inputs + 5)
    assert total.count == before[0]
    assert torch.equal(total.mean, before[1])
    assert torch.equal(total.scatter, before[2])


def test_a_large_mean_costs_no_digits():
    spread = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    total = None
    for _ in range(5):
        total = add_moments(total, spread + 1e8)  # squares of 1e16 leave no room for a spread of 1
    torch.testing.assert_close(total.covariance, torch.eye(2, dtype=torch.float64), **CLOSE)


def test_many_rows_are_taken_in_parts():
    inputs = torch.tensor(np.random.default_rng(0).normal(3, 1, (40_000, 2)))
    total = add_moments(None, inputs)
    np.testing.assert_allclose(total.covariance, np.cov(inputs.numpy().T, bias=True), atol=1e-12)
    np.testing.assert_allclose(total.mean, inputs.numpy().mean(0), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch says it may be slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (4, 2), "dilation": (1, 3)},
        {"padding": "valid", "stride": (1, 2)},
        {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": 3},
        {"kernel_size": 1, "stride": 2},
    ],
    ids=str,
)
def test_rows_are_what_a_convolution_multiplies(settings):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, **{"kernel_size": (2, 3), **settings}, bias=False).double()
    inputs = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    outputs = layer(inputs)
    rows = convolution_rows(inputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    expected = [outputs[n, :, y, x] for n in range(2) for y in range(outputs.shape[2]) for x in range(outputs.shape[3])]
    assert len(rows) == len(expected)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, torch.stack(expected), **CLOSE)
    positions = outputs[0, 0].numel()
    at = torch.randperm(positions)[: max(1, positions // 2)]
    some = sampled_rows(inputs, at, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    assert torch.equal(some, rows.reshape(2, positions, -1)[:, at].flatten(0, 1))


def test_a_row_by_hand():
    inputs = torch.arange(12.0).reshape(1, 2, 2, 3)
    rows = convolution_rows(inputs, (2, 2), padding=(1, 0))
    assert rows.shape == (6, 8)  # 3 x 2 positions, 2 channels of 2 x 2
    assert rows[0].tolist() == [0, 0, 0, 1, 0, 0, 6, 7]
    assert rows[3].tolist() == [1, 2, 4, 5, 7, 8, 10, 11]


# The approximation


@given(SIZES, st.data())
def test_no_factors_of_the_rank_lose_less(sizes, data):
    out, features, _, _ = sizes
    weight, inputs = case(*sizes)
    rank = data.draw(st.integers(1, min(out, features)))
    moment = add_moments(None, inputs).moment
    first, second = split_whitened(weight, moment, rank)
    assert first.shape == (rank, features)
    assert second.shape == (out, rank)
    found, whole = lost(weight, product(first, second), inputs), lost(weight, 0 * weight, inputs)
    assert found == pytest.approx(best_possible(inputs @ weight.T, rank), abs=2e-10 * whole)
    assert found <= lost(weight, product(*split(weight, rank)), inputs) + 1e-12 * whole


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000), st.data())
def test_same_as_by_whitening_and_its_inverse(out, features, seed, data):
    weight, inputs = case(out, features, 3 * features, seed)
    rank = data.draw(st.integers(1, min(out, features)))
    moment = add_moments(None, inputs).moment
    root = np.linalg.cholesky(moment.numpy())
    left, values, right = np.linalg.svd(weight.numpy() @ root, full_matrices=False)
    if rank < len(values) and values[rank - 1] < 1.05 * values[rank]:
        return  # nearly two best ones
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root)
    np.testing.assert_allclose(product(*split_whitened(weight, moment, rank)), expected, atol=1e-6)


@given(SIZES, st.floats(1e-3, 1e3))
def test_inputs_without_preference_mean_the_plain_svd(sizes, scale):
    weight, _ = case(*sizes)
    for rank in range(1, min(weight.shape) + 1):
        for moment in (scale * torch.eye(weight.shape[1]), torch.zeros(weight.shape[1], weight.shape[1])):
            found = product(*split_whitened(weight, moment, rank))
            torch.testing.assert_close(found, product(*split(weight, rank)), rtol=0, atol=1e-7)


@given(SIZES)
def test_nothing_is_lost_at_the_rank_of_what_was_seen(sizes):
    weight, inputs = case(*sizes)
    moment = add_moments(None, inputs).moment
    rank = int(np.linalg.matrix_rank((inputs @ weight.T).numpy()))
    if rank:
        approximation = product(*split_whitened(weight, moment, rank))
        assert output_error(weight, moment, approximation) < 2e-10


@pytest.mark.parametrize("seed", range(5))
def test_ranks_left_over_go_to_the_largest_part_of_what_was_never_seen(seed):
    weight, inputs = case(8, 12, 3, seed)
    moment = add_moments(None, inputs).moment
    seen = np.linalg.svd((inputs @ weight.T).numpy())[2][:3].T  # directions of the outputs
    rest = weight.numpy() - seen @ seen.T @ weight.numpy()
    left, values, right = np.linalg.svd(rest)
    for rank in range(3, 9):
        more = rank - 3
        expected = seen @ seen.T @ weight.numpy() + (left[:, :more] * values[:more]) @ right[:more]
        np.testing.assert_allclose(product(*split_whitened(weight, moment, rank)), expected, atol=1e-5)
    np.testing.assert_allclose(product(*split_whitened(weight, moment, 8)), weight, atol=1e-9)


@given(SIZES, st.data())
def test_values_foretell_the_error(sizes, data):
    weight, inputs = case(*sizes)
    moment = add_moments(None, inputs).moment
    values = output_values(weight, moment)
    assert len(values) == min(weight.shape)
    rank = data.draw(st.integers(1, len(values)))
    found = output_error(weight, moment, product(*split_whitened(weight, moment, rank)))
    assert errors_by_rank(values)[rank - 1] == pytest.approx(found, abs=2e-10)
    assert errors_by_rank(values)[rank_for_energy(values, 0.9) - 1] <= 0.1 + 1e-12


def test_errors_by_rank_by_hand():
    assert errors_by_rank(torch.tensor([2.0, 1.0, 1.0, 0.0])).tolist() == pytest.approx([2 / 6, 1 / 6, 0, 0])
    assert errors_by_rank(torch.zeros(3)).tolist() == [0, 0, 0]


def test_told_by_the_outputs_it_is_the_same():
    weight, inputs = case(5, 7, 30, 0)
    bias = torch.tensor([1.0, -2, 3, 0, 9])
    given, seen = add_moments(None, inputs), add_moments(None, inputs @ weight.T)
    torch.testing.assert_close(output_moment(weight, given.moment), seen.moment)
    biased = add_moments(None, inputs @ weight.T + bias)  # a bias moves the mean alone
    torch.testing.assert_close(output_moment(weight, given.covariance), biased.covariance)
    by_outputs = product(*split_by_outputs(weight, biased.covariance, 2))
    torch.testing.assert_close(by_outputs, product(*split_whitened(weight, given.covariance, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_a_convolution(dtype):
    torch.manual_seed(0)
    settings = {"stride": (2, 1), "padding": (1, 2)}
    weight, inputs = torch.randn(6, 3, 3, 2, dtype=dtype), torch.randn(4, 3, 7, 9, dtype=dtype).relu()
    moments = add_moments(None, convolution_rows(inputs, (3, 2), **settings))
    first, second = split_whitened(weight, moments.moment, 3)
    assert first.shape == (3, 3, 3, 2)
    assert first.dtype == second.dtype == dtype
    assert first.is_contiguous()
    assert second.is_contiguous()
    torch.testing.assert_close(first.flatten(1).norm(dim=1), second.norm(dim=0))  # shared evenly
    outputs = F.conv2d(inputs, weight, **settings)
    approximated = F.conv2d(F.conv2d(inputs, first, **settings), second[:, :, None, None])
    error = float((outputs - approximated).square().sum() / outputs.square().sum())
    whole = product(first, second).reshape(weight.shape)
    assert output_error(weight, moments.moment, whole) == pytest.approx(error, rel=1e-4)
    assert error < output_error(weight, moments.moment, product(*split(weight, 3)).reshape(weight.shape))


# The error and the bias


@given(SIZES)
def test_the_error_is_that_of_the_samples(sizes):
    weight, inputs = case(*sizes)
    other, _ = case(*sizes[:3], sizes[3] + 1)
    moment = add_moments(None, inputs).moment
    expected = lost(weight, other, inputs) / lost(weight, 0 * weight, inputs)
    assert output_error(weight, moment, other) == pytest.approx(expected, rel=1e-6)
    assert output_error(weight, moment, 0 * weight) == pytest.approx(1)
    assert output_error(weight, moment, weight) == 0


def test_the_error_where_there_was_no_output():
    silent, moment = torch.zeros(2, 3), torch.eye(3)
    assert output_error(silent, moment, silent) == 0
    assert output_error(silent, moment, torch.ones(2, 3)) == math.inf
    assert output_error(torch.ones(2, 3), 0 * moment, silent) == 0


@given(SIZES, st.floats(-3, 3))
def test_of_all_shifts_the_correction_loses_least(sizes, size):
    weight, inputs = case(*sizes)
    other, _ = case(*sizes[:3], sizes[3] + 1)
    moments = add_moments(None, inputs)
    shift = bias_correction(weight, other, moments.mean)
    np.testing.assert_allclose(((inputs @ other.T) + shift).mean(0), (inputs @ weight.T).mean(0), atol=1e-9)
    away = size * torch.randn(len(shift), dtype=torch.float64, generator=torch.Generator().manual_seed(sizes[3]))
    least = lost(weight, other, inputs, shift)
    assert lost(weight, other, inputs, shift + away) == pytest.approx(least + float(away @ away), rel=1e-9, abs=1e-9)
    if (variance := lost(weight, 0 * weight, inputs - moments.mean)) > 1e-9:
        assert output_error(weight, moments.covariance, other) == pytest.approx(least / variance, rel=1e-6)


@given(SIZES, st.floats(0, 20), st.data())
def test_with_a_shift_no_other_factors_lose_less(sizes, mean, data):
    weight, inputs = case(*sizes, mean=mean)
    rank = data.draw(st.integers(1, min(weight.shape)))
    moments = add_moments(None, inputs)
    first, second, shift = split_with_shift(weight, moments, rank)
    found, whole = lost(weight, product(first, second), inputs, shift), lost(weight, 0 * weight, inputs)
    centred = (inputs - inputs.mean(0)) @ weight.T
    assert found == pytest.approx(best_possible(centred, rank), abs=2e-10 * whole)
    for factors in (split_whitened(weight, moments.moment, rank), split(weight, rank)):
        other = product(*factors)
        corrected = lost(weight, other, inputs, bias_correction(weight, other, moments.mean))
        assert found <= corrected + 2e-10 * whole
        assert corrected <= lost(weight, other, inputs) + 1e-12 * whole


def test_a_shift_saves_the_rank_that_the_mean_would_take():
    weight = torch.eye(3)
    inputs = torch.tensor([[50.0, 2, 1], [50, 2, -1], [50, -2, 1], [50, -2, -1]])  # variances 0, 4 and 1
    moments = add_moments(None, inputs)
    first, second, shift = split_with_shift(weight, moments, 1)
    assert lost(weight, product(first, second), inputs, shift) == pytest.approx(1, abs=1e-5)
    assert lost(weight, product(*split_whitened(weight, moments.moment, 1)), inputs) == pytest.approx(5, abs=1e-5)
    assert shift.tolist() == pytest.approx([50, 0, 0], abs=1e-5)
    assert first.dtype == second.dtype == shift.dtype == torch.float32


def test_a_convolution_with_a_corrected_bias_keeps_its_mean_outputs():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(1, 0)).double()
    inputs = torch.randn(4, 3, 7, 9, dtype=torch.float64).relu()
    rows = convolution_rows(inputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    first, second, shift = split_with_shift(layer.weight.detach(), add_moments(None, rows), 2)
    middle = F.conv2d(inputs, first, None, layer.stride, layer.padding)
    found = F.conv2d(middle, second[:, :, None, None], layer.bias + shift)
    torch.testing.assert_close(found.mean((0, 2, 3)), layer(inputs).mean((0, 2, 3)), **CLOSE)
    assert (found - layer(inputs)).abs().max() > 0.01
