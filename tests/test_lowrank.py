"""Truncated SVD against Eckart-Young, and the two layers it makes of one."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress import surgery
from compress.edits import Factor
from compress.methods.lowrank import as_matrix, factor_cost, rank_for_energy, rounded_rank, singular_values, split

SHAPES = [(7, 4), (4, 7), (6, 3, 3, 5), (20, 2, 1, 1), (5, 9, 1, 3)]


def weight(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rebuilt(first, second):
    return (second @ as_matrix(first)).reshape(second.shape[0], *first.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_what_the_discarded_singular_values_hold(shape):
    tensor = weight(shape)
    values = singular_values(tensor)
    assert len(values) == min(shape[0], tensor[0].numel())
    assert torch.equal(values, values.sort(descending=True).values)
    for rank in range(1, len(values) + 1):
        first, second = split(tensor, rank)
        assert first.shape == (rank, *shape[1:])
        assert second.shape == (shape[0], rank)
        error = (tensor - rebuilt(first, second)).norm()
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), rtol=1e-9, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000), st.data())
def test_more_rank_never_means_more_error(out, into, height, seed, data):
    tensor = weight((out, into, height, 2), seed)
    largest = min(out, into * height * 2)
    low = data.draw(st.integers(1, largest))
    high = data.draw(st.integers(low, largest))
    errors = [(tensor - rebuilt(*split(tensor, rank))).norm().item() for rank in (low, high)]
    assert errors[1] <= errors[0] + 1e-9


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_full_rank_is_exact(out, into, seed):
    tensor = weight((out, into), seed)
    torch.testing.assert_close(rebuilt(*split(tensor, min(out, into))), tensor, rtol=0, atol=1e-9)


def test_both_factors_carry_the_same_share_and_the_dtype_of_the_weight():
    first, second = split(weight((8, 5, 3, 1), dtype=torch.float32), 3)
    assert first.dtype == second.dtype == torch.float32
    assert first.is_contiguous()
    assert second.is_contiguous()
    torch.testing.assert_close(as_matrix(first).norm(dim=1), second.norm(dim=0))


def truncated(layer, rank):
    values = torch.linalg.svd(as_matrix(layer.weight.detach()), full_matrices=False)
    low = (values[0][:, :rank] * values[1][:rank]) @ values[2][:rank]
    return low.reshape(layer.weight.shape)


def factorized(layer, rank):
    """The layer within a model after the edit, filled with its factors."""
    model = nn.Sequential(layer)
    old = layer.weight.detach(), layer.bias
    surgery.apply(model, Factor(module="0", rank=rank))
    first, second = split(old[0], rank)
    with torch.no_grad():
        model[0][0].weight.copy_(first)
        model[0][1].weight.copy_(second.reshape(model[0][1].weight.shape))
        if old[1] is not None:
            model[0][1].bias.copy_(old[1])
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": 1, "bias": False},
        {"padding": "same"},
        {"padding": "same", "dilation": (1, 3)},
        {"padding": "valid", "stride": (1, 2)},
        {"padding": (2, 1), "stride": (2, 1), "dilation": 2},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": 3},
        {"kernel_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_two_convolutions_do_what_one_of_that_rank_does(settings, rank):
    torch.manual_seed(0)
    layer = nn.Conv2d(7, 6, **{"kernel_size": 3, **settings}).double()
    inputs = weight((2, 7, 9, 14), seed=1)
    low = truncated(layer, rank)
    expected = F.conv2d(inputs, low, layer.bias, layer.stride, layer.padding, layer.dilation)
    torch.testing.assert_close(factorized(layer, rank)(inputs), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_two_linear_layers_do_what_one_of_that_rank_does(bias):
    torch.manual_seed(0)
    layer = nn.Linear(9, 5, bias=bias).double()
    inputs = weight((3, 4, 9), seed=1)  # tokens
    expected = F.linear(inputs, truncated(layer, 2), layer.bias)
    torch.testing.assert_close(factorized(layer, 2)(inputs), expected, rtol=0, atol=1e-9)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(lambda values: sorted(values, reverse=True)),
    st.floats(0, 1),
)
def test_the_rank_is_the_smallest_that_holds_the_energy(values, energy):
    tensor = torch.tensor(values, dtype=torch.float64)
    rank = rank_for_energy(tensor, energy)
    assert 1 <= rank <= len(values)
    squares = tensor.square()
    assert squares[:rank].sum() >= (energy - 1e-12) * squares.sum()
    if rank > 1:
        assert squares[: rank - 1].sum() < (energy + 1e-12) * squares.sum()


def test_ranks_by_hand():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])  # squares 4, 1, 1, 0 of 6
    found = [rank_for_energy(values, energy) for energy in (0.0, 0.5, 4 / 6, 0.7, 5 / 6, 0.9, 1.0)]
    assert found == [1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("energy", [0.0, 0.5, 1.0])
def test_a_layer_of_zeros_needs_one_rank(energy):
    values = singular_values(torch.zeros(4, 3, 2, 2))
    assert rank_for_energy(values, energy) == 1
    first, second = split(torch.zeros(4, 3, 2, 2), 1)
    assert not rebuilt(first, second).any()


def test_all_the_energy_of_a_weight_of_low_rank_is_in_its_rank():
    tensor = weight((9, 2)) @ weight((2, 7), seed=1)
    assert rank_for_energy(singular_values(tensor), 1 - 1e-12) == 2


@given(st.integers(0, 500), st.integers(1, 64), st.integers(1, 300))
def test_ranks_are_rounded_up_within_the_limit(rank, multiple, limit):
    found = rounded_rank(rank, multiple, limit)
    assert 1 <= found <= limit
    assert found >= min(rank, limit)
    assert found == limit or found % multiple == 0 or (rank == 0 and found == 1)
    assert found < rank + multiple or found == 1


@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 1000), st.integers(1, 64))
def test_splitting_pays_below_the_harmonic_rank(out, rest, positions, rank):
    whole, factors = factor_cost(out, rest, positions, rank)
    assert whole == out * rest * positions
    assert (factors < whole) == (rank * (out + rest) < out * rest)


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        rank_for_energy(torch.ones(2, 2), 0.5)
