"""Computing in float64 from float32 weights, and proofs that leave the model as it is."""

import copy

import pytest
import torch
from networks import Residual, groups_of, network, randomise
from torch import nn
from torchvision.models import VisionTransformer

from compress import surgery
from compress.methods.double import in_double
from compress.methods.groups import ChannelGraph, aliasing_copy, outputs_of
from compress.methods.silence import Whole, outputs_for, random_copy, silence, what_differs
from compress.pruning.surgeon import Surgeon, cut

EXAMPLE = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Weights that are read in all ways: by layers, by the forward pass itself, out of a list, by a recurrent layer."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.bare = nn.Parameter(torch.zeros(width))
        self.listed = nn.ParameterList([nn.Parameter(torch.zeros(width, width))])
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.recurrent = nn.LSTM(width, width, batch_first=True)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().flatten(2).mT + self.bare
        x = x @ self.listed[0]
        return self.recurrent(x + self.attention(x, x, x, need_weights=False)[0])[0]


class Peeks(Residual):
    """Reads the weight of a layer without calling it."""

    def forward(self, x):
        return nn.functional.linear(self.stem(x).relu().mean((2, 3)), self.head.weight)


class Twins(nn.Module):
    """Two layers of attention that share what makes queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.one, self.other = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.other.in_proj_weight, self.other.in_proj_bias = self.one.in_proj_weight, self.one.in_proj_bias
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.one, self.other):
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class Saturated(nn.Module):
    """A layer behind a gate that is almost open: bfloat16 cannot tell it from one that is."""

    def __init__(self, gate, offset):
        super().__init__()
        self.first, self.gated, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.gate, self.offset = gate, offset

    def forward(self, x):
        return self.head(self.gate(self.gated(self.first(x).relu()).abs() + self.offset))


class Keeps(nn.Module):
    """Keeps a table in the type of its inputs, for each size of a batch, and computes in float32 at its end."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.table = None

    def forward(self, x):
        if self.table is None or len(self.table) != len(x):
            self.table = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
        return self.head(self.second(self.first(x).relu() * self.table).mean((2, 3)).float())


class Stubborn(nn.Module):
    """Makes float32 tensors of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 5)

    def forward(self, x):
        return self.layer(x.float())


def state_of(model):
    """Every tensor of a model: which object it is, and a copy of its values."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tensor, tensor.detach().clone()) for name, tensor in tensors}


def assert_untouched(model, before):
    now = state_of(model)
    assert now.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert now[name][0] is tensor
        assert torch.equal(now[name][1], values)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [Reads, Residual, lambda: VisionTransformer(8, 4, 2, 3, 12, 18, num_classes=5)])
def test_it_computes_what_a_copy_in_double_computes(make):
    model = randomise(make())
    before = state_of(model)
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    (want,) = outputs_for(copy.deepcopy(model).double(), (example,))
    with in_double(model):
        (have,) = outputs_for(model, (example,))
    assert have.dtype == torch.float64
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-13)  # matrix products round by the address of a weight
    assert_untouched(model, before)


def test_a_forward_pass_that_raises_leaves_the_model_as_it_was():
    model = randomise(Reads())
    before = state_of(model)
    model.recurrent.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), in_double(model):
        model(EXAMPLE.double())
    model.recurrent._forward_pre_hooks.clear()
    assert_untouched(model, before)


