"""Which channels go: criteria on whole models, rankings, and targets met closely."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.errors import StageError
from compress.methods.groups import ChannelGraph, ChannelGroup, copy_on_cpu
from compress.models.cost import macs
from compress.pruning.scores import scores_of
from compress.pruning.selection import Limits, Selection
from compress.stages.base import Context

pytestmark = pytest.mark.usefixtures("one_thread")

CRITERIA = ["l1", "l2", "fpgm", "lamp", "bn_scale", "taylor", "hessian", "activation", "random"]


@pytest.fixture
def model(workshop, trained):
    return workshop.build(trained)


@pytest.fixture
def batches(tiny_data):
    return lambda: tiny_data.train.take(range(48)).batches(16)


@pytest.fixture
def groups(model, tiny_data):
    """The group of conv1 (read by conv2) and that of conv3 (a mean, then a linear layer)."""
    found = {group.name: group for group in ChannelGraph(copy_on_cpu(model), tiny_data.example()).groups()}
    return [found["conv1"], found["conv3"]]


def scored(model, groups, criterion, batches, reduction="sum"):
    return scores_of(model, groups, criterion, reduction, batches, seed=0)


# Criteria, by hand


def test_norms_are_those_of_what_makes_a_channel_and_what_reads_it(model, groups, batches):
    made, read = model.conv1.weight.double(), model.conv2.weight.double()
    found = {name: scored(model, groups, name, batches)["conv1"] for name in ("l1", "l2")}
    torch.testing.assert_close(found["l1"], made.abs().sum((1, 2, 3)) + read.abs().sum((0, 2, 3)), rtol=1e-5, atol=0)
    by_hand = made.square().sum((1, 2, 3)).sqrt() + read.square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(found["l2"], by_hand, rtol=1e-6, atol=0)
    largest = torch.maximum(made.square().sum((1, 2, 3)).sqrt(), read.square().sum((0, 2, 3)).sqrt())
    torch.testing.assert_close(scored(model, groups, "l2", batches, "max")["conv1"], largest, rtol=1e-6, atol=0)


def test_filters_are_compared_with_filters(model, groups, batches):
    filters = model.conv1.weight.double().flatten(1)
    distances = torch.stack([(filters - one).norm(dim=1).sum() for one in filters])
    torch.testing.assert_close(scored(model, groups, "fpgm", batches)["conv1"], distances, rtol=1e-6, atol=1e-9)


def test_the_factor_of_the_norm_behind_a_layer(model, groups, batches):
    found = scored(model, groups, "bn_scale", batches)
    torch.testing.assert_close(found["conv1"], model.bn1.weight.double().abs())
    assert "conv3" not in found, "no norm follows it"


def test_activations_are_those_that_the_next_layer_reads(model, groups, batches):
    inputs = torch.cat([batch.inputs[0] for batch in batches()])
    with torch.no_grad():
        first = model.bn1(model.conv1(inputs)).relu()
        last = model.conv3(model.bn2(model.conv2(first)).relu()).relu().mean((2, 3))
    found = scored(model, groups, "activation", batches)
    torch.testing.assert_close(found["conv1"], first.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["conv3"], last.double().mean(0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_gradients_are_those_of_the_loss_in_evaluation_mode(criterion, model, groups, batches):
    weights = [model.conv1.weight, model.conv2.weight]
    total = torch.zeros(16, dtype=torch.float64)
    squares = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for batch in batches():
        gradients = torch.autograd.grad(F.cross_entropy(model(*batch.inputs), batch.labels), weights)
        for weight, gradient, square, others in zip(weights, gradients, squares, ((1, 2, 3), (0, 2, 3)), strict=True):
            total += (weight * gradient).double().sum(others).square() / 3
            square += gradient.double().square() / 3
    if criterion == "hessian":
        made, read = (square * weight.double().square() / 2 for square, weight in zip(squares, weights, strict=True))
        total = made.sum((1, 2, 3)) + read.sum((0, 2, 3))
    torch.testing.assert_close(scored(model, groups, criterion, batches)["conv1"], total.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_leaves_the_model_as_it_was(criterion, model, groups, batches):
    model.train()
    model.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scored(model, groups, criterion, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.bn1.training
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["conv1.weight"]
    assert all(each.grad is None for each in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_random_scores_differ_from_group_to_group(model, groups, batches):
    alike = [groups[1], ChannelGroup("another", groups[1].channels, (), (), ())]
    found = scored(model, alike, "random", batches)
    assert not torch.equal(found["conv3"], found["another"])
    assert torch.equal(found["conv3"], scored(model, alike, "random", batches)["conv3"])


# The stage


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_and_ranking_meets_the_target(criterion, ranking, workshop, trained):
    settings = {"criterion": criterion, "ranking": ranking, "target": {"macs": 0.6}, "multiple": 1, "floor": 0.05}
    if criterion in ("taylor", "hessian", "activation"):
        settings["samples"] = 32
    result = workshop.run(trained, "prune", recovery=None, **settings)
    whole, pruned = (macs(workshop.build(one), workshop.dataset.example()) for one in (trained, result))
    assert 0.6 * 0.94 < pruned / whole <= 0.6
    if (criterion, ranking) != ("l1", "local"):
        assert any(f"channels chosen by '{criterion}'" in note for note in result.history[-1].notes)


def test_groups_that_cannot_be_scored_are_left_alone_aloud(workshop, trained):
    result = workshop.run(trained, "prune", criterion="bn_scale", target={"ratio": 0.5}, recovery=None)
    assert [text for text in result.history[-1].warnings if "'conv3'" in text and "scored by 'bn_scale'" in text]
    assert workshop.build(result).conv3.weight.shape[0] == 32


def test_a_random_choice_follows_the_seed(workshop, trained):
    first, again, other = (
        workshop.run(trained, "prune", seed=seed, criterion="random", target={"ratio": 0.5}, recovery=None).digest
        for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"normalize": "max"}, "normalize: with ranking 'local' scores of groups are never compared"),
        ({"samples": 9}, "samples: 'l1' looks at no samples"),
        ({"criterion": "random", "reduction": "max"}, "reduction: 'random' has one score per channel"),
    ],
)
def test_settings_that_nobody_reads_are_refused(settings, told, workshop, trained):
    with pytest.raises(ValueError, match=told):
        workshop.draft(trained, "prune", **settings)


# Batch norms


def test_new_statistics_are_told_and_kept_where_they_help(workshop, trained):
    settings = {"target": {"macs": 0.4}, "recovery": None}
    plain = workshop.run(trained, "prune", batchnorm_samples=0, **settings)
    mended = workshop.run(trained, "prune", batchnorm_samples=96, **settings)
    (told,) = [note for note in mended.history[-1].notes if "straight after surgery" in note]
    assert "96 training samples" in told
    assert not any("straight after surgery" in note for note in plain.history[-1].notes)
    one, other = workshop.build(plain), workshop.build(mended)
    assert torch.equal(one.conv1.weight, other.conv1.weight)
    assert torch.equal(one.bn2.running_mean, other.bn2.running_mean) == told.endswith("the old ones are kept")


def test_new_statistics_are_the_means_over_batches(tiny_data, model):
    from compress.training.batchnorm import reestimate

    batches = list(tiny_data.train.take(range(64)).batches(32))
    means = torch.stack([model.conv1(batch.inputs[0]).mean((0, 2, 3)) for batch in batches]).mean(0)
    momentum = model.bn1.momentum
    assert reestimate(model, batches)
    torch.testing.assert_close(model.bn1.running_mean, means.detach(), rtol=1e-4, atol=1e-6)
    assert model.bn1.momentum == momentum
    assert not model.training
    assert not reestimate(nn.Sequential(nn.Linear(2, 2)), [])


# Selection


def group(name, channels, blocks=1):
    return ChannelGroup(name, channels, (), (), (), blocks)


def test_a_global_ranking_takes_the_lowest_of_all():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    groups = [group("a", 4), group("b", 4)]
    kinds = {"a": 0, "b": 0}
    unlike = Selection(groups, scores, Limits(1, 0.0), "global", "none", kinds)
    assert unlike.removed(unlike.at(0.5)) == {"a": [0, 1, 2], "b": []}  # one always stays
    alike = Selection(groups, scores, Limits(1, 0.0), "global", "mean", kinds)
    assert alike.removed(alike.at(0.5)) == {"a": [0, 1], "b": [0, 1]}
    apart = Selection(groups, scores, Limits(1, 0.0), "isomorphic", "none", {"a": 0, "b": 1})
    assert apart.removed(apart.at(0.5)) == {"a": [0, 1], "b": [0, 1]}


def test_blocks_lose_equally_many():
    scores = {"heads": torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 8.0])}
    chosen = Selection([group("heads", 8, blocks=2)], scores, Limits(1, 0.0), "local", "none", {"heads": 0})
    assert chosen.removed(chosen.at(0.5)) == {"heads": [0, 1, 4, 5]} or chosen.removed(chosen.at(0.5)) == {
        "heads": [0, 1, 4, 7]
    }


def test_the_last_step_is_taken_group_by_group():
    names = [f"g{number}" for number in range(10)]
    groups = [group(name, 8) for name in names]
    scores = {name: torch.arange(8.0) + number for number, name in enumerate(names)}
    chosen = Selection(groups, scores, Limits(4, 0.0), "local", "none", dict.fromkeys(names, 0))

    def remains(kept):
        return sum(kept.values()) / 80

    kept = chosen.meeting(0.75, remains)
    assert remains(kept) == 0.75
    assert [kept[name] for name in names].count(4) == 5
    assert kept["g0"] == 4, "the one that loses the smallest share of its scores goes first"
    assert chosen.meeting(0.4, remains) is None
    assert chosen.meeting(1.0, remains) == dict.fromkeys(names, 8)


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
def test_no_group_to_score_is_no_error(ranking, workshop, trained):
    settings = {"protect": ["*"], "ranking": ranking, "recovery": None}
    draft, context = workshop.draft(trained, "prune", target={"ratio": 0.5}, **settings)
    assert isinstance(context, Context)
    assert any("nothing was pruned" in text for text in context.warnings)
    assert draft.edits == trained.edits
    with pytest.raises(StageError, match="cannot be reached"):
        workshop.draft(trained, "prune", target={"macs": 0.5}, **settings)
