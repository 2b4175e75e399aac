"""`multiple: auto`: which multiple of channels pays here, decided once by times side by side."""

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_cases import KilledError, Recorder

from compress.config import PruneConfig
from compress.data.base import Shard
from compress.errors import StageError
from compress.pruning.multiples import MULTIPLES, Ratio, smallest_unbeaten
from compress.stages import prune

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 1, "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.003, "precision": "fp32"}
AUTO = {"target": {"macs": 0.5}, "multiple": "auto", "recovery": None, "batchnorm_samples": 0}


# What beats what


@pytest.mark.parametrize(
    ("rounds", "taken"),
    [
        ({2: [10.0] * 8, 4: [9.7] * 8, 8: [9.6] * 8}, 4),  # 8 saves 1 % of the time of 4
        ({2: [10.0] * 8, 4: [9.7] * 8, 8: [9.4] * 8}, 8),
        ({2: [10.0] * 8, 4: [9.9] * 8, 8: [9.85] * 8}, 2),
        ({2: [10.0] * 8, 4: [9.9] * 8, 8: [9.75] * 8}, 4),  # 8 beats 2, and not 4
        ({2: [10.0] * 8, 8: [9.5] * 7 + [9.9]}, 2),  # the interval of eight rounds is all of them
        ({2: [10.0] * 16, 8: [9.5] * 13 + [12.0] * 3}, 8),  # of sixteen three may be disturbed at either end
        ({2: [10.0, 20.0] * 4, 8: [9.5, 19.0] * 4}, 8),  # a drift of the machine meets both
        ({2: [10.0] * 8, 8: [9.8] * 8}, 8),
        ({4: [1.0] * 8}, 4),
        ({2: [0.0] * 8, 4: [0.0] * 8}, 2),  # a clock that shows nothing
    ],
)
def test_a_larger_multiple_has_to_pay_for_sure(rounds, taken):
    assert smallest_unbeaten(rounds, 0.02)[0] == taken


times = st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6)


@given(st.dictionaries(st.sampled_from(MULTIPLES), times, min_size=1))
def test_what_is_taken_is_the_smallest_that_nothing_larger_beats(rounds):
    taken, why = smallest_unbeaten(rounds, 0.02)

    def beaten(multiple):
        return any(Ratio.of(rounds, other, multiple).is_faster_by(0.02) for other in rounds if other > multiple)

    assert not beaten(taken)
    assert all(beaten(smaller) for smaller in rounds if smaller < taken)
    assert [ratio.smaller for ratio in why if ratio.smaller != taken] == sorted(each for each in rounds if each < taken)


# The stage


class InBlocks:
    """A timer of a machine whose kernels compute so many channels at once: a part of a block costs as much as a whole one."""

    def __init__(self, block):
        self.block, self.asked = block, []

    def __call__(self, models):
        self.asked.append(list(models))
        found = {}
        for name, (module, shape) in models.items():
            assert shape == (1, 1, 12, 8)
            weights = [tensor for tensor in module.parameters() if tensor.dim() > 1]
            found[name] = [
                sum(math.ceil(w.shape[0] / self.block) * math.ceil(w.shape[1] / self.block) for w in weights)
            ] * 8
        return found


def never(models):
    raise AssertionError("is timed")


def told(context):
    (note,) = [note for note in context.notes if note.startswith("multiple: ")]
    return note


def drafted(workshop, parent, timer, **settings):
    return workshop.draft(parent, "prune", timer=timer, **{**AUTO, **settings})


def test_the_multiple_of_the_kernels_is_taken_and_the_note_says_why(workshop, trained):
    timer = InBlocks(8)
    draft, context = drafted(workshop, trained, timer)
    assert [len(names) for names in timer.asked] == [5]
    note = told(context)
    assert note.startswith("multiple: auto takes 8: 1 takes ")
    assert len(re.findall(r"(\d+) takes [\d.]+ ms and leaves \d\d\.\d % of the MACs", note)) == 5
    for smaller in (1, 2, 4):
        assert re.search(rf"8 takes 0\.\d+ \[0\.\d+, 0\.\d+\] of the time of {smaller}\b", note)
    assert "none larger saves 2 % of the time of 8 for sure (16 takes " in note
    assert context.warnings == []
    by_number, _ = workshop.draft(trained, "prune", timer=never, **{**AUTO, "multiple": 8})
    assert draft.edits == by_number.edits


