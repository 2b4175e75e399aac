"""Splits that are kept only where they are faster: the choice, what is remembered of times, and what the stage says."""

import json
import shutil

import pytest
import torch
from torch import nn

from compress.config import FactorizeConfig
from compress.config.factorize import Split as ConfigSplit
from compress.edits import Factor, Split
from compress.errors import StageError
from compress.factorization.calls import Call
from compress.factorization.clock import Clock
from compress.factorization.faster import only_faster
from compress.factorization.forms import Form
from compress.factorization.ranks import Layer, OutOfReachError, least_error, macs
from compress.methods.lowrank import as_matrix
from compress.methods.times import Times
from compress.models.cost import macs as macs_of
from compress.stages import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(name, *forms, whole=100):
    return Layer(name, whole, 16, tuple(forms))


CHANNEL = [Form("channel", rank, 10 * rank, 0.5 - rank / 20) for rank in (2, 4, 6, 8)]
SPATIAL = [Form("spatial", rank, 10 * rank, 0.6 - rank / 20) for rank in (2, 4, 6, 8)]


def by(factors):
    """Whole layers take their work, forms a factor of it."""

    def time(forms):
        return {name: Times(100.0, form.macs * factors[name, form.split]) for name, form in forms.items()}

    return time


def test_what_is_faster_is_kept_as_it_was_chosen():
    some = [layer("a", *CHANNEL, *SPATIAL), layer("b", *CHANNEL)]
    factors = {("a", "channel"): 1, ("a", "spatial"): 1, ("b", "channel"): 1}
    kept = only_faster(some, lambda given: least_error(given, 120), by(factors), 0.02)
    assert kept.forms == least_error(some, 120)
    assert kept.slower == {}
    assert kept.is_met


def test_another_form_takes_the_place_of_one_that_is_slow():
    some = [layer("a", *CHANNEL, *SPATIAL), layer("b", *CHANNEL)]
    assert least_error(some, 80)["a"].split == "channel"
    factors = {("a", "channel"): 9, ("a", "spatial"): 1, ("b", "channel"): 1}
    kept = only_faster(some, lambda given: least_error(given, 80), by(factors), 0.02)
    assert kept.is_met
    assert kept.forms["a"].split == "spatial"
    assert kept.slower == {}  # nothing is left whole
    assert macs(some, kept.forms) <= 80


def test_a_lower_rank_may_be_fast_where_a_higher_is_not():
    factors = {("a", "channel"): 2.0}
    kept = only_faster([layer("a", *CHANNEL)], lambda given: least_error(given, 60), by(factors), 0.02)
    assert kept.forms["a"].rank == 4
    assert kept.is_met


def test_where_the_rest_cannot_meet_the_target_what_is_faster_stays_as_it_was():
    some = [layer("a", *CHANNEL), layer("b", *CHANNEL)]
    chosen = least_error(some, 100)
    factors = {("a", "channel"): 99, ("b", "channel"): 1}
    kept = only_faster(some, lambda given: least_error(given, 100), by(factors), 0.02)
    assert not kept.is_met
    assert kept.forms == {"b": chosen["b"]}  # and not the cheapest that there is
    assert set(kept.slower) == {"a"}


def test_a_layer_too_small_to_be_timed_is_not_faster():
    kept = only_faster([layer("a", *CHANNEL)], lambda given: {"a": CHANNEL[0]} if given[0].forms else {}, nothing, 0.02)
    assert kept.forms == {}
    assert kept.slower == {"a": Times(0.0, 0.0)}


def nothing(forms):
    return {name: Times(0.0, 0.0) for name in forms}


@pytest.mark.parametrize(("faster_by", "is_kept"), [(0.1, True), (0.21, False)])
def test_faster_by_is_a_fraction_of_the_layers_time(faster_by, is_kept):
    kept = only_faster(
        [layer("a", CHANNEL[-1])],
        lambda given: {"a": given[0].forms[0]} if given[0].forms else {},
        lambda forms: {name: Times(10.0, 8.0) for name in forms},
        faster_by,
    )
    assert bool(kept.forms) == is_kept


