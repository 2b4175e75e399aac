"""Pruning in several cuts: how far each goes, what it tells, and that a killed run does none of them again."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_cases import KilledError, Recorder, bits, same, timeless

from compress import surgery
from compress.config import PruneConfig
from compress.errors import StageError
from compress.methods.cutting import cubic, geometric
from compress.models.cost import macs, parameters
from compress.pruning.choice import aims_of
from compress.stages.base import cost_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 2, "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.003, "precision": "fp32"}
ITERATIVE = {"iterative": {"steps": 3, "epochs": 1}}
GRADUAL = {"gradual": {"steps": 3, "epochs": 1}}
HALF = {"target": {"macs": 0.5}, "multiple": 1, "recovery": QUICK}

finals, steps = st.floats(0.01, 0.99), st.integers(1, 40)


# How far each cut goes


@given(finals, steps)
def test_geometric_cuts_take_the_same_fraction_of_what_is_left(final, steps):
    left = [1.0, *geometric(final, steps)]
    assert left[-1] == final
    for before, after in pairwise(left):
        assert after / before == pytest.approx(final ** (1 / steps))


@given(finals, steps)
def test_cubic_cuts_are_those_of_the_paper(final, steps):
    left = cubic(final, steps)
    assert left[-1] == final
    gone = 1 - final
    for step, share in enumerate(left, 1):
        # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³ with s_i = t_0 = 0
        assert 1 - share == pytest.approx(gone + (0 - gone) * (1 - step / steps) ** 3)
    taken = [before - after for before, after in zip([1.0, *left], left, strict=False)]
    assert all(later < earlier for earlier, later in pairwise(taken))


@pytest.mark.parametrize("target", [{"macs": 0.4}, {"parameters": 0.4}, {"ratio": 0.6}])
@pytest.mark.parametrize("schedule", [{"one_shot": {}}, ITERATIVE, GRADUAL])
def test_the_last_cut_aims_at_the_target_itself(schedule, target):
    config = PruneConfig.model_validate_json(json.dumps({"target": target, "schedule": schedule}))
    aims = aims_of(config)
    assert len(aims) == config.schedule.steps
    assert (aims[-1].value, aims[-1].pressure) == (config.target.settings, 1.0)
    assert [aim.pressure for aim in aims] == sorted(aim.pressure for aim in aims)
    for aim in aims:
        gone = aim.value if "ratio" in target else 1 - aim.value
        assert aim.pressure == pytest.approx(gone / 0.6)


# The stage


@pytest.fixture
def rows_of(workshop, trained):
    def made(**settings):
        return workshop.run(trained, "prune", **{**HALF, **settings})

    return made


@pytest.mark.parametrize("schedule", [ITERATIVE, GRADUAL])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_schedule_meets_the_target_step_by_step(schedule, ranking, workshop, trained, rows_of):
    result = rows_of(schedule=schedule, ranking=ranking)
    example = workshop.dataset.example()
    whole, left = (macs(workshop.build(one), example) for one in (trained, result))
    assert 0.5 * 0.94 < left / whole <= 0.5
    entry = result.history[-1]
    told = [note for note in entry.notes if note.startswith("cut ")]
    assert [note.partition(":")[0] for note in told] == ["cut 1 of 3", "cut 2 of 3", "cut 3 of 3"]
    aims = geometric(0.5, 3) if schedule is ITERATIVE else cubic(0.5, 3)
    for note, aim in zip(told, aims, strict=True):
        percent = float(note.partition(": ")[2].partition(" %")[0])
        assert 100 * aim * 0.9 < percent <= 100 * aim + 0.05
    assert all("straight after it" in note and "after 1 epoch of training" in note for note in told[:-1])
    assert [row["epoch"] for row in entry.training] == [1, 2, 3, 4]
    assert sum("before recovery training" in note for note in entry.notes) == 1


def test_the_edits_of_all_cuts_make_the_model_from_the_source(workshop, trained, rows_of):
    result = rows_of(schedule=ITERATIVE)
    model = workshop.build(trained)
    surgery.apply_all(model, result.edits[len(trained.edits) :])
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in workshop.build(result).state_dict().items()}
    cuts = [edit for edit in result.edits if edit.edit == "keep" and ("conv1.weight", 0) in edit.axes]
    assert [edit.size for edit in cuts] == sorted({edit.size for edit in cuts}, reverse=True)
    assert len(cuts) == 3


def test_a_ratio_is_that_of_the_whole_layers(workshop, rows_of):
    result = rows_of(target={"ratio": 0.5}, schedule={"iterative": {"steps": 4, "epochs": 1}}, floor=0.5)
    model = workshop.build(result)
    assert [getattr(model, name).weight.shape[0] for name in ("conv1", "conv2", "conv3", "hidden")] == [8, 16, 16, 16]


def test_floors_are_those_of_the_whole_layers(workshop, rows_of):
    layers = [{"match": "conv1", "floor": 0.75}, {"match": "conv3", "ceiling": 0.25}]
    result = rows_of(schedule=GRADUAL, layers=layers)
    model = workshop.build(result)
    assert model.conv1.weight.shape[0] >= 12
    assert model.conv3.weight.shape[0] <= 8


def test_a_step_that_has_nothing_to_do_trains_nothing(rows_of):
    settings = {"target": {"ratio": 0.5}, "multiple": 8, "schedule": {"iterative": {"steps": 8, "epochs": 1}}}
    entry = rows_of(**settings).history[-1]
    idle = sum("nothing goes" in note for note in entry.notes)
    assert idle > 0
    assert [row["epoch"] for row in entry.training] == list(range(1, 7 - idle + 2 + 1))


def test_the_epochs_to_come_fall_by_those_of_a_cut_that_has_nothing_to_do(workshop, trained):
    recorder = Recorder()
    settings = {"target": {"ratio": 0.5}, "multiple": 8, "schedule": {"iterative": {"steps": 8, "epochs": 1}}}
    _, context = workshop.draft(trained, "prune", progress=recorder, **{**HALF, **settings})
    idle = sum("nothing goes" in note for note in context.notes)
    assert idle > 0
    totals = [result.epochs for result in recorder.epochs]
    assert totals == sorted(totals, reverse=True)
    assert max(totals) <= 7 + QUICK["epochs"]
    last = recorder.epochs[-1]
    assert last.epoch == last.epochs == 7 - idle + QUICK["epochs"]


def test_one_shot_is_what_it_was_without_a_schedule(rows_of):
    assert rows_of().digest == rows_of(schedule={"one_shot": {}}).digest


def test_a_target_out_of_reach_is_told_before_any_training(workshop, trained):
    recorder = Recorder()
    settings = {**HALF, "target": {"macs": 0.05}, "floor": 0.5, "schedule": ITERATIVE}
    with pytest.raises(StageError, match=r"prune.target.macs: 0.05 cannot be reached: 0\.\d+ remains"):
        workshop.draft(trained, "prune", progress=recorder, **settings)
    assert not recorder.epochs


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": ITERATIVE}, "schedule: 'iterative' trains between its cuts with the settings of recovery"),
        ({"sparsity": {"weight": 0.1}}, "sparsity: trains with the settings of recovery, which is null"),
    ],
)
def test_what_trains_before_the_last_cut_needs_a_recovery(settings, told, workshop, trained):
    with pytest.raises(ValueError, match=told):
        workshop.draft(trained, "prune", recovery=None, **settings)


# Going on


def kill_at(epoch):
    """Kills at an epoch counted over all trainings of the stage."""

    def then(result):
        if result.epoch == epoch:
            raise KilledError

    return Recorder(then)


ALL_PARTS = {
    **HALF,
    "schedule": {"iterative": {"steps": 2, "epochs": 2}},
    "sparsity": {"kind": "group_growing", "weight": 0.1, "epochs": 1},
}


@pytest.fixture(scope="module")
def uninterrupted(shared_workshop, trained):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests: another number may add up in another order
    found = shared_workshop.draft(trained, "prune", **ALL_PARTS)
    torch.set_num_threads(before)
    shutil.rmtree(shared_workshop.folder / "scratch")
    return found


@pytest.mark.parametrize(
    "epoch", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_killed_schedule_goes_on_at_the_same_bits(epoch, workshop, trained, uninterrupted):
    settings, (straight, context) = ALL_PARTS, uninterrupted
    assert [row["epoch"] for row in straight.training] == [1, 2, 3, 4, 5]
    with pytest.raises(KilledError):
        workshop.draft(trained, "prune", progress=kill_at(epoch), **settings)
    recorder = Recorder()
    resumed, again = workshop.draft(trained, "prune", progress=recorder, **settings)
    finished = {1: 0, 2: 1, 3: 1, 4: 2}[epoch]
    assert any(f"goes on after part {finished} of 3" in note for note in recorder.notes) == (finished > 0)
    # The last epoch of a training leaves no state: its part comes again, or goes on from the epoch before.
    assert [result.epoch for result in recorder.epochs] == {1: [1, 2, 3, 4, 5], 2: [3, 4, 5], 3: [3, 4, 5], 4: [5]}[
        epoch
    ]
    assert same(bits(straight.model), bits(resumed.model))
    assert straight.edits == resumed.edits
    assert timeless(straight.training) == timeless(resumed.training)
    assert (context.notes, context.warnings) == (again.notes, again.warnings)


def test_what_was_left_by_other_settings_is_not_taken(workshop, trained):
    settings = {**HALF, "schedule": ITERATIVE}
    with pytest.raises(KilledError):
        workshop.draft(trained, "prune", progress=kill_at(3), **settings)
    recorder = Recorder()
    workshop.draft(trained, "prune", progress=recorder, **{**settings, "target": {"macs": 0.6}})
    assert not any("goes on after part" in note for note in recorder.notes)
    assert [result.epoch for result in recorder.epochs] == [1, 2, 3, 4]


def test_a_file_that_is_no_whole_part_is_told(workshop, trained):
    settings = {**HALF, "schedule": ITERATIVE}
    with pytest.raises(KilledError):
        workshop.draft(trained, "prune", progress=kill_at(3), **settings)
    (path,) = (workshop.folder / "scratch").glob("parts-*/parts.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StageError, match=r"cannot be read; remove .* to begin anew"):
        workshop.draft(trained, "prune", **settings)


# Sparsity


@pytest.mark.parametrize(("kind", "weight"), [("group_lasso", 0.01), ("group_growing", 0.5)])
def test_a_sparsity_training_draws_the_channels_that_go_to_zero(kind, weight, workshop, trained):
    settings = {**HALF, "recovery": {**QUICK, "epochs": 1, "batch_size": 8, "learning_rate": 0.01}}
    sparsity = {"kind": kind, "weight": weight, "epochs": 4}
    result = workshop.run(trained, "prune", **settings, sparsity=sparsity)
    (told,) = [note for note in result.history[-1].notes if note.startswith("sparsity training")]
    before, after = (float(part.rpartition(" ")[2]) for part in told.split("%")[2:4])
    assert f"({kind}, weight {weight:g}, 4 epochs)" in told
    assert after < 0.7 * before
    assert [row["epoch"] for row in result.history[-1].training] == list(range(1, 6))
    plain = workshop.run(trained, "prune", **settings)
    assert cost_of(workshop.build(result), workshop.dataset.example()).macs == pytest.approx(
        cost_of(workshop.build(plain), workshop.dataset.example()).macs, rel=0.1
    )
    assert parameters(workshop.build(result)) < parameters(workshop.build(trained))
    assert not torch.equal(workshop.build(result).head.weight, workshop.build(plain).head.weight)
