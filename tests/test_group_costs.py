"""`ranking: sensitivity`: what groups cost decides how much each loses; and targets of measured latency."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from test_pruning_sensitivity import group_of

from compress.bench.trial_latency import layer_times
from compress.config import PruneConfig
from compress.edits import Keep
from compress.errors import StageError
from compress.measured import GroupSensitivity, PruningSensitivity, SilencedChannels
from compress.models.cost import macs
from compress.pruning.allotment import Allotment, predicted_loss, told, with_removed
from compress.pruning.pace import Pace
from compress.pruning.selection import Limits
from compress.stages import STAGES
from compress.stages.base import Context

pytestmark = pytest.mark.usefixtures("one_thread")


def cost(name, *percents, channels=16):
    steps = (
        SilencedChannels(ratio=ratio, silenced=round(channels * ratio), percent=percent)
        for ratio, percent in zip((0.25, 0.5, 0.75), percents, strict=True)
    )
    return GroupSensitivity(name=name, channels=channels, removed=0, steps=tuple(steps))


@pytest.mark.parametrize(
    ("ratio", "points"), [(0.0, 0.0), (0.125, 2.0), (0.25, 4.0), (0.5, 10.0), (0.75, 50.0), (1.0, 90.0), (0.875, 70.0)]
)
def test_losses_lie_on_straight_lines_between_what_was_measured(ratio, points):
    assert predicted_loss(90.0, cost("a", 86.0, 80.0, 40.0), ratio) == pytest.approx(points)


def allotment(*costs, multiple=1, floor=0.0, weight=None):
    groups = [replace(group_of(16), name=each.name) for each in costs]
    weight = weight or {}
    total = sum(weight.get(group.name, 1) for group in groups)

    def remains(group, channels):
        return 1 - weight.get(group.name, 1) / total * (1 - channels / 16)

    return Allotment(PruningSensitivity(n=100, percent=90.0, groups=costs), groups, Limits(multiple, floor), remains)


def test_groups_that_cost_little_lose_first():
    found = allotment(cost("dear", 60.0, 30.0, 10.0), cost("cheap", 90.0, 89.0, 80.0))
    assert found.at(0.0) == {"dear": 16, "cheap": 16}
    half = found.at(0.3)
    assert half["dear"] == 16
    assert half["cheap"] < 16
    everything = found.at(1.0)
    assert everything["dear"] == pytest.approx(1)
    assert everything["cheap"] == pytest.approx(1)


def test_of_equal_costs_the_group_that_saves_more_loses_first():
    found = allotment(cost("a", 85.0, 80.0, 40.0), cost("b", 85.0, 80.0, 40.0), weight={"a": 1, "b": 9})
    assert found.at(0.3)["a"] == 16
    assert found.at(0.3)["b"] < 16


def test_more_is_never_given_back_in_sum():
    found = allotment(cost("a", 85.0, 80.0, 40.0), cost("b", 89.0, 70.0, 60.0), cost("c", 90.0, 90.0, 10.0))
    left = [sum(found.at(share / 20).values()) for share in range(21)]
    assert left == sorted(left, reverse=True)
    losses = [found.loss({name: round(kept) for name, kept in found.at(share / 20).items()}) for share in range(21)]
    assert losses == pytest.approx(sorted(losses))


def test_groups_stay_within_their_limits_and_unknown_ones_stay_whole():
    known = cost("a", 90.0, 90.0, 90.0)
    groups = [replace(group_of(16), name=name) for name in ("a", "b")]
    costs = PruningSensitivity(n=10, percent=90.0, groups=(known,))
    found = Allotment(costs, groups, Limits(4, 0.5), lambda group, channels: channels / 16)
    assert found.at(1.0) == {"a": 8, "b": 16}


def test_what_was_chosen_is_told_with_the_reason():
    costs = PruningSensitivity(n=100, percent=90.0, groups=(cost("a", 60.0, 30.0, 10.0), cost("b", 90.0, 89.0, 80.0)))
    text = told(costs, {"a": [], "b": [1, 2, 3, 4]}, 0.25)
    assert "most of b 4 of 16 (-1.0 points); least of a 0 of 16 (-60.0 points)" in text
    assert "0.2 points of loss predicted" in text
    assert [group.removed for group in with_removed(costs, {"b": [1, 2]}).groups] == [2]


# The stage

SETTINGS = {"ranking": "sensitivity", "target": {"macs": 0.6}, "multiple": 1, "recovery": None}


def left_of(workshop, parent, draft):
    example = tuple(tensor[:1] for tensor in workshop.dataset.example())
    return macs(draft.model, example) / macs(workshop.build(parent), example)


def test_the_target_is_met_and_what_groups_cost_is_kept(workshop, trained):
    draft, context = workshop.draft(trained, "prune", **SETTINGS)
    assert 0.57 < left_of(workshop, trained, draft) <= 0.6
    found = draft.sensitivity
    assert found.n == min(512, len(workshop.dataset.validation))
    assert {group.name for group in found.groups} >= {"conv1", "conv2"}
    cut = {
        axes[0][0]: edit.size - len(edit.kept) for edit in draft.edits if isinstance(edit, Keep) for axes in [edit.axes]
    }
    assert {f"{group.name}.weight": group.removed for group in found.groups if group.removed} == cut
    assert any("shares by what each group costs alone" in note for note in context.notes)
    # Less is predicted to be lost than where every group loses the same fraction.
    evenly, _ = workshop.draft(trained, "prune", **{**SETTINGS, "ranking": "local"})
    lost = {
        edit.axes[0][0].removesuffix(".weight"): 1 - len(edit.kept) / edit.size
        for edit in evenly.edits
        if isinstance(edit, Keep)
    }
    uniform = sum(max(0.0, predicted_loss(found.percent, group, lost.get(group.name, 0.0))) for group in found.groups)
    chosen = sum(
        max(0.0, predicted_loss(found.percent, group, group.removed / group.channels)) for group in found.groups
    )
    assert chosen <= uniform


def test_what_groups_cost_is_measured_once(workshop, trained, tmp_path):
    def made(**changes):
        entry = PruneConfig.model_validate_json(json.dumps({**SETTINGS, **changes}))
        context = Context(
            workshop.dataset.for_decisions(),
            trained,
            "cpu",
            1,
            0,
            tmp_path / "scratch",
            Progress(),
            workshop.trusted,
            costs=tmp_path / "costs",
        )
        return STAGES["prune"].load()(trained, entry, context), context.progress.told

    first, told_first = made()
    (kept,) = (tmp_path / "costs").iterdir()
    again, told_again = made()
    assert again.sensitivity == first.sensitivity
    assert again.edits == first.edits
    assert any("each group of channels costs" in text for text in told_first)
    assert not any("each group of channels costs" in text for text in told_again)
    other, told_other = made(target={"macs": 0.8})  # the same model and samples
    assert not any("each group of channels costs" in text for text in told_other)
    assert other.edits != first.edits
    made(criterion="l2", sensitivity_samples=64)
    assert len(list((tmp_path / "costs").iterdir())) == 2
    kept.write_text("{")  # damaged: measured again
    assert made()[0].sensitivity == first.sensitivity


class Progress:
    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *arguments, **named: self.told.append(str(arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"ratio": 0.5}}, "ranking: a target of ratio takes the same fraction of every group"),
        ({"normalize": "max"}, "normalize: with ranking 'sensitivity' scores of groups are never compared"),
        ({"ranking": "local", "sensitivity_samples": 10}, "sensitivity_samples: ranking 'local' looks at none"),
        ({"timed_as": "int8"}, "timed_as: a target of macs times nothing"),
        (
            {"ranking": "local", "target": {"latency": 0.5}, "recovery": {}, "schedule": {"iterative": {}}},
            "schedule: a target of latency is met in one cut",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PruneConfig.model_validate_json(json.dumps({**SETTINGS, **changes}))


# Latency


def by_work(asked):
    """Models take as many milliseconds as they have thousands of parameters."""
    return {name: [sum(each.numel() for each in module.parameters()) / 1000] for name, (module, _) in asked.items()}


LATENCY = {"target": {"latency": 0.7}, "multiple": 1, "recovery": None}


def test_a_target_of_latency_is_met(workshop, trained):
    draft, context = workshop.draft(trained, "prune", timer=by_work, **LATENCY)
    whole = workshop.build(trained)
    left = sum(each.numel() for each in draft.model.parameters()) / sum(each.numel() for each in whole.parameters())
    assert 0.6 < left <= 0.7
    assert any(f"{left:.3f} of the time remains" in note for note in context.notes)


def test_models_are_timed_once_and_a_killed_stage_chooses_as_before(workshop, trained):
    asked = []

    def timer(models):
        asked.append(models)
        return by_work(models)

    draft, _ = workshop.draft(trained, "prune", timer=timer, **LATENCY)
    times = len(asked)
    assert 2 <= times <= 8

    def fails(models):
        raise AssertionError("is timed again")

    again, _ = workshop.draft(trained, "prune", timer=fails, **LATENCY)
    assert again.edits == draft.edits


def test_times_that_cannot_be_reached_are_refused_with_what_can(workshop, trained):
    with pytest.raises(
        StageError, match=r"target.latency: 0.5 cannot be reached: 1.000 of the time remains \(3 → 3 ms\)"
    ):
        workshop.draft(
            trained,
            "prune",
            timer=lambda models: {name: [3.0] for name in models},
            **{**LATENCY, "target": {"latency": 0.5}},
        )


def test_real_models_are_timed_in_onnx_runtime(workshop, trained):
    draft, _ = workshop.draft(trained, "prune", timer=by_work, **{**LATENCY, "target": {"latency": 0.4}})
    timer, told = functools.partial(layer_times, rounds=2), ("prune.target.latency", "take a target of macs")
    pace = Pace(timer, workshop.dataset.example(), *told)
    times = pace.times(workshop.build(trained), draft.edits)
    assert 0 < times.after_ms < 2 * times.before_ms
    first, second, third = pace.rounds(workshop.build(trained), [draft.edits, (), draft.edits])
    assert len(first) == len(second) == 2
    assert first is third or first == third  # the same cut is timed once
    two = (torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(
        StageError, match=r"target.latency: only models with one input, of floats, .*; take a target of"
    ):
        Pace(timer, two, *told)
