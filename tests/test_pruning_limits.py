"""Floors, ceilings and multiples of single layers: always held, and what cannot be met is refused with what can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.config.prune import LayerLimits
from compress.errors import StageError
from compress.methods.groups import ChannelGroup
from compress.pruning.layer_limits import limits_for, warn_of_idle_limits
from compress.pruning.selection import Bounds, Limits, Selection

pytestmark = pytest.mark.usefixtures("one_thread")

fractions = st.floats(0.05, 1.0)


groups = st.lists(
    st.fixed_dictionaries(
        {
            "half": st.integers(1, 20),
            "lost": st.sampled_from([0, 0, 0.3]),
            "blocks": st.sampled_from([1, 1, 1, 2]),
            "own": st.none() | st.tuples(st.sampled_from([1, 2, 3, 4]), fractions, fractions),
        }
    ),
    min_size=1,
    max_size=5,
)
limits = st.tuples(st.sampled_from([1, 2, 4]), fractions, st.sampled_from([1.0, 1.0, 0.5]))
rankings = st.sampled_from(["local", "global", "isomorphic"])


def problem_of(found, common, ranking):
    """A selection from groups with scores, of which some were cut before, and its limits."""
    made, whole, of, scores = [], {}, {}, {}
    for number, one in enumerate(found):
        name, channels = f"g{number}", 2 * one["half"]
        now = channels - 2 * int(one["lost"] * one["half"])
        made.append(ChannelGroup(name, now, (), (), (), one["blocks"]))
        whole[name] = channels
        if one["own"] is not None:
            multiple, *ends = one["own"]
            of[name] = Bounds(multiple, *sorted(ends))
        scores[name] = torch.rand(now, generator=torch.Generator().manual_seed(number))
    multiple, floor, pressure = common
    chosen = Limits(multiple, floor, of, whole, pressure)
    kinds = {group.name: index % 2 for index, group in enumerate(made)}
    return Selection(made, scores, chosen, ranking, "mean", kinds), chosen


def check_held(selection, limits, kept):
    for group in selection.groups:
        stays, bounds = kept[group.name], limits.bounds(group)
        multiple, whole = limits.multiple_of(group), limits.channels(group)
        assert 0 < stays <= group.channels
        least = min(whole, multiple * max(1, -(-(whole * bounds.floor - 1e-6) // multiple)))
        assert stays >= min(group.channels, least)
        if stays < group.channels:
            assert stays % multiple == 0 or stays == least
        room = least <= whole * bounds.ceiling
        if limits.pressure == 1 and room and limits.range(group)[0] <= limits.range(group)[1]:
            assert stays <= whole * bounds.ceiling + 1e-6


@given(groups, limits, rankings, st.floats(0.0, 1.0))
def test_limits_are_held_at_every_ratio(groups, limits, ranking, ratio):
    selection, chosen = problem_of(groups, limits, ranking)
    check_held(selection, chosen, selection.at(ratio))


@given(groups, limits, rankings, st.floats(0.05, 1.0))
def test_a_target_is_met_within_the_limits_or_refused(groups, limits, ranking, target):
    selection, chosen = problem_of(groups, limits, ranking)
    whole = sum(chosen.channels(group) for group in selection.groups)

    def remains(kept):
        return sum(kept.values()) / whole

    kept = selection.meeting(target, remains)
    if kept is None:
        assert remains(selection.at(1.0)) > target
    else:
        assert remains(kept) <= target
        check_held(selection, chosen, kept)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8]), fractions)
def test_a_group_without_a_ceiling_may_stay_whole(channels, multiple, floor):
    group = ChannelGroup("g", channels, (), (), ())
    least, most = Limits(multiple, floor).range(group)
    assert 0 < least <= most == channels


def test_a_fraction_that_is_a_little_more_than_a_multiple_keeps_no_further_one():
    group = ChannelGroup("g", 100, (), (), ())
    assert 0.07 * 100 > 7
    assert Limits(1, 0.07).kept(group, 0.0) == 7
    assert Limits(1, 0.01, {"g": Bounds(1, 0.01, 0.29)}).kept(group, 100.0) == 29


def test_fractions_are_those_of_the_channels_before_the_first_cut():
    group = ChannelGroup("g", 10, (), (), ())
    limits = Limits(1, 0.25, whole={"g": 20})
    assert limits.kept(group, 0.0) == 5
    scores = {"g": torch.arange(10.0)}
    for ranking in ("local", "global"):
        selection = Selection([group], scores, limits, ranking, "none", {"g": 0})
        assert selection.at(0.5) == {"g": 10}, "half of the twenty have gone already"
        assert selection.at(0.6) == {"g": 8}


def test_ceilings_are_reached_step_by_step():
    group = ChannelGroup("g", 40, (), (), ())
    for pressure, most in ((0.0, 40), (0.5, 30), (1.0, 20)):
        assert Limits(1, 0.1, {"g": Bounds(1, 0.1, 0.5)}, pressure=pressure).kept(group, 40.0) == most


def test_a_group_whose_width_is_no_multiple_gets_its_last_channels_back():
    large, odd = ChannelGroup("large", 64, (), (), ()), ChannelGroup("odd", 30, (), (), ())
    scores = {"large": torch.zeros(64), "odd": torch.ones(30)}
    for ceiling, kept in ((1.0, {"large": 32, "odd": 30}), (0.99, {"large": 32, "odd": 28})):
        limits = Limits(4, 0.1, {"large": Bounds(32, 0.5), "odd": Bounds(4, 0.1, ceiling)})
        selection = Selection([large, odd], scores, limits, "local", "none", {"large": 0, "odd": 0})

        def remains(some):
            return (some["large"] + some["odd"]) / 94

        assert selection.meeting(62 / 94, remains) == kept
    assert selection.meeting(61 / 94, remains) == {"large": 32, "odd": 28}


# Patterns


def entries(*found):
    return [LayerLimits.model_validate(one) for one in found]


def test_the_first_entry_that_matches_any_layer_counts():
    first, second = entries({"match": "a.*", "floor": 0.5}, {"match": "*", "floor": 0.2})
    assert limits_for(["a.conv"], [first, second]) is first
    assert limits_for(["b.conv", "a.conv"], [first, second]) is first
    assert limits_for(["b.conv"], [first, second]) is second
    assert limits_for(["b.conv"], [first]) is None


def test_entries_that_nothing_reads_are_told():
    said = []
    found = entries(
        {"match": "conv?", "floor": 0.5}, {"match": "conv1", "multiple": 2}, {"match": "cnv3", "floor": 0.5}
    )
    warn_of_idle_limits(found, [["conv1"], ["conv3"]], said.append)
    assert said == [
        "prune.layers.1: 'conv1' is never read: entries before it match the same layers",
        "prune.layers.2: 'cnv3' matches no layer whose channels may go; did you mean 'conv3'?",
    ]


# The stage


def widths(workshop, checkpoint):
    model = workshop.build(checkpoint)
    return {name: getattr(model, name).weight.shape[0] for name in ("conv1", "conv2", "conv3", "hidden")}


def test_each_layer_has_its_own_limits(workshop, trained):
    layers = [
        {"match": "conv1", "floor": 0.8, "multiple": 1},
        {"match": "conv[23]", "ceiling": 0.4, "multiple": 3},
        {"match": "hid*", "floor": 1.0},
    ]
    result = workshop.run(trained, "prune", target={"ratio": 0.5}, layers=layers, recovery=None)
    assert widths(workshop, result) == {"conv1": 13, "conv2": 12, "conv3": 12, "hidden": 32}
    assert result.history[-1].warnings == ()


def test_ceilings_go_beyond_the_target_and_say_so(workshop, trained):
    layers = [{"match": "conv*", "ceiling": 0.5}]
    result = workshop.run(trained, "prune", target={"macs": 0.9}, layers=layers, recovery=None)
    assert widths(workshop, result) == {"conv1": 8, "conv2": 16, "conv3": 16, "hidden": 32}
    assert [
        note
        for note in result.history[-1].notes
        if note.endswith("whole multiples and the ceilings of prune.layers come")
    ]


def test_a_layer_that_is_left_alone_cannot_keep_a_ceiling(workshop, trained):
    layers = [{"match": "conv1", "ceiling": 0.5}]
    settings = {"protect": ["conv1"], "target": {"ratio": 0.5}, "recovery": None}
    result = workshop.run(trained, "prune", layers=layers, **settings)
    (told,) = result.history[-1].warnings
    assert told == "prune.layers: 'conv1' keeps more than the ceiling of 0.5: it is left alone (protected by 'conv1')"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"layers": [{"match": "conv2", "floor": 0.6, "ceiling": 0.7, "multiple": 16}]},
            "ceiling that 'conv2' gives the 32 channels of 'conv2': at least 32 stay, and at most 16 may",
        ),
        (
            {"target": {"macs": 0.3}, "layers": [{"match": "conv*", "floor": 0.9}]},
            r"0.3 cannot be reached: 0\.\d+ remains with every group at its floor of 10% of its channels, or at that of prune.l",
        ),
    ],
)
def test_limits_that_cannot_be_met_name_what_can(settings, told, workshop, trained):
    with pytest.raises(StageError, match=told):
        workshop.draft(trained, "prune", recovery=None, **settings)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"match": "a"}, "sets nothing: give floor, ceiling or multiple"),
        ({"match": "a", "floor": 0.6, "ceiling": 0.5}, r"ceiling: 0.5 is below the floor of 0.6"),
        (
            {"match": "a", "ceiling": 0.05},
            r"layers.0.ceiling: 0.05 is below the floor of 0.1; give 'a' a floor of its own",
        ),
        ({"match": "", "floor": 0.5}, "at least 1 character"),
    ],
)
def test_limits_that_contradict_themselves_are_refused(entry, told, workshop, trained):
    with pytest.raises(ValueError, match=told):
        workshop.draft(trained, "prune", layers=[entry])
