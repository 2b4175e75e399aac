"""Groups of channels in real architectures: pruning them is silencing them, and broken ones are found by trial."""

import collections
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CLASSES,
    NETWORKS,
    Residual,
    Tied,
    cut_by_torch_pruning,
    difference,
    edits_for,
    groups_of,
    network,
    silenced,
)
from torch import nn
from torchvision import models

from compress import surgery
from compress.edits import Attribute
from compress.methods import attention
from compress.methods.groups import ChannelGraph, copy_on_cpu, l1_scores
from compress.methods.importance import lowest
from compress.methods.silence import Seen, randomise, seen, silence, what_differs
from compress.methods.trial import find_broken
from compress.models.cost import macs, output_positions, parameters
from compress.pruning.selection import Size

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIER = {"cifar_resnet20": "linear", "resnet18": "fc", "mobilenet_v2": "classifier.1", "residual": "head"}
CLASSIFIER |= {"vgg11_bn": "5", "in_groups": "head"}


def some_channels(groups, name):
    """About a third of the channels of every group that can lose some, a different pattern in each."""
    return {
        group.name: [c for c in range(group.channels) if (c * 7 + place) % 3 == 0][: group.channels - 1]
        for place, group in enumerate(groups.values())
        if group.name != CLASSIFIER[name]
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_group_equals_the_original_with_its_channels_set_to_zero(name):
    model, example = network(name)
    groups = groups_of(model, example)
    removed = some_channels(groups, name)
    assert removed
    edits = edits_for(model, example, removed)
    original = silenced(model, groups, removed).double()
    pruned = surgery.apply_all(copy.deepcopy(model).double(), edits)
    inputs = torch.randn(3, *example.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = original(inputs)
        torch.testing.assert_close(pruned(inputs), expected, rtol=1e-9, atol=1e-9)
        assert (model.double()(inputs) - expected).abs().max() > 1e-3  # the channels mattered
    assert sum(map(torch.numel, pruned.parameters())) < 0.8 * sum(map(torch.numel, model.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_edits_reproduce_exactly_what_torch_pruning_makes(name):
    model, example = network(name)
    removed = some_channels(groups_of(model, example), name)
    cut = cut_by_torch_pruning(model, example, removed)
    replayed = surgery.apply_all(model, edits_for(model, example, removed))
    expected = cut.state_dict()
    assert replayed.state_dict().keys() == expected.keys()
    for key, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    shown = {path: module.extra_repr() for path, module in cut.named_modules() if not isinstance(module, nn.Sequential)}
    assert {path: replayed.get_submodule(path).extra_repr() for path in shown} == shown
    with torch.no_grad():
        assert torch.equal(replayed(example), cut(example))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_named_by_a_producer_and_every_output_is_in_one(name):
    model, example = network(name)
    groups = groups_of(model, example)
    weights = {f"{n}.weight": len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    made = collections.Counter()
    for group in groups.values():
        assert group.name in group.producers
        assert len(group.members) == group.channels
        for item in group.coupled:
            assert set(item.roots) == set(range(group.channels))
            assert len(item.roots) == len(item.slices)
            assert max(item.slices) < model.get_parameter(item.tensor).shape[item.axis]
            if item.tensor in weights and not item.reads:
                made.update((item.tensor, s) for s in item.slices)
        assert group.is_read != (group.name == CLASSIFIER[name])
    assert made == {(tensor, s): 1 for tensor, outputs in weights.items() for s in range(outputs)}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_remains_is_counted_as_it_will_be(name):
    model, example = network(name)
    groups = groups_of(model, example)
    removed = some_channels(groups, name)
    size = Size(model, output_positions(model, (example,)), parameters(model), macs(model, (example,)))
    cut = surgery.apply_all(copy.deepcopy(model), edits_for(model, example, removed))
    known = [group for group in groups.values() if group.name in removed]
    assert size.remains(known, removed, "macs") == pytest.approx(macs(cut, (example,)) / macs(model, (example,)))
    assert size.remains(known, removed, "parameters") == pytest.approx(parameters(cut) / parameters(model))


def test_scores_add_up_all_weights_of_a_channel_through_a_flattened_map():
    model, example = network("vgg11_bn")
    group = groups_of(model, example)["0.25"]  # 512 channels on 1 x 2 positions before the linear layer
    conv, linear = model[0][25].weight.detach().double(), model[3].weight.detach().double()
    expected = conv.abs().sum((1, 2, 3)) + linear.abs().reshape(20, 512, 2).sum((0, 2))
    torch.testing.assert_close(l1_scores(model, group), expected, rtol=1e-5, atol=0)


def test_scores_of_transposed_and_depthwise_convolutions_follow_their_axes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    groups = groups_of(model, torch.randn(2, 3, 9, 11))
    weights = [layer.weight.detach().double().abs() for layer in model if hasattr(layer, "weight")]
    first = weights[0].sum((1, 2, 3)) + weights[1].sum((1, 2, 3)) + weights[2].sum((1, 2, 3))
    outer = next(group for group in groups.values() if "0" in group.producers)
    assert set(outer.producers) == {"0", "1"}
    torch.testing.assert_close(l1_scores(model, outer), first, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        l1_scores(model, groups["2"]), weights[2].sum((0, 2, 3)) + weights[3].sum(0), rtol=1e-5, atol=0
    )


def test_pruning_twice_composes():
    model, example = network("resnet18")
    names = ["layer1.0.conv1", "layer3.1.conv1", "conv1"]
    first = edits_for(model, example, {key: [0, 1, 5, 63] for key in names})
    once = surgery.apply_all(copy.deepcopy(model), first)
    second = edits_for(once, example, {key: [2, 4] for key in names})
    twice = surgery.apply_all(copy.deepcopy(once), second)
    # Of 0, 1, 2, … without 0, 1, 5 and 63, the third and the fifth are 4 and 7.
    together = edits_for(model, example, {key: [0, 1, 4, 5, 7, 63] for key in names})
    direct = surgery.apply_all(copy.deepcopy(model), together)
    for key, tensor in direct.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[key]), key
    replayed = surgery.apply_all(model, [*first, *second])
    with torch.no_grad():
        assert torch.equal(replayed(example), twice(example))


class Shuffled(nn.Module):
    """Two halves of the channels interleaved, as in ShuffleNet: shapes that fit say nothing about the order."""

    def __init__(self, halves=2):
        super().__init__()
        self.halves = halves
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        n, _, height, width = x.shape
        x = x.reshape(n, self.halves, -1, height, width).transpose(1, 2).reshape(n, -1, height, width)
        return self.head(self.last(x).relu().mean((2, 3)))


class Gated(nn.Module):
    """A gate that does not close at zero, a layer norm over the channels, and a mean over them where asked for."""

    def __init__(self, mixes=False):
        super().__init__()
        self.mixes = mixes
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.gate = nn.Conv2d(12, 12, 1)
        self.norm = nn.LayerNorm(12)
        self.groupnorm = nn.GroupNorm(1, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.groupnorm(x * self.gate(x).sigmoid())
        if self.mixes:
            x = x * x.mean(1, keepdim=True)
        return self.head(self.norm(x.mean((2, 3))))


EXAMPLE = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("gone", [[0, 1], [1, 4, 6, 11], list(range(6))])
def test_a_shuffle_that_keeps_its_shapes_is_found_to_compute_something_else(gone):
    straight, shuffled = randomise(Shuffled(halves=1)), randomise(Shuffled())
    assert difference(straight, EXAMPLE, {"stem": gone}) is None
    assert (
        difference(shuffled, EXAMPLE, {"stem": gone})
        == "without them it computes something else than with them silenced"
    )


def test_gates_and_norms_over_the_channels_are_no_mistake_but_a_mean_over_them_is():
    (group,) = (group for group in groups_of(Gated(), EXAMPLE).values() if group.is_read)
    assert set(group.producers) == {"stem", "gate"}
    removed = {group.name: [2, 3, 7]}
    assert difference(randomise(Gated()), EXAMPLE, removed) is None
    assert difference(randomise(Gated(mixes=True)), EXAMPLE, removed) is not None


STREAMS = {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}


@pytest.mark.parametrize(
    ("gone", "widths", "pads"),
    [
        ({"conv1": [0]}, (15, 31, 63), ((8, 8), (16, 16))),
        ({"conv1": [0, 3, 15]}, (13, 29, 61), ((8, 8), (16, 16))),
        ({"layer2.0.conv2": [0, 7]}, (16, 30, 62), ((6, 8), (16, 16))),
        ({"layer2.0.conv2": [8]}, (16, 31, 63), ((8, 7), (16, 16))),
        ({"layer3.0.conv2": [2, 15, 16, 17, 31]}, (16, 32, 59), ((8, 8), (14, 13))),
        ({"conv1": list(range(15)), "layer2.0.conv2": list(range(16))}, (1, 1, 33), ((0, 0), (16, 16))),
        ({"conv1": [5, 9], "layer2.0.conv2": [1, 9, 15], "layer3.0.conv2": [0, 30]}, (14, 27, 57), ((7, 6), (15, 15))),
    ],
)
def test_streams_with_padded_shortcuts_lose_channels_wherever_they_go(gone, widths, pads):
    model, example = network("cifar_resnet20")
    groups = groups_of(model, example)
    assert {name: groups[name].channels for name in STREAMS} == STREAMS
    assert difference(model, example, gone) is None
    cut = surgery.apply_all(model, edits_for(model, example, gone))
    assert tuple(stage[0].conv2.out_channels for stage in (cut.layer1, cut.layer2, cut.layer3)) == widths
    assert (cut.layer2[0].shortcut.pad, cut.layer3[0].shortcut.pad) == pads


def test_pruning_a_padded_stream_twice_composes():
    model, example = network("cifar_resnet20")
    first = edits_for(model, example, {"conv1": [0, 4], "layer2.0.conv2": [0, 15], "layer3.0.conv2": [3]})
    once = surgery.apply_all(copy.deepcopy(model), first)
    assert [groups_of(once, example)[name].channels for name in STREAMS] == [14, 14, 31]
    gone = {"conv1": [1], "layer2.0.conv2": [0], "layer3.0.conv2": [30]}
    assert difference(randomise(copy.deepcopy(once)), example, gone) is None
    second = edits_for(once, example, gone)
    # Of 0, 1, 2, … without 0 and 4, the second is 2; of those without 0 and 15 the first is 1.
    together = {"conv1": [0, 2, 4], "layer2.0.conv2": [0, 1, 15], "layer3.0.conv2": [3, 31]}
    direct = surgery.apply_all(copy.deepcopy(model), edits_for(model, example, together))
    replayed = surgery.apply_all(model, [*first, *second])
    with torch.no_grad():
        assert torch.equal(replayed(example), direct(example))


def test_no_layer_of_a_padded_stream_may_lose_all():
    model, example = network("cifar_resnet20")
    with pytest.raises(RuntimeError, match="nothing would be left of a layer in the group of 'layer3"):
        edits_for(model, example, {"conv1": list(range(16))})


def test_a_convolution_in_groups_loses_whole_groups():
    model, example = network("in_groups")
    groups = groups_of(model, example)
    (stream,) = (group for group in groups.values() if "grouped" in group.producers)
    assert stream.channels == 6
    assert stream.members == tuple(tuple(range(4 * k, 4 * k + 4)) for k in range(6))
    assert set(stream.producers) == {"stem", "grouped", "excite"}
    assert difference(model, example, {stream.name: [1, 4]}) is None
    cut = surgery.apply_all(copy.deepcopy(model), edits_for(model, example, {stream.name: [1, 4]}))
    assert (cut.grouped.groups, cut.grouped.in_channels, cut.grouped.out_channels) == (4, 16, 16)
    assert torch.equal(cut.grouped.weight, model.grouped.weight[[*range(4), *range(8, 16), *range(20, 24)]])
    last = surgery.apply_all(model, edits_for(model, example, {stream.name: [0, 1, 2, 4, 5]}))
    assert (last.grouped.groups, last.grouped.in_channels) == (1, 4)


def test_parts_of_groups_are_refused():
    model, example = network("in_groups")
    with pytest.raises(RuntimeError, match="in groups of 4 channels can only lose whole groups"):
        ChannelGraph(copy_on_cpu(model), (example,)).remove({"stem": [0, 1]})


def test_channels_that_are_the_outputs_change_them():
    model, example = network("residual")
    assert (
        difference(model, example, {"head": [0, 1]})
        == f"the outputs become (2, {CLASSES - 2}) instead of (2, {CLASSES})"
    )


def test_heads_of_attention_lose_equally_many_channels_and_compute_the_same():
    model = randomise(models.VisionTransformer(8, 4, 2, 3, 12, 18, num_classes=CLASSES))
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    (stream,) = (group for group in groups_of(model, example).values() if group.blocks > 1)
    assert (stream.channels, stream.blocks) == (12, 3)
    removed = {stream.name: lowest(l1_scores(model, stream), 6, stream.blocks)}
    edits = (*edits_for(model, example, removed), Attribute(module="", name="hidden_dim", value=6))
    widths = attention.head_widths(model)
    cut = surgery.apply_all(copy.deepcopy(model), edits)
    quiet = silence(copy.deepcopy(model), [stream], removed)
    assert what_differs(quiet, cut, model, (example,)) is not None  # each softmax got sharper
    attention.keep_scale(cut, widths)
    assert what_differs(quiet, cut, model, (example,)) is None
    across = {stream.name: [0, 1, 2, 3, 4, 8]}  # as many, but heads begin elsewhere then
    edits = (*edits_for(model, example, across), Attribute(module="", name="hidden_dim", value=6))
    cut = surgery.apply_all(copy.deepcopy(model), edits)
    attention.keep_scale(cut, widths)
    assert what_differs(silence(copy.deepcopy(model), [stream], across), cut, model, (example,)) is not None


class Fused(nn.Module):
    """Attention whose queries, keys and values come from one layer, head by head where `mixed`."""

    def __init__(self, dim=24, heads=4, mixed=False):
        super().__init__()
        self.num_heads, self.attn_dim, self.depth, self.mixed = heads, dim, dim, mixed
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        n, length, _ = x.shape
        order = (self.num_heads, 3) if self.mixed else (3, self.num_heads)
        x = self.qkv(x).reshape(n, length, *order, -1).permute(3 if self.mixed else 2, 0, 2 if self.mixed else 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(*x.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(n, length, self.attn_dim))


class Tokens(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 3, stride=3)
        self.norm = nn.LayerNorm(24)
        self.attn = Fused(**settings)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attn(self.norm(x))).mean(1))


def test_attention_with_one_layer_for_queries_keys_and_values_loses_whole_heads():
    model = randomise(Tokens())
    heads = groups_of(model, EXAMPLE)["attn.qkv"]
    assert (heads.channels, heads.producers) == (4, ("attn.qkv",))
    norms = l1_scores(model, heads)
    rows, columns = model.attn.qkv.weight.double().abs(), model.attn.proj.weight.double().abs()
    torch.testing.assert_close(
        norms[1], rows.reshape(3, 4, 6, 24)[:, 1].sum() + columns[:, 6:12].sum(), rtol=1e-5, atol=0, check_dtype=False
    )
    for gone in ([0], [1, 3], [0, 1, 2]):
        assert difference(model, EXAMPLE, {"attn.qkv": gone}) is None
    cut = surgery.apply_all(copy.deepcopy(model), edits_for(model, EXAMPLE, {"attn.qkv": [1, 3]}))
    assert (cut.attn.num_heads, cut.attn.attn_dim, cut.attn.qkv.out_features, cut.attn.proj.in_features) == (
        2,
        12,
        36,
        12,
    )
    assert cut.patches.out_channels == 24
    with pytest.raises(RuntimeError, match="no head would be left"):
        edits_for(model, EXAMPLE, {"attn.qkv": [0, 1, 2, 3]})


def test_heads_that_lie_otherwise_in_the_layer_are_found_broken():
    reason = difference(randomise(Tokens(mixed=True)), EXAMPLE, {"attn.qkv": [1]})
    assert reason == "without them it computes something else than with them silenced"


def test_samples_are_looked_at_until_most_channels_have_made_a_difference():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    nn.init.ones_(model[0].weight)
    nn.init.constant_(model[0].bias, -1)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.cat([torch.zeros(1, 4), torch.ones(2, 4)])
    known = [group for group in groups_of(model, inputs).values() if group.is_read]
    assert [group.name for group in known] == ["0"]
    assert seen(model, known, (inputs,)) == Seen(dark=(), samples=2)
    assert seen(model, known, (inputs[1:],)) == Seen(dark=(), samples=1)
    assert seen(model, known, (torch.zeros(3, 4),)) == Seen(dark=("0",), samples=3)
    with torch.no_grad():
        model[0].bias[:3] = -9  # three of eight never: more samples might bring them
    assert seen(model, known, (inputs,)) == Seen(dark=(), samples=3)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    silenced = silence(model, known, {"0": [1, 2]})
    assert silenced[0].weight is model[0].weight
    assert not silenced[2].weight[:, 1:3].any()
    assert torch.equal(model[2].weight, before["2.weight"])


def test_copies_for_cutting_are_independent_single_precision_in_evaluation():
    model = Residual().double().train()
    copied = copy_on_cpu(model)
    assert not copied.training
    assert {tensor.dtype for tensor in copied.parameters()} == {torch.float32}
    assert model.training
    assert model.stem.weight.dtype == torch.float64


def test_a_model_with_tied_weights_and_a_hidden_buffer_is_pruned_where_it_can_be():
    torch.manual_seed(0)
    model, example = randomise(Tied()), torch.randn(2, 3, 5, 7)
    edits = edits_for(model, example, {"stem": [1, 4]})
    cut = cut_by_torch_pruning(model, example, {"stem": [1, 4]})
    replayed = surgery.apply_all(model, edits)
    with torch.no_grad():
        assert torch.equal(replayed(example), cut(example))


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1))))))
def test_exactly_the_broken_items_are_found_in_order_and_in_few_trials(case):
    n, broken = case
    broken = {item for item in broken if item < n}
    trials = []

    def why_not(tried):
        trials.append(tuple(tried))
        bad = sorted(broken.intersection(tried))
        return f"{bad[0]} is broken" if bad else None

    assert find_broken(range(n), why_not) == [(item, f"{item} is broken") for item in sorted(broken)]
    assert len(trials) <= 2 + 2 * len(broken) * max(1, n).bit_length()


def test_items_that_fail_only_together_are_left_out_one_by_one():
    def why_not(tried):
        return "three is a crowd" if len(set(tried) & {1, 3, 5}) > 2 else None

    assert find_broken(range(8), why_not) == [(5, "three is a crowd")]