def test_a_target_that_was_never_in_reach_is_no_matter_of_time():
    with pytest.raises(OutOfReachError):
        only_faster([layer("a", *CHANNEL)], lambda given: least_error(given, 1), nothing, 0.02)


# What is remembered


class CountingTimer:
    """Tells the parameters of modules, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, layers):
        self.asked.append(list(layers))
        return {name: [float(sum(p.numel() for p in module.parameters()))] for name, (module, _) in layers.items()}


def clock(timer):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6, bias=False))
    calls = {name: Call((1, 8), 1, 1, 1) for name in "012"}
    return Clock(model, calls, frozenset("2"), timer)


def test_equal_layers_are_timed_once_and_nothing_twice():
    timer = CountingTimer()
    found = clock(timer)
    form = Form("channel", 2, 28, 0.1)
    times = found.times(dict.fromkeys("012", form))
    assert times["0"] == times["1"] == Times(54.0, 34.0)
    assert times["2"] == Times(48.0, 34.0)  # its last part gets a bias
    assert [len(names) for names in timer.asked] == [3]
    assert found.times({"1": form}) == {"1": times["1"]}
    assert len(timer.asked) == 1


def test_of_a_layer_the_medians_over_rounds_count():
    def rounds(layers):
        return {name: [1.0, 9.0, 2.0] if "Sequential" in name else [3.0, 4.0, 90.0] for name in layers}

    assert clock(rounds).times({"0": Form("channel", 2, 28, 0.1)}) == {"0": Times(4.0, 2.0)}


# The stage


def by_work(*slow):
    """A timer that goes by multiply-accumulates; sequences in which a convolution has such a kernel take far longer."""

    def timer(layers):
        times = {}
        for name, (module, shape) in layers.items():
            parts = list(module) if isinstance(module, nn.Sequential) else []
            is_slow = any(getattr(part, "kernel_size", None) in slow for part in parts)
            times[name] = [macs_of(module, (torch.zeros(shape),)) * (99.0 if is_slow else 1.0)]
        return times

    return timer


SETTINGS = {"target": {"macs": 0.6}, "multiple": 2, "min_saving": 0.1, "batchnorm_samples": 0, "faster_by": 0.02}


def drafted(workshop, parent, timer, **settings):
    """Draft and context, as of a stage that begins anew: nothing is left of the times of another."""
    found = workshop.draft(parent, "factorize", timer=timer, **settings)
    shutil.rmtree(workshop.folder / "scratch", ignore_errors=True)
    return found


def factors(draft):
    return [edit for edit in draft.edits if isinstance(edit, Factor)]


def test_forms_are_chosen_layer_by_layer(workshop, trained):
    settings = {**SETTINGS, "target": {"energy": 0.6}}
    draft, context = drafted(workshop, trained, by_work(), **settings)
    example = workshop.dataset.example()
    forms = {edit.module: edit.split for edit in factors(draft)}
    assert forms["hidden"] == "channel"
    assert {"spatial", "tucker"} & set(forms.values())
    plain, _ = drafted(workshop, trained, by_work(), splits=["channel"], **settings)
    assert macs_of(draft.model, example) < macs_of(plain.model, example)
    assert any("layers factorized (" in note and " channel" in note for note in context.notes)
    assert not context.warnings
    assert not any("not faster" in note for note in context.notes)
    saved = workshop._keep(draft, trained.history)
    with torch.no_grad():
        assert torch.equal(workshop.build(saved)(*example), draft.model(*example))


@pytest.mark.parametrize("split", ["channel", "spatial", "tucker"])
def test_each_form_goes_through_the_stages_before_and_behind(split, workshop, trained):
    settings = {**SETTINGS, "splits": [split], "target": {"macs": 0.75}, "faster_by": 0.0}
    pruning = {"target": {"ratio": 0.25}, "recovery": None}
    once = workshop.run(trained, "factorize", **settings)
    assert {edit.split for edit in factors(once)} == {split}
    pruned = workshop.run(once, "prune", **pruning)
    assert macs_of(workshop.build(pruned), workshop.dataset.example()) < 0.95 * macs_of(
        workshop.build(once), workshop.dataset.example()
    )
    again = workshop.run(pruned, "factorize", **{**settings, "target": {"energy": 0.5}})
    assert len({edit.module for edit in factors(again)}) == len(factors(again))
    other = workshop.run(workshop.run(trained, "prune", **pruning), "factorize", **settings)
    assert factors(other)
    for result in (once, pruned, again, other):
        with torch.no_grad():
            assert workshop.build(result)(*workshop.dataset.example()).isfinite().all()


@pytest.mark.parametrize("truncation", ["outputs", "weights"])
@pytest.mark.parametrize("allocation", ["least_error", "same_energy"])
def test_more_forms_cost_no_more_error(truncation, allocation, workshop, trained):
    settings = {
        **SETTINGS,
        "truncation": truncation,
        "allocation": allocation,
        "target": {"macs": 0.7},
        "faster_by": 0.0,
    }
    errors = []
    for splits in (["channel"], ["channel", "spatial", "tucker"]):
        draft, _ = workshop.draft(trained, "factorize", splits=splits, **settings)
        before, example = workshop.build(trained), workshop.dataset.example()
        assert macs_of(draft.model, example) <= 0.7 * macs_of(before, example)
        errors.append(sum(relative_error(before, draft.model, edit) for edit in factors(draft)))
    if truncation == "weights" and allocation == "least_error":
        assert errors[1] <= errors[0] + 1e-6


@torch.no_grad()
def relative_error(before, after, edit):
    """Of a layer's weight, as a matrix of what one pixel more or less in the input does to the output."""
    whole = before.get_submodule(edit.module)
    parts = after.get_submodule(edit.module)
    if isinstance(whole, nn.Linear):
        product = parts[1].weight @ parts[0].weight
        return float((whole.weight - product).square().sum() / whole.weight.square().sum())
    weights = [part.weight for part in parts]
    merged = weights[0]
    for weight in weights[1:]:
        merged = _composed(merged, weight)
    return float((as_matrix(whole.weight) - as_matrix(merged)).square().sum() / whole.weight.square().sum())


