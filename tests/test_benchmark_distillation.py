"""The table of all distillation methods: trained by the stage itself, never twice, and told as it was measured."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from conftest import write_arrays
from test_shipped_pipelines import patterns

from compress import load_pipeline
from compress.config import LossEntry, imitates
from compress.errors import CompressError
from compress.models.factory import Arch, create

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import distillation  # noqa: E402
import distillation_table  # noqa: E402
from distillation_methods import METHODS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ["none", "kd", "hint", "ensemble"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Few tiny images, and random numbers for published weights."""
    from safetensors.torch import save_file

    root, shape = tmp_path_factory.mktemp("distillation"), (8, 8, 3)
    write_arrays(root / "data", train=patterns(10, 6, shape), test=patterns(10, 3, shape))
    save_file(create(Arch("cifar:resnet56"), seed=1).state_dict(), root / "cifar10_resnet56.safetensors")
    save_file(create(Arch("cifar:resnet20"), seed=2).state_dict(), root / "cifar10_resnet20.safetensors")
    return root


def command(place, out, *more):
    given = {
        "data": place / "data",
        "weights": place,
        "epochs": 1,
        "validation": 20,
        "batch-size": 20,
        "threads": 1,
        "device": "cpu",
        "runs": place / "runs",
        "out": place / out,
    }
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *map(str, more)]


@pytest.fixture(scope="module")
def measured(place):
    """What the command writes for four methods, and a second seed for two of them."""
    distillation.main(command(place, "table.json", "--methods", *FEW, "--seeds", 0))
    distillation.main(command(place, "table.json", "--methods", "none", "kd", "--seeds", 0, 1))
    return json.loads((place / "table.json").read_bytes())


def test_every_training_is_there_once(measured):
    places = [(record["seed"], record["method"]) for record in measured["records"]]
    assert places == [(0, "none"), (0, "kd"), (0, "hint"), (0, "ensemble"), (1, "none"), (1, "kd")]
    for record in measured["records"]:
        assert record["train_samples"] == 40
        assert record["test_samples"] == 30
        assert record["parameters"] == 269_722
        assert 0 <= record["test_percent"] <= 100
        assert (record["test_percent"] * 30 / 100) == pytest.approx(round(record["test_percent"] * 30 / 100))


def test_the_teacher_answers_before_the_trainings_and_once(measured, place):
    waited = {record["method"]: record["views_computed"] for record in measured["records"]}
    assert waited == {"none": 0, "kd": 0, "hint": 0, "ensemble": 1}  # the second teacher's
    assert measured["seconds_per_view"] > 0
    assert len(list((place / "runs" / "teacher").iterdir())) == 3  # two seeds, and the second teacher


def test_nothing_names_this_machines_folders(measured, place):
    assert str(place) not in json.dumps(measured)
    assert "--data data" in measured["command"]


def test_what_is_done_is_not_done_again(measured, place, capsys):
    before = (place / "table.json").read_bytes()
    distillation.main(command(place, "table.json", "--methods", *FEW, "--seeds", 0))
    assert (place / "table.json").read_bytes() == before
    assert "epoch" not in capsys.readouterr().out.partition("ResNet-20")[0]


def test_a_lost_training_comes_back_the_same(measured, place, capsys):
    lost, others = measured["records"][1], [*measured["records"][:1], *measured["records"][2:]]
    (place / "again.json").write_text(json.dumps({**measured, "records": others}))
    distillation.main(command(place, "again.json", "--methods", *FEW, "--seeds", 0))
    again = json.loads((place / "again.json").read_bytes())["records"]
    assert len(again) == len(measured["records"])
    told = ("test_percent", "validation_percent", "last_validation_percent", "best_epoch", "code")
    assert {name: again[1][name] for name in told} == {name: lost[name] for name in told}
    assert capsys.readouterr().out.count(" epoch 1/1 ") == 1


def test_a_training_with_other_settings_of_its_method_is_done_again(measured, place, monkeypatch):
    table = distillation.Table(place / "table.json", budget(place), "")
    assert table.holds("kd", 0)
    assert not table.holds("kd", 2)
    changed = distillation.METHODS["kd_sum"]
    monkeypatch.setitem(distillation.METHODS, "kd", changed)
    assert not table.holds("kd", 0)


def budget(place, **changes):
    parsed = distillation._arguments(command(place, "table.json"))
    shared = {name: getattr(parsed, name) for name in distillation.Budget.__dataclass_fields__}
    return distillation.Budget(**{**shared, "views": 1, **changes})


@pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("learning_rate", 0.5), ("per_class", 3), ("views", 4)])
def test_another_budget_needs_another_file(name, value, measured, place):
    with pytest.raises(
        CompressError, match=rf"holds trainings with {name} \S+, this one has {value}; name another file"
    ):
        distillation.Table(place / "table.json", budget(place, **{name: value}), "")


def test_a_method_that_fails_is_a_row_with_the_reason(place, monkeypatch, capsys):
    losses = [{"labels": {}}, {"hint": {"layers": {"layer9": "layer2"}}}]
    method = dataclasses.replace(METHODS["hint"], stage={"losses": losses})
    monkeypatch.setitem(distillation.METHODS, "hint", method)
    distillation.main(command(place, "broken.json", "--methods", "hint", "--seeds", 0))
    (record,) = json.loads((place / "broken.json").read_bytes())["records"]
    assert "layer9" in record["failed"]
    assert "- `hint`, seed 0: " in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_stage(method, place):
    stage = budget(place).pipeline(method, 0).stages[0].settings
    assert stage.epochs == 1
    asks = any(imitates(entry, "teacher") for entry in stage.losses)
    compares = any(entry.settings.reads == "features" for entry in stage.losses)
    assert (stage.cache is not None) == (asks and not compares and not stage.mixup and not stage.cutmix)


