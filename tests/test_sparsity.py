"""Penalties on whole channels: their values by hand, and their gradients in closed form."""

import pytest
import torch
from training_cases import LABELS, Trainer, best_epoch, bits, mislabelled, same

from compress.config.prune import SparsityConfig
from compress.methods.groups import ChannelGraph, copy_on_cpu
from compress.methods.sparsity import channel_squares, group_lasso, growing_decay, relative_strength
from compress.models.factory import Arch, create
from compress.pruning.sparse import SparsityPenalty
from compress.training import Objective

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def coupled():
    """Three channels: a filter that makes them, a norm, and a linear layer that reads each at two places."""
    made, factor, read = (normal(3, 2, 2, 1), normal(3, seed=1), normal(5, 7, seed=2))
    slices = [torch.arange(3), torch.arange(3), torch.tensor([0, 1, 2, 3, 5, 6])]
    roots = [torch.arange(3), torch.arange(3), torch.tensor([0, 0, 1, 1, 2, 2])]
    weights = [weight.requires_grad_() for weight in (made, factor, read)]
    return weights, ([0, 0, 1], slices, roots, 3)


def parts(weights):
    """What each channel goes through, by hand, as one vector per channel."""
    made, factor, read = weights
    places = ([0, 1], [2, 3], [5, 6])
    return [torch.cat([made[k].flatten(), factor[k : k + 1], read[:, places[k]].flatten()]) for k in range(3)]


def test_a_channel_s_norm_is_that_of_all_it_goes_through(coupled):
    weights, places = coupled
    expected = torch.stack([part.square().sum() for part in parts(weights)])
    torch.testing.assert_close(channel_squares(weights, *places), expected)


def test_the_lasso_pulls_at_each_channel_along_its_direction(coupled):
    weights, places = coupled
    squares = channel_squares(weights, *places)
    strength = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    value = group_lasso(squares, strength)
    norms = torch.stack([part.norm() for part in parts(weights)])
    torch.testing.assert_close(value, (strength * norms).sum(), rtol=1e-9, atol=0)
    found = torch.autograd.grad(value, weights)
    made, factor, read = weights
    pull = (strength / norms).detach()  # d γ‖w‖ = γ w / ‖w‖
    torch.testing.assert_close(found[0], pull.view(3, 1, 1, 1) * made, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], pull * factor, rtol=1e-9, atol=1e-12)
    by_column = torch.zeros(7, dtype=torch.float64)
    for channel, columns in enumerate(([0, 1], [2, 3], [5, 6])):
        by_column[columns] = pull[channel]
    torch.testing.assert_close(found[2], by_column * read, rtol=1e-9, atol=1e-12)
    assert found[2][:, 4].abs().max() == 0, "this column is no channel's"


def test_gradients_are_those_of_finite_differences(coupled):
    weights, places = coupled
    strength = relative_strength(channel_squares(weights, *places))
    going = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda *some: group_lasso(channel_squares(some, *places), strength), weights)
    assert torch.autograd.gradcheck(lambda *some: growing_decay(channel_squares(some, *places), going), weights)


def test_a_channel_of_zeros_has_no_gradient():
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    squares = channel_squares([weight], [0], [torch.arange(3)], [torch.arange(3)], 3)
    (found,) = torch.autograd.grad(group_lasso(squares, relative_strength(squares)), [weight])
    assert found.abs().max() == 0


def test_the_weakest_channel_is_drawn_the_strongest():
    squares = torch.tensor([4.0, 1.0, 2.5], requires_grad=True)
    found = relative_strength(squares)
    torch.testing.assert_close(found, torch.tensor([1.0, 16.0, 4.0]))
    assert not found.requires_grad
    assert relative_strength(torch.full((3,), 2.0)).tolist() == [1, 1, 1]
    assert relative_strength(squares, alpha=0.0).tolist() == [1, 1, 1]


def test_growing_decay_is_a_weight_decay_on_what_goes(coupled):
    weights, places = coupled
    going = torch.tensor([False, True, False])
    found = torch.autograd.grad(growing_decay(channel_squares(weights, *places), going), weights)
    torch.testing.assert_close(found[0][1], weights[0][1].detach())
    assert found[0][[0, 2]].abs().max() == 0
    torch.testing.assert_close(found[2][:, 2:4], weights[2][:, 2:4].detach())


# On a model


@pytest.fixture
def model(tiny):
    return create(Arch(tiny.factory), seed=0)


@pytest.fixture
def groups(model, tiny_data):
    found = ChannelGraph(copy_on_cpu(model), tiny_data.example()).groups()
    return [group for group in found if group.name in ("conv1", "conv3")]


def penalty_of(model, groups, kind, weight=1.0):
    return SparsityPenalty(model, groups, SparsityConfig(kind=kind, weight=weight), {"conv1": [0, 3], "conv3": []})


def test_the_penalty_of_a_model_is_that_of_its_groups(model, groups):
    through = [
        torch.cat([model.conv1.weight[k].flatten(), model.bn1.weight[k, None], model.bn1.bias[k, None]])
        for k in range(16)
    ]
    squares = torch.stack([part.square().sum() for part in through]) + model.conv2.weight.square().sum((0, 2, 3))
    chosen = penalty_of(model, [group for group in groups if group.name == "conv1"], "group_growing", weight=0.5)
    torch.testing.assert_close(chosen(model, 1.0), 0.25 * (squares[0] + squares[3]))
    torch.testing.assert_close(chosen(model, 0.5), 0.125 * (squares[0] + squares[3]))
    assert chosen(model, 0.0) == 0
    assert chosen.share(model) == pytest.approx(((squares[0] + squares[3]) / squares.sum()).item(), rel=1e-5)
    lasso = penalty_of(model, [group for group in groups if group.name == "conv1"], "group_lasso", weight=2.0)
    expected = 2.0 * (relative_strength(squares) * squares.sqrt()).sum()
    torch.testing.assert_close(lasso(model, 0.3), expected.detach(), rtol=1e-4, atol=0)


def test_an_objective_adds_its_penalty_to_the_loss_of_the_model(model, tiny_data):
    batch = next(iter(tiny_data.train.batches(8)))
    plain = Objective(model, LABELS, None).eval()
    seen = []

    def penalty(which, position):
        seen.append((which, position))
        return which.conv1.weight.square().sum()

    found = Objective(model, LABELS, None, penalty=penalty).eval()
    expected = plain(batch, 0.25) + model.conv1.weight.square().sum()
    torch.testing.assert_close(found(batch, 0.25), expected)
    assert seen == [(model, 0.25)]
    assert set(found.state_dict()) == set(plain.state_dict())


def test_a_training_with_a_penalty_keeps_its_end(tiny, tiny_data, tmp_path):
    data = mislabelled(tiny_data.for_decisions())
    train = Trainer(tmp_path, data)
    ends, first = create(Arch(tiny.factory), seed=0), create(Arch(tiny.factory), seed=0)
    nothing = Objective(ends, LABELS, None, penalty=lambda model, position: model.conv1.weight.sum() * 0)
    rows = train(ends, objective=nothing, epochs=2)
    train(first, epochs=2)
    assert best_epoch(rows) == 1
    assert not same(bits(ends), bits(first)), "without one the best epoch is kept"