def _composed(first, second):
    """The weight of two convolutions in a row, of which along each axis one at most has more than a pixel."""
    rows, columns = max(first.shape[2], second.shape[2]), max(first.shape[3], second.shape[3])
    found = torch.einsum("rihw,orab->oihawb", first, second)
    return found.reshape(second.shape[0], first.shape[1], rows, columns)


def test_a_form_that_is_slow_here_is_not_taken(workshop, trained):
    fast, _ = drafted(workshop, trained, by_work(), **SETTINGS)
    assert "spatial" in {edit.split for edit in factors(fast)}
    draft, context = drafted(workshop, trained, by_work((3, 1), (1, 3)), **SETTINGS)
    assert "spatial" not in {edit.split for edit in factors(draft)}
    assert factors(draft)
    assert not context.warnings  # the others are enough


def test_splits_that_are_not_faster_are_left_whole_aloud(workshop, trained):
    def timer(layers):
        return {name: [0.034 if isinstance(module, nn.Sequential) else 0.031] for name, (module, _) in layers.items()}

    draft, context = drafted(workshop, trained, timer, **SETTINGS)
    assert draft.edits == ()
    (note,) = [note for note in context.notes if "not faster on this machine" in note]
    assert " splits were not faster on this machine (fp32) and are left whole: " in note
    assert "conv3 (0.031 → 0.034 ms)" in note
    (missed, idle) = context.warnings
    assert missed.startswith(
        "factorize.target.macs: 0.6 is not met, 1.000 remains: the splits that it would take are not 2 % "
    )
    assert missed.endswith("factorize.faster_by: 0 makes them all the same")
    assert "nothing was factorized: " in idle
    assert "conv3 (not faster: 0.031 → 0.034 ms)" in idle