def test_every_loss_is_in_the_table(place):
    used = {entry.kind for name in METHODS for entry in budget(place).pipeline(name, 0).stages[0].settings.losses}
    assert used == set(LossEntry.model_fields)


def test_the_methods_of_one_seed_begin_alike_and_seeds_differ(place):
    from compress.plan import planned_stages

    seeds = {
        (name, seed): planned_stages(budget(place).pipeline(name, seed))[1].seed for name in METHODS for seed in (0, 1)
    }
    assert len({seeds[name, 0] for name in METHODS}) == 1
    assert seeds["kd", 0] != seeds["kd", 1]


def test_the_pipeline_of_a_training_is_one_that_a_user_could_write(place, tmp_path):
    made = budget(place).pipeline("share_schedule", 0)
    path = tmp_path / "p.yaml"
    path.write_text(made.model_dump_json(by_alias=True, exclude_unset=True))
    assert load_pipeline(path) == made


# --- the table ---------------------------------------------------------------------------------------------------------


def record(method, seed, test, **more):
    given = {"method": method, "seed": seed, "test_percent": test, "validation_percent": test + 1, "epoch_seconds": 2.5}
    return {**given, "views_computed": 0, "code": "a", "train_samples": 45_000, "test_samples": 10_000, **more}


def found(*records, **changes):
    shared = {
        "epochs": 30,
        "batch_size": 128,
        "learning_rate": 0.1,
        "precision": "bf16",
        "validation": 5000,
        "views": 30,
    }
    return {
        "machine": {"versions": {"torch": "2.15.0"}},
        "budget": {**shared, "device": "a CPU", "threads": 2, **changes},
        "seconds_per_view": 12.0,
        "records": list(records),
    }


def test_the_interval_is_students():
    told = distillation_table.Estimate.of([90.0, 91.0, 95.0])
    half = 4.302652729911275 * math.sqrt(7.0) / math.sqrt(3)  # t(0.975, 2 degrees of freedom); variance 7
    assert (told.mean, told.low, told.high) == pytest.approx((92.0, 92.0 - half, 92.0 + half))
    assert distillation_table.Estimate.of([90.0]) == distillation_table.Estimate(90.0, None, None, 1)


def test_differences_are_taken_seed_by_seed():
    # Seeds differ by ten points, methods by one: only pairs can tell.
    records = [record("none", seed, 70 + 10 * seed) for seed in range(3)]
    records += [record("kd", seed, 71 + 10 * seed) for seed in (0, 2)]
    told = distillation_table.difference(records, "kd", "none")
    assert (told.mean, told.low, told.high, told.n) == (1.0, 1.0, 1.0, 2)
    assert distillation_table.difference(records, "dkd", "none") is None
    assert distillation_table.difference(records, "none", "none") is None


def test_the_table_has_a_row_for_each_method_that_was_measured():
    records = [record("none", 0, 90.0), record("none", 1, 91.0), record("kd", 0, 91.0), record("kd", 1, 92.5)]
    records += [record("ensemble", 0, 92.0, views_computed=3), {"method": "hint", "seed": 0, "failed": "no such layer"}]
    lines = distillation_table.markdown(found(*records)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0] for row in rows] == ["`none`", "`kd`", "`ensemble`"]
    assert rows[0][2:] == ["90.50 [84.15, 96.85]", "–", "-1.25 [-4.43, +1.93]", "91.50", "2", "2.5"]
    assert rows[1][3:5] == ["+1.25 [-1.93, +4.43]", "–"]
    assert rows[2][2:5] == ["92.00", "+2.00", "+1.00"]
    assert rows[2][-1] == "2.5 †"
    assert lines[-1] == "- `hint`, seed 0: no such layer"
    assert "45,000 training and 10,000 test images" in lines[0]
    assert "12.0 s for each of 30 views" in "".join(lines)


def test_fewer_views_than_epochs_are_told():
    assert "see 5 augmented versions" in distillation_table.markdown(found(record("kd", 0, 90.0), views=5))
    assert "augmented versions" not in distillation_table.markdown(found(record("kd", 0, 90.0)))


CARD = "# A method\n\n<!-- measured: kd dkd -->\nwhatever stood here\n<!-- end -->\n\nmore\n"


def test_a_card_gets_what_was_measured_and_nothing_else_changes(tmp_path):
    (tmp_path / "a.md").write_text(CARD)
    distillation_table.write_cards(tmp_path, found(record("none", 0, 90.0), record("kd", 0, 91.0)))
    expected = "- 0.9 KD + 0.1 CE, T = 4: 91.00 % of test (1 seed), +1.00 points over labels only\n"
    assert (tmp_path / "a.md").read_text() == CARD.replace("whatever stood here\n", expected)
    distillation_table.write_cards(tmp_path, None)
    assert (tmp_path / "a.md").read_text() == CARD.replace("whatever stood here", "not measured yet")