def test_slices_are_read_as_zeros():
    model, example = network("residual")
    groups = groups_of(model, example)
    (name,) = (name for name, group in groups.items() if group.is_read)
    removed = {name: [0, 5]}
    before = state_of(model)
    whole = Whole(model, (example,))
    quiet = silence(copy.deepcopy(model), groups.values(), removed)
    assert whole.missed_by(quiet, whole.silenced(list(groups.values()), removed)) is None
    cut = surgery.apply_all(copy.deepcopy(model), derived(model, example, removed))
    expected = whole.silenced(list(groups.values()), removed)
    assert whole.missed_by(cut, expected) is None
    assert "something else" in whole.missed_by(copy.deepcopy(model), expected)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("make", "example", "dtype"),
    [(Peeks, EXAMPLE, torch.float64), (Stubborn, torch.randn(2, 9), torch.float32)],
)
def test_models_that_read_others_weights_or_make_float32_are_proven_all_the_same(make, example, dtype):
    model = randomise(make())
    before = state_of(model)
    whole = Whole(model, (example,))
    assert {parameter.dtype for parameter in whole.model.parameters()} == {dtype}
    assert whole.missed_by(whole.model, whole.silenced([], {})) is None
    assert_untouched(model, before)


def derived(model, example, removed):
    """Edits as the prune stage finds them: in a copy that shares the model's memory."""
    graph = ChannelGraph(aliasing_copy(model), (example,))
    gone = outputs_of(list(graph.groups()), removed)
    with surgery.PositionsWhenRead(graph.model):
        cut = graph.remove(gone)
    return surgery.derive(model, cut)


@pytest.mark.parametrize("name", ["residual", "in_groups", "cifar_resnet20"])
def test_edits_are_derived_in_the_memory_of_the_model_which_stays_as_it_is(name):
    model, example = network(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = state_of(model)
    groups = [group for group in groups_of(model, example).values() if group.is_read]
    removed = {group.name: [0, group.channels - 1] for group in groups}
    with torch.no_grad():
        throwaway = copy.deepcopy(model)
    graph = ChannelGraph(throwaway, (example,))
    gone = outputs_of(list(graph.groups()), removed)
    surgery.encode_positions(throwaway)
    assert derived(model, example, removed) == surgery.derive(model, graph.remove(gone))
    assert_untouched(model, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_random_copy_is_that_of_a_copy_made_random():
    model = Residual()
    model.middle.weight = nn.Parameter(model.middle.weight.to(memory_format=torch.channels_last))
    before = state_of(model)
    want, have = randomise(copy.deepcopy(model)).state_dict(), random_copy(model).state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)
    assert_untouched(model, before)


def surgeon_of(model, *shape):
    """After a trial in which every group lost two channels."""
    example = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    model.eval()(torch.cat([example, example]))  # as a stage does before it
    told = []
    surgeon = Surgeon(model, (example,), (example,), (), told.append)
    surgeon.try_groups({group.name: [1, 6] if group.channels > 6 else [0] for group in surgeon.groups})
    assert told == []
    return surgeon, example


def test_layers_of_attention_that_share_weights_are_scaled_once():
    torch.manual_seed(0)
    surgeon, example = surgeon_of(Twins(), 3, 5)
    removed = {group.name: [1, 6] for group in surgeon.groups}
    edits = surgeon.edits(removed)
    whole = random_copy(surgeon.model).double()
    after = cut(copy.deepcopy(whole), edits)
    assert after.one.in_proj_weight is after.other.in_proj_weight
    assert len(after.one.in_proj_weight) == 3 * 6
    assert what_differs(silence(whole, surgeon.groups, removed), after, whole, (example.double(),)) is None


@pytest.mark.parametrize(
    ("gate", "offset"), [(torch.sigmoid, 7.0), (torch.sigmoid, 14.0), (torch.tanh, 4.0), (torch.tanh, 12.0)]
)
def test_what_lies_behind_a_gate_that_is_almost_open_is_seen(gate, offset):
    torch.manual_seed(0)
    surgeon, _ = surgeon_of(Saturated(gate, offset), 6)
    assert {group.name for group in surgeon.groups} == {"first", "gated"}


def test_a_forward_pass_that_keeps_tables_is_proven_in_what_it_can_compute_in():
    torch.manual_seed(0)
    surgeon, _ = surgeon_of(Keeps(), 3, 5, 5)
    assert {group.name for group in surgeon.groups} == {"first", "second"}
    assert surgeon.edits({"first": [0, 3], "second": [2]})