def test_candidates_leave_nothing_behind_in_each_other(workshop, trained):
    """In multiples of 16 the first layer, of 16 channels, is left alone; in those of 8 it is not."""
    draft, _ = drafted(workshop, trained, InBlocks(8), layers=[{"match": "conv3", "ceiling": 0.75}])
    assert draft.model.conv1.weight.shape[0] == 8


def test_a_machine_without_blocks_keeps_the_finest_choice(workshop, trained):
    draft, context = drafted(workshop, trained, lambda models: {name: [1.0] * 8 for name in models})
    assert told(context).startswith("multiple: auto takes 1: ")
    assert draft.edits == workshop.draft(trained, "prune", **{**AUTO, "multiple": 1})[0].edits


def test_layers_with_a_multiple_of_their_own_keep_it(workshop, trained):
    draft, context = drafted(workshop, trained, InBlocks(8), layers=[{"match": "conv2", "multiple": 5}])
    taken = int(re.match(r"multiple: auto takes (8|16): ", told(context))[1])
    widths = [getattr(draft.model, name).weight.shape[0] for name in ("conv1", "conv2", "conv3", "hidden")]
    assert widths[1] % 5 == 0
    assert all(width % taken == 0 for width in (widths[0], *widths[2:]))


@pytest.mark.parametrize("target", [{"macs": 0.3}, {"parameters": 0.2}])
def test_multiples_in_which_the_target_cannot_be_met_are_left_out(target, workshop, trained):
    _, context = drafted(workshop, trained, InBlocks(1), target=target, layers=[{"match": "conv[12]", "floor": 0.26}])
    left_out = re.findall(
        r"(\d+) is left out: prune\.target\.\w+: 0\.\d cannot be reached: 0\.\d+ remains", told(context)
    )
    assert left_out
    assert left_out[-1] == "16"


def test_limits_between_which_a_multiple_does_not_lie_leave_it_out(workshop, trained):
    layers = [{"match": "conv2", "floor": 0.6, "ceiling": 0.7}]
    _, context = drafted(workshop, trained, InBlocks(1), layers=layers)
    assert "8 is left out: prune.layers: no multiple of 8 lies between the floor and the ceiling" in told(context)


def test_multiples_that_no_group_has_more_channels_than_are_left_out(workshop, trained):
    settings = {"target": {"ratio": 0.5}, "protect": ["conv2", "conv3", "hidden"]}
    _, context = drafted(workshop, trained, InBlocks(1), **settings)
    assert "16 is left out: no group can lose channels" in told(context)


def test_a_target_out_of_reach_in_all_of_them_is_refused_as_the_finest_one_says_it(workshop, trained):
    with pytest.raises(StageError, match=r"prune.target.macs: 0.05 cannot be reached: .* in multiples of 1"):
        drafted(workshop, trained, never, target={"macs": 0.05}, floor=0.5)


def test_where_all_make_the_same_cut_nothing_is_timed(workshop, trained):
    layers = [{"match": "*", "multiple": 4}]
    draft, context = drafted(workshop, trained, never, layers=layers)
    assert "all of them make the same cut: nothing to time" in told(context)
    assert draft.edits


def test_where_nothing_can_go_nothing_is_timed_and_it_is_said(workshop, trained):
    draft, context = drafted(workshop, trained, never, target={"ratio": 0.5}, protect=["*"])
    assert draft.edits == ()
    assert told(context) == "multiple: auto takes 1: no group can lose channels in any"
    assert any(text.startswith("nothing was pruned") for text in context.warnings)


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"latency": 0.9}])
def test_a_number_times_no_candidates(target, workshop, trained):
    asked = []

    def timer(models):
        asked.append(models)
        return {name: [sum(each.numel() for each in module.parameters())] for name, (module, _) in models.items()}

    _, context = drafted(workshop, trained, timer, target=target, multiple=4)
    assert all("whole" in models for models in asked)
    assert bool(asked) == ("latency" in target)
    assert not any(note.startswith("multiple: ") for note in context.notes)