@pytest.mark.parametrize("target", [{"energy": 0.6}, {"ratio": 0.25}])
def test_other_targets_lose_what_is_slow_too(target, workshop, trained):
    settings = {**SETTINGS, "target": target}
    fast, _ = drafted(workshop, trained, by_work(), **settings)
    assert len(factors(fast)) > 1
    slow, context = drafted(workshop, trained, by_work((3, 3), (3, 1), (1, 3)), **settings)
    assert {edit.module for edit in factors(slow)} == {"hidden", "head"}
    assert any("conv3" in note for note in context.notes if "not faster" in note)


def test_the_clock_of_this_machine_decides_where_no_other_is_given(workshop, trained):
    """Which splits are faster here nobody can know; each that was chosen is kept or said to be slower."""
    settings = {**SETTINGS, "target": {"ratio": 0.25}, "faster_by": 0.3}
    every, _ = workshop.draft(trained, "factorize", **{**settings, "faster_by": 0.0})
    draft, context = workshop.draft(trained, "factorize", **settings)
    kept = {edit.module for edit in factors(draft)}
    said = " ".join(note for note in context.notes if "not faster on this machine" in note)
    for edit in factors(every):
        assert (edit.module in kept) != (f"{edit.module} (" in said)
    assert not any("target" in warning for warning in context.warnings)


def test_layers_that_cannot_be_timed_end_the_stage_with_a_way_out(workshop, trained, monkeypatch):
    monkeypatch.setattr("compress.bench.trial_latency.serialized", lambda proto: b"no model")
    with pytest.raises(StageError, match=r"factorize\.faster_by: layers cannot be timed: .*; 0 measures nothing"):
        workshop.draft(trained, "factorize", **SETTINGS)


def test_a_stage_that_was_killed_gets_its_own_times_again(workshop, trained):
    first, _ = workshop.draft(trained, "factorize", timer=by_work((3, 1), (1, 3)), **SETTINGS)

    def asleep(layers):
        raise AssertionError

    again, _ = workshop.draft(trained, "factorize", timer=asleep, **SETTINGS)
    assert factors(again) == factors(first)


def test_nothing_is_timed_with_faster_by_0(workshop, trained):
    def timer(layers):
        raise AssertionError

    assert factors(drafted(workshop, trained, timer, **{**SETTINGS, "faster_by": 0.0})[0])


def test_what_trains_together_takes_the_leaders_times(workshop, trained):
    """A process that assists times nothing: it is told."""
    from dataclasses import replace

    whole, _ = drafted(workshop, trained, by_work((3, 1), (1, 3)), **SETTINGS)
    told = []

    class Group:
        def __init__(self, leads):
            self.leads = leads

        def told(self, value=None):
            if self.leads:
                told.append(json.loads(json.dumps(value)))
                return value
            return told.pop(0)

    from compress.stages import factorize

    context = workshop.draft(trained, "factorize", **{**SETTINGS, "faster_by": 0.0})[1]
    config = FactorizeConfig.model_validate_json(json.dumps(SETTINGS))

    def asleep(layers):
        raise AssertionError

    choices = []
    for leads, timer in ((True, by_work((3, 1), (1, 3))), (False, asleep)):
        place = replace(context, group=Group(leads), scratch=workshop.folder / f"scratch{leads}")
        choices.append(choice(factorize, trained, config, place, timer))
    assert choices[0] == choices[1] == [(e.module, e.split, e.rank, e.rank_in) for e in factors(whole)]


def choice(factorize, trained, config, context, timer):
    """What the stage chooses where it is to recover; the training is none."""
    from compress.config import RecoveryConfig

    config = config.model_copy(update={"recovery": RecoveryConfig(epochs=1)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorize, "recover", lambda *args: ())
        draft = factorize.run(trained, config, context, timer=timer)
    return [(edit.module, edit.split, edit.rank, edit.rank_in) for edit in factors(draft)]


def test_settings_and_edits_know_the_same_forms():
    assert ConfigSplit == Split
    assert FactorizeConfig().splits == ("channel", "spatial", "tucker")
    assert "factorize" in STAGES
