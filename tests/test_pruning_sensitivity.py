"""What each group costs on its own: the right channels silenced, one group at a time, the model left alone."""

import pytest
import torch

from compress.edits import Keep
from compress.measured import PruningSensitivity
from compress.methods.groups import ChannelGraph, ChannelGroup, copy_on_cpu
from compress.methods.importance import lowest
from compress.pruning.scores import scores_of
from compress.pruning.sensitivity import sensitivities, silenced_channels
from compress.surgery import apply_all
from compress.training import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(workshop, trained):
    return workshop.build(trained)


@pytest.fixture
def groups(model, tiny_data):
    return [group for group in ChannelGraph(copy_on_cpu(model), tiny_data.example()).groups() if group.is_read]


@pytest.fixture
def scores(model, groups):
    return scores_of(model, groups, "l1", "sum", lambda: iter(()), seed=0)


def accuracy(data):
    return lambda model: 100 * evaluate(model, data.validation, "cpu")[1] / len(data.validation)


def test_each_group_is_measured_alone_and_the_model_stays(model, groups, scores, tiny_data):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sensitivities(model, groups, scores, (0.25, 0.5, 0.75), accuracy(tiny_data), 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.percent == accuracy(tiny_data)(model)
    assert found.n == 7
    assert [each.name for each in found.groups] == [group.name for group in groups]
    for group, each in zip(groups, found.groups, strict=True):
        assert (each.channels, each.removed) == (group.channels, 0)
        assert [one.ratio for one in each.steps] == [0.25, 0.5, 0.75]
        assert [one.silenced for one in each.steps] == [
            group.channels // 4,
            group.channels // 2,
            3 * group.channels // 4,
        ]
    assert min(one.percent for one in found.groups[0].steps) < found.percent
    assert PruningSensitivity.model_validate_json(found.model_dump_json()) == found


def test_silencing_measures_what_removing_would(model, groups, scores, tiny_data):
    group = next(group for group in groups if group.name == "conv1")
    (measured,) = sensitivities(model, [group], scores, (0.5,), accuracy(tiny_data), 1).groups
    (found,) = measured.steps
    gone = set(lowest(scores["conv1"], 8))
    kept = tuple(channel for channel in range(16) if channel not in gone)
    axes = [("conv1.weight", 0), *((f"bn1.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var"))]
    apply_all(model, [Keep(size=16, kept=kept, axes=(*axes, ("conv2.weight", 1)))])
    model.conv1.out_channels = model.bn1.num_features = model.conv2.in_channels = 8
    assert accuracy(tiny_data)(model) == found.percent


def test_the_lowest_scores_go_first(model, groups, scores):
    group = next(group for group in groups if group.name == "conv1")
    order = {"conv1": torch.arange(16.0)}
    silenced = []

    def evaluate(model):
        reads = model.conv2.weight.detach().abs().sum((0, 2, 3))
        silenced.append((reads == 0).nonzero().flatten().tolist())
        return 1.0

    sensitivities(model, [group], order, (0.25, 0.26, 0.5), evaluate, 1)
    assert silenced == [[], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]  # a quarter of 16 and a bit is still 4


def group_of(channels, blocks=1):
    return ChannelGroup("group", channels, (), (), (), blocks)


@pytest.mark.parametrize(
    ("channels", "blocks", "ratio", "count"),
    [(16, 1, 0.5, 8), (12, 4, 0.5, 8), (12, 4, 0.1, 0), (2, 1, 0.9, 1), (1, 1, 0.9, 0)],
)
def test_blocks_lose_equally_many_and_never_all(channels, blocks, ratio, count):
    scores = torch.arange(float(channels))
    assert len(silenced_channels(group_of(channels, blocks), scores, ratio)) == count


def test_what_cannot_be_silenced_is_refused(model, scores):
    with pytest.raises(ValueError, match="'group' cannot be silenced"):
        sensitivities(model, [group_of(4)], scores, (0.5,), lambda model: 1.0, 1)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_ratios_are_fractions(model, groups, scores, ratio):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        sensitivities(model, groups, scores, (0.5, ratio), lambda model: 1.0, 1)