def test_all_cuts_of_a_schedule_go_by_the_multiple_of_the_target(workshop, trained):
    timer = InBlocks(8)
    settings = {"recovery": QUICK, "schedule": {"iterative": {"steps": 2, "epochs": 1}}}
    draft, _ = drafted(workshop, trained, timer, **settings)
    assert len(timer.asked) == 1
    by_number, _ = workshop.draft(trained, "prune", timer=never, **{**AUTO, **settings, "multiple": 8})
    assert draft.edits == by_number.edits


SCHEDULE = {
    "recovery": QUICK,
    "schedule": {"iterative": {"steps": 2, "epochs": 1}},
    "sparsity": {"weight": 1e-4, "epochs": 1},
}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_killed_stage_takes_the_same_multiple_again(epoch, workshop, trained):
    def kill(result):
        if result.epoch == epoch:
            raise KilledError

    with pytest.raises(KilledError):
        workshop.draft(trained, "prune", timer=InBlocks(8), progress=Recorder(kill), **{**AUTO, **SCHEDULE})
    _, again = drafted(workshop, trained, never, **SCHEDULE)
    assert told(again).startswith("multiple: auto takes 8: 1 takes ")


def test_a_damaged_decision_is_told(workshop, trained):
    drafted(workshop, trained, InBlocks(8))
    (path,) = (workshop.folder / "scratch").glob("parts-*/multiple.json")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StageError, match=r"multiple\.json: cannot be read; remove it to measure anew"):
        drafted(workshop, trained, InBlocks(8))


class Group:
    """One of two processes, of which the leader comes first; the other one is told the same."""

    def __init__(self, leads, words):
        self.leads, self.shard, self._words = leads, Shard(0 if leads else 1, 2), words

    def told(self, value=None):
        if self.leads:
            self._words.append(json.loads(json.dumps(value)))
            return value
        return self._words.pop(0)


def test_what_trains_together_takes_the_leaders_multiple(workshop, trained, monkeypatch):
    monkeypatch.setattr(prune, "recover", lambda *args: ())
    context = drafted(workshop, trained, InBlocks(8))[1]
    config = PruneConfig.model_validate_json(json.dumps({**AUTO, "recovery": {}}))
    words, edits = [], []
    for leads, timer in ((True, InBlocks(8)), (False, never)):
        place = replace(context, group=Group(leads, words), scratch=workshop.folder / f"scratch{leads}", notes=[])
        edits.append(prune.run(trained, config, place, timer=timer).edits)
        assert told(place).startswith("multiple: auto takes 8")
    assert edits[0] == edits[1]
    assert words == []


def test_models_that_cannot_be_timed_are_told_with_what_to_set(workshop, trained):
    def fails(models):
        raise StageError("no such operator")

    with pytest.raises(StageError, match=r"prune.multiple: the model cannot be timed: no such operator; give a number"):
        drafted(workshop, trained, fails)


@pytest.mark.slow
@pytest.mark.parametrize("timed_as", ["fp32", "int8"])
def test_the_clock_of_this_machine_takes_one_of_them(timed_as, workshop, trained):
    _, context = workshop.draft(trained, "prune", **AUTO, timed_as=timed_as)
    taken, shown = re.match(r"multiple: auto takes (\d+): (.*)", told(context)).groups()
    assert f"{taken} takes" in shown
    assert int(taken) in MULTIPLES


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"multiple": "auto", "target": {"latency": 0.5}},
            "multiple: with a target of latency models of all multiples take",
        ),
        ({"timed_as": "int8"}, "timed_as: a target of macs times nothing; leave it out"),
        ({"multiple": "Auto"}, "'auto'"),
        ({"multiple": 0}, "greater than or equal to 1"),
        ({"multiple": 257}, "less than or equal to 256"),
        ({"layers": [{"match": "a", "multiple": "auto"}]}, "valid integer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PruneConfig.model_validate_json(json.dumps(settings))


def test_only_auto_is_timed_and_as_it_is_told():
    auto = PruneConfig.model_validate_json(json.dumps({"multiple": "auto", "timed_as": "int8"}))
    assert auto.is_timed
    assert not PruneConfig().is_timed
