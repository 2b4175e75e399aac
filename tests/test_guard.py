"""Stages with a budget: what a search takes, what it refuses, what it says, and what it leaves behind."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from training_cases import KilledError, Recorder

from compress import checkpoint as checkpoints
from compress import run
from compress.checkpoint import Draft
from compress.config import STAGE_CONFIGS, SurgeryConfig
from compress.data.base import WHOLE, Batch, DecisionData, Input, Shard
from compress.data.splits import halves
from compress.distributed import ALONE, Group
from compress.edits import Attribute
from compress.errors import DivergedError, StageError
from compress.manifest import HistoryEntry
from compress.models.factory import Arch, create
from compress.plan import Keys, make_plan, planned_stages
from compress.provenance import code_digest
from compress.seeds import derive_seed
from compress.stages.base import Context
from compress.stages.guard import guarded
from compress.stages.lost import lost
from compress.training import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, CLASSES = 200, 4
TABLE = f'''
"""Answers each sample (its number, its class) correctly but for those it has been told to get wrong."""

import torch
import torch.nn.functional as F
from torch import nn


class Table(nn.Module):
    def __init__(self, num_classes={CLASSES}):
        super().__init__()
        self.removed = 0
        self.wrong = nn.Parameter(torch.zeros({SAMPLES}))

    def forward(self, x):
        number, label = x.long().unbind(1)
        return F.one_hot((label + (self.wrong[number] > 0)) % {CLASSES}, {CLASSES}).float()
'''


class Numbered:
    """A split of samples that say their number and their class."""

    repeats = True

    def __init__(self, name, numbers):
        self.name, self.numbers = name, torch.as_tensor(numbers)
        self.labels = self.numbers % CLASSES

    def __len__(self):
        return len(self.numbers)

    def batches(self, batch_size, *, seed=None, drop_last=False, view=None, shard=WHOLE):
        for some in torch.arange(len(self)).split(batch_size):
            inputs = torch.stack([self.numbers[some], self.labels[some]], 1).float()
            yield Batch((inputs,), self.labels[some], some)

    def take(self, indices):
        return Numbered(self.name, self.numbers[torch.as_tensor(indices)])


class Bench:
    """A stage that gets as many samples wrong as a test says, and a source that gets all right."""

    def __init__(self, folder):
        (folder / "table.py").write_text(TABLE)
        self.folder, self.factory = folder, f"{folder / 'table.py'}:Table"
        self.data = DecisionData(
            tuple("abcd"), (Input("x", (2,)),), Numbered("train", range(8)), Numbered("validation", range(SAMPLES))
        )
        self.source = self.keep("source", self.model())
        self.tried, self.seen, self.recorder = [], set(), Recorder()

    def model(self, wrong=()):
        model = create(Arch(self.factory, {}), seed=0)
        with torch.no_grad():
            model.wrong.zero_()
            model.wrong[list(wrong)] = 1
        return model

    def keep(self, name, model):
        history = (HistoryEntry(stage="source", parent=None, settings={}, seconds=0.0),)
        draft, data = Draft(Arch(self.factory, {}), (), model), self.data
        checkpoints.save(
            self.folder / name, draft, inputs=data.inputs, classes=data.classes, history=history, key={"name": name}
        )
        return checkpoints.load(self.folder / name)

    def stage(self, losses, *, unseen=None, idle=lambda value: False, dies_at=None):
        """A stage that gets `losses(value)` samples wrong of the half it sees, and `unseen(value)` of the other."""
        unseen = unseen or losses

        def made(parent, config, context):
            value = config.target.settings
            self.tried.append(value)
            if value == dies_at:
                raise KilledError
            seen = set(context.data.validation.numbers.tolist())
            self.seen |= seen
            others = set(range(len(self.data.validation))) - seen
            context.note(f"made at {value}")
            context.warn(f"beware of {value}")
            (context.scratch / "state").mkdir(parents=True)
            if idle(value):
                return Draft(parent.arch, parent.edits, self.model())
            wrong = [*sorted(seen)[: losses(value)], *sorted(others)[: unseen(value)]]
            edits = (*parent.edits, Attribute(module="", name="removed", value=round(1000 * value)))
            model = self.model(wrong)
            model.removed = edits[-1].value
            return Draft(parent.arch, edits, model, training=({"epoch": 1, "seconds": value},))

        return made

    def search(self, stage, *, kind="prune", target=None, group=ALONE, parent=None, **budget):
        """What a guarded stage hands back, and its context."""
        settings = {"target": target or {"macs": 0.2}, "budget": {"accuracy_drop": 5.0, **budget}}
        config = STAGE_CONFIGS[kind].model_validate_json(json.dumps(settings))
        context = Context(
            data=self.data,
            reference=self.source,
            device="cpu",
            threads=1,
            seed=0,
            scratch=self.folder / "scratch",
            progress=self.recorder,
            trusted=frozenset({self.factory}),
            group=group,
        )
        return guarded(stage)(parent or self.source, config, context), context


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def linear(value):
    """20 points at 0, none at 1."""
    return round(20 * (1 - value))


def wrong_in(draft):
    return set(draft.model.wrong.nonzero().flatten().tolist())


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_a_target_within_the_budget_takes_one_trial(bench):
    draft, context = bench.search(bench.stage(lambda value: 5))
    assert bench.tried == [0.2]
    assert draft.edits[-1].value == draft.model.removed == 200
    assert len(bench.seen) == 100
    notes = "\n".join(context.notes)
    assert "budget: 5 points of accuracy against the input of this stage; 100 validation samples" in notes
    assert re.search(r"macs 0\.2: 5\.00 points lost \[.+, .+\] on 100 samples: within the budget", notes)
    assert re.search(
        r"chosen: macs 0\.2: 5\.00 points .* that chose it, 5\.00 points .* on 100 samples that did not", notes
    )


@pytest.mark.parametrize(
    ("kind", "target", "losses", "limit"),
    [
        ("prune", {"macs": 0.2}, linear, 0.725),
        ("prune", {"parameters": 0.2}, linear, 0.725),
        ("prune", {"ratio": 0.8}, lambda value: linear(1 - value), 0.275),
        ("factorize", {"ratio": 0.2}, linear, 0.725),
        ("factorize", {"energy": 0.2}, linear, 0.725),
    ],
)
def test_the_strongest_that_keeps_within_is_found_in_either_direction(bench, kind, target, losses, limit):
    draft, context = bench.search(bench.stage(losses), kind=kind, target=target, trials=8)
    chosen = draft.edits[-1].value / 1000
    assert losses(chosen) == 5
    assert chosen == pytest.approx(limit, abs=0.8 / 2**7 + 0.002)
    assert len(bench.tried) == 8
    assert bench.tried == [round(value, 3) for value in bench.tried]
    ((name, asked),) = target.items()
    (told,) = [note for note in context.notes if note.startswith("chosen: ")]
    assert told.startswith(f"chosen: {name} {chosen:g} instead of {asked}: 5.00 points lost")


def test_the_result_is_that_of_the_trial_and_says_what_the_trial_said(bench):
    draft, context = bench.search(bench.stage(linear), trials=3)
    chosen = draft.edits[-1].value / 1000
    assert bench.tried == [0.2, 0.6, 0.8]
    assert chosen == 0.8
    assert draft.training == ({"epoch": 1, "seconds": 0.8},)
    assert context.notes[-1] == "made at 0.8"
    assert context.warnings == ["beware of 0.8"]
    assert bench.recorder.warnings == ["beware of 0.2", "beware of 0.6", "beware of 0.8"]
    assert len(wrong_in(draft)) == 8


def test_the_stage_alone_makes_the_same_as_the_search_that_chose_it(workshop, trained):
    settings = {"recovery": None, "batchnorm_samples": 0}
    budget = {"accuracy_drop": 8.0, "trials": 3}
    draft, context = workshop.draft(trained, "prune", target={"macs": 0.55}, multiple=2, budget=budget, **settings)
    (told,) = [note for note in context.notes if note.startswith("chosen: ")]
    value = float(re.match(r"chosen: macs ([\d.]+)", told)[1])
    assert 0.55 < value < 1
    alone, _ = workshop.draft(trained, "prune", target={"macs": value}, multiple=2, **settings)
    assert draft.edits == alone.edits
    assert draft.edits
    state = alone.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in draft.model.state_dict().items())


def test_recovery_in_a_trial_is_validated_on_the_half_that_searches(workshop, trained):
    recovery = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}
    budget = {"accuracy_drop": 100.0}
    draft, _ = workshop.draft(trained, "factorize", target={"ratio": 0.3}, multiple=1, recovery=recovery, budget=budget)
    (row,) = draft.training
    validation = workshop.dataset.validation
    half = validation.take(halves(validation.labels, derive_seed(0, "guard"))[0])
    _, correct = evaluate(draft.model, half, "cpu")
    assert row["validation_percent"] == pytest.approx(100 * correct / 48)
    assert draft.edits


# --- the other half --------------------------------------------------------------------------------------------------


def test_what_the_other_half_refuses_gives_way_to_a_weaker_setting(bench):
    draft, context = bench.search(bench.stage(linear, unseen=lambda value: 30 if value < 0.78 else 2), trials=6)
    chosen = draft.edits[-1].value / 1000
    passed = [value for value in bench.tried if linear(value) <= 5]
    assert chosen == min(value for value in passed if value >= 0.78) > min(passed)
    refusals = [note for note in context.notes if "does not hold on the other half" in note]
    assert len(refusals) == sum(value < 0.78 for value in passed) > 0
    assert "30.00 points lost" in refusals[0]
    assert any(note.startswith(f"chosen: macs {chosen:g} instead of 0.2: ") for note in context.notes)


def test_where_the_other_half_refuses_all_the_message_names_what_would_do(bench):
    with pytest.raises(StageError) as caught:
        bench.search(bench.stage(linear, unseen=lambda value: 12), trials=4)
    told = str(caught.value)
    assert told.startswith("budget.accuracy_drop: of all settings tried none keeps within 5 points of the input")
    assert "only the untouched model does" in told
    assert "an accuracy_drop of 12 would allow macs 0.8; or" in told
    assert "but 12.00 points lost" in told


# --- refusals --------------------------------------------------------------------------------------------------------


def test_where_nothing_keeps_within_the_message_tells_all_that_was_tried(bench):
    with pytest.raises(StageError) as caught:
        bench.search(bench.stage(lambda value: 7 + linear(value)), trials=3)
    told = str(caught.value)
    assert bench.tried == [0.2, 0.6, 0.8]
    for value, points in zip(bench.tried, (23, 15, 11), strict=True):
        assert f"macs {value}: {points}.00 points lost" in told
    assert "an accuracy_drop of 11 would allow macs 0.8 on the half that searches; or allow more trials" in told
    draft, _ = bench.search(bench.stage(lambda value: 7 + linear(value)), trials=3, accuracy_drop=11.0)
    assert draft.edits[-1].value == 800


def test_what_removes_nothing_is_no_answer(bench):
    stage = bench.stage(lambda value: 9, idle=lambda value: value > 0.5)
    with pytest.raises(StageError, match=r"macs 0\.2: 9\.00 points.*macs 0\.6 removes nothing"):
        bench.search(stage, trials=4)


def test_a_target_that_removes_nothing_is_left_to_the_stage(bench):
    draft, context = bench.search(bench.stage(linear, idle=lambda value: True))
    assert draft.edits == ()
    assert bench.tried == [0.2]
    assert context.warnings == ["beware of 0.2"]


def test_a_bound_is_stricter_than_the_estimate(bench):
    stage = bench.stage(linear)
    by_estimate, _ = bench.search(stage, trials=8)
    by_bound, context = bench.search(stage, trials=8, confidence=0.95)
    assert by_bound.edits[-1].value > by_estimate.edits[-1].value
    assert "with 95 % confidence" in context.notes[0]
    (chosen,) = [note for note in context.notes if note.startswith("chosen: ")]
    bounds = [float(bound) for bound in re.findall(r"at most ([\d.]+),", chosen)]
    assert len(bounds) == 2
    assert max(bounds) <= 5


def test_what_so_few_samples_cannot_show_is_refused_before_any_trial(bench):
    with pytest.raises(StageError) as caught:
        bench.search(bench.stage(linear), accuracy_drop=1.0, confidence=0.95)
    least = float(re.search(r"accuracy_drop ([\d.]+) or more", str(caught.value))[1])
    assert str(caught.value).startswith("budget.confidence: must be lower, or")
    assert bench.tried == []
    assert 1 < least < 3
    draft, _ = bench.search(bench.stage(lambda value: 0), accuracy_drop=least, confidence=0.95)
    assert draft.edits


def test_one_sample_cannot_be_halved(bench):
    bench.data = replace(bench.data, validation=Numbered("validation", [3]))
    with pytest.raises(StageError, match="budget: one half of validation searches and the other checks"):
        bench.search(bench.stage(linear))


def test_against_the_source_what_was_lost_before_counts(bench):
    half = bench.keep("half", bench.model(range(8)))
    stage = bench.stage(lambda value: 8)
    _, context = bench.search(stage, parent=half, accuracy_drop=8.0, against="source")
    assert "8 points of accuracy against the source" in context.notes[0]
    with pytest.raises(StageError, match=r"accuracy_drop: must be \d or more, got 0\.5: what comes into this stage"):
        bench.search(stage, parent=half, accuracy_drop=0.5, against="source")


def test_seven_of_a_hundred_are_seven_points():
    standard, other = torch.ones(100, dtype=torch.bool).numpy(), (torch.arange(100) >= 7).numpy()
    assert lost(standard, other, None).decisive == 7.0
    assert lost(other, standard, None).points == -7.0


# --- killed, and several processes -----------------------------------------------------------------------------------


def test_a_killed_search_makes_only_what_was_not_finished(bench, tmp_path):
    with pytest.raises(KilledError):
        bench.search(bench.stage(linear, dies_at=0.8), trials=4)
    assert bench.tried == [0.2, 0.6, 0.8]
    bench.tried.clear()
    draft, context = bench.search(bench.stage(linear), trials=4)
    assert bench.tried == [0.8, 0.7]
    (tmp_path / "other").mkdir()
    other = Bench(tmp_path / "other")
    whole, undisturbed = other.search(other.stage(linear), trials=4)
    assert context.notes == undisturbed.notes
    assert context.warnings == undisturbed.warnings
    assert draft.edits == whole.edits
    assert wrong_in(draft) == wrong_in(whole)


def test_a_search_killed_in_a_training_goes_on_in_it_and_ends_at_the_same_bits(workshop, trained):
    training = {"epochs": 2, "batch_size": 32, "learning_rate": 0.02}
    settings = {"target": {"ratio": 0.2}, "multiple": 1, "min_saving": 0.05, "recovery": training}
    settings["budget"] = {"accuracy_drop": 60.0, "trials": 2}

    def searched(progress):
        return workshop.draft(trained, "factorize", progress=progress, **settings)

    def dies(result):
        if len(recorder.epochs) == 1:
            raise KilledError

    recorder = Recorder(dies)
    with pytest.raises(KilledError):
        searched(recorder)
    resumed = Recorder()
    draft, context = searched(resumed)
    assert "goes on after epoch 1 of 2" in resumed.notes
    assert [result.epoch for result in resumed.epochs] == [2]
    shutil.rmtree(workshop.folder / "scratch")
    whole, undisturbed = searched(Recorder())
    assert draft.edits == whole.edits
    assert [note for note in context.notes if "goes on" not in note] == undisturbed.notes
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in draft.model.state_dict().items())


def test_a_damaged_trial_is_made_again(bench):
    bench.search(bench.stage(linear), trials=3)
    weights = bench.folder / "scratch" / "trials" / "macs-0.6" / "result" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    bench.tried.clear()
    bench.search(bench.stage(linear), trials=3)
    assert bench.tried == [0.6]


class Leader(Group):
    """Remembers what it says, for one that comes later."""

    def __init__(self):
        super().__init__(Shard(0, 2))
        self.said = []

    def told(self, value=None):
        self.said.append(json.dumps(value))
        return value

    def meet(self):
        """The others come later."""


class Follower(Group):
    """Hears what a leader said."""

    def __init__(self, leader):
        super().__init__(Shard(1, 2))
        self.heard = iter(leader.said)

    def told(self, value=None):
        return json.loads(next(self.heard))

    def meet(self):
        """The leader has been here."""


def test_a_trial_that_diverges_is_one_that_lost_too_much(bench):
    made = bench.stage(linear)

    def stage(parent, config, context):
        if config.target.settings < 0.5:
            raise DivergedError("recovery: the loss went astray in epoch 2")
        return made(parent, config, context)

    draft, context = bench.search(stage, trials=5)
    assert any("the loss went astray in epoch 2: too much" in note for note in context.notes)
    assert any(note.startswith("chosen: ") for note in context.notes)
    assert draft.edits


def test_all_processes_make_the_trials_of_the_leader_and_end_with_its_model(bench):
    leader = Leader()
    first, _ = bench.search(bench.stage(linear), trials=5, group=leader)
    trials = list(bench.tried)
    bench.tried.clear()
    follower = Follower(leader)
    # What this process would have measured itself does not count.
    second, _ = bench.search(bench.stage(lambda value: 50), trials=5, group=follower)
    assert bench.tried == trials
    assert next(follower.heard, None) is None
    assert second.edits == first.edits
    assert wrong_in(second) == wrong_in(first)


def test_processes_make_no_trial_that_the_leader_finds_made(bench):
    first, _ = bench.search(bench.stage(linear), trials=5)
    bench.tried.clear()
    leader = Leader()
    bench.search(bench.stage(linear), trials=5, group=leader)
    second, _ = bench.search(bench.stage(linear), trials=5, group=Follower(leader))
    assert bench.tried == []
    assert second.edits == first.edits


# --- settings, plan and whole pipelines ------------------------------------------------------------------------------


def test_every_target_knows_what_would_change_nothing():
    surgery = {name: kind for name, kind in STAGE_CONFIGS.items() if issubclass(kind, SurgeryConfig)}
    assert set(surgery) == {"prune", "factorize"}
    for kind in surgery.values():
        target = type(kind().target)
        assert set(target.nothing) == set(target.model_fields)


def pruning(tiny, folder, trained, **budget):
    """A pipeline that prunes the trained model."""
    settings = {"target": {"macs": 0.3}, "multiple": 2, "recovery": None, "budget": {"trials": 2, **budget}}
    model = {"factory": tiny.factory, "weights": str(trained.path / "model.safetensors")}
    return tiny.pipeline(folder, {"prune": settings}, model=model)


def test_a_pipeline_keeps_what_was_asked_and_what_was_chosen(tiny, tmp_path, trained):
    pipeline = pruning(tiny, tmp_path, trained, accuracy_drop=15.0)
    before, row = run(pipeline, runs=tmp_path / "runs").rows
    (folder,) = (tmp_path / "runs" / "tiny").glob("01-prune-*")
    entry = checkpoints.load(folder, {tiny.factory}).history[-1]
    assert entry.settings["target"] == {"macs": 0.3}
    assert entry.settings["budget"] == {"accuracy_drop": 15.0, "trials": 2, "against": "input"}
    (told,) = [note for note in entry.notes if note.startswith("chosen: ")]
    chosen = float(re.match(r"chosen: macs ([\d.]+) instead of 0.3", told)[1])
    assert row.macs / before.macs == pytest.approx(chosen, abs=0.06)
    assert not (tmp_path / "runs" / "tiny" / ".work").exists()
    assert [step.status for step in make_plan(pipeline, tmp_path / "runs")] == ["cached"] * 2
    step = make_plan(pruning(tiny, tmp_path, trained, accuracy_drop=10.0), tmp_path / "runs")[-1]
    assert (step.status, step.reason) == ("run", "changed: settings.budget.accuracy_drop: 15.0 → 10.0")


def test_a_budget_that_cannot_be_kept_names_its_line(tiny, tmp_path, trained):
    pipeline = pruning(tiny, tmp_path, trained, accuracy_drop=0.5, confidence=0.99)
    with pytest.raises(StageError) as caught:
        run(pipeline, runs=tmp_path / "runs")
    told = str(caught.value)
    assert re.match(r"\S*pipeline\.yaml:\d+: (stages\.0\.)?prune\.budget\.confidence: must be lower", told)


def test_only_a_guarded_stage_depends_on_the_guard(tiny, tmp_path):
    keys = {}
    for budget in (None, {"accuracy_drop": 1.0}):
        pipeline = tiny.pipeline(tmp_path, {"prune": {"budget": budget}})
        planned = planned_stages(pipeline)[1]
        keys[budget is None] = Keys(pipeline).stage(planned, None, None, None)
    assert "guard" not in keys[True]
    assert keys[False]["guard"]["code"] == code_digest("compress.stages.guard")
    assert keys[False]["code"] == keys[True]["code"]
