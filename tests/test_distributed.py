"""Several processes train one model: as one process would, with one of them writing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, FAILING, OWN_STATISTICS, train
from safetensors.torch import load_file
from training_cases import Recorder

from compress import load_checkpoint, load_pipeline, run
from compress.distributed import ALONE
from compress.results import load_results

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parent


def launch(*command, cwd=None, processes=2, **environment):
    """Run a program in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    found |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=120, cwd=cwd, env=found, check=False
    )


@pytest.fixture(scope="module")
def augmented(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmented")
    return tiny.pipeline(folder, data={**tiny.data, "augment": {"crop": 1, "flip": True}})


@pytest.fixture(scope="module")
def together(augmented, tmp_path_factory):
    """The folder in which two processes left what each of them ended with."""
    folder = tmp_path_factory.mktemp("together")
    path = folder / "pipeline.json"
    path.write_text(json.dumps(augmented.model_dump(mode="json", by_alias=True)))
    done = launch(TESTS / "distributed_cases.py", path, folder)
    assert done.returncode == 0, done.stderr
    return folder


def ended(folder, name, rank):
    weights = load_file(folder / f"{name}-{rank}.safetensors")
    return weights, json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(name, together, augmented, tmp_path):
    weights, rows, _ = train(CASES[name], augmented, tmp_path)
    found, told = ended(together, name, 0)
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert len(told["rows"]) == len(rows)
    for own, one in zip(told["rows"], rows, strict=True):
        assert own == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [*CASES, *OWN_STATISTICS])
def test_processes_end_with_the_same_weights_to_the_bit(name, together):
    first, second = (ended(together, name, rank) for rank in (0, 1))
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0].keys() | second[0].keys())
    assert first[1]["rows"] == second[1]["rows"]


@pytest.mark.parametrize("name", ["killed", "unlike"])
def test_a_killed_training_goes_on_in_all_processes(name, together):
    for rank in (0, 1):
        assert "goes on after epoch 1 of 3" in ended(together, name, rank)[1]["notes"]


@pytest.mark.slow
def test_three_processes_go_on_at_the_same_bits(together):
    # More than two add up in an order that depends on where a gradient stands among those that are sent together.
    folder = together / "three"
    folder.mkdir()
    script = (TESTS / "distributed_cases.py", together / "pipeline.json", folder)
    done = launch(*script, "average", "killed", processes=3)
    assert done.returncode == 0, done.stderr
    whole, killed = (ended(folder, name, 0) for name in ("average", "killed"))
    assert "goes on after epoch 1 of 3" in killed[1]["notes"]
    assert all(torch.equal(whole[0][key], killed[0][key]) for key in whole[0])


def test_each_process_draws_for_itself(together):
    first, second = (ended(together, "draws", rank)[1]["notes"] for rank in (0, 1))
    assert first
    assert set(first).isdisjoint(second)


def test_only_the_first_process_asks_the_teacher(together):
    answers = [ended(together, "cached", rank)[1]["notes"] for rank in (0, 1)]
    assert [sum("the teacher's answers take" in note for note in notes) for notes in answers] == [1, 0]


def failures(together, name):
    return [
        (together / f"{name}-{rank}.txt").read_text() for rank in (0, 1) if (together / f"{name}-{rank}.txt").exists()
    ]


def test_all_processes_notice_a_training_that_goes_astray(together):
    first, second = failures(together, "astray")
    assert first == second
    assert "epoch 1" in first
    assert "learning_rate" in first


def test_a_batch_has_two_samples_for_each_process(together):
    for text in failures(together, "too_many"):
        assert text == "batch_size: 3 samples are too few for 2 processes, each needs two or more"


def test_a_process_that_begins_elsewhere_says_so(together):
    first, second = failures(together, "strangers")
    assert first == "the connection to another process is lost, its own message says why"
    assert second.startswith("process 1 of 2 cannot train along: the weights to begin with is not")


def test_every_case_was_run(together):
    assert {path.stem for path in together.glob("*-?.*")} >= {
        f"{name}-1" for name in [*CASES, *OWN_STATISTICS, *FAILING]
    }


def test_one_process_alone_is_a_group(tmp_path):
    assert ALONE.leads
    assert ALONE.told({"a": [1, None]}) == {"a": [1, None]}
    assert ALONE.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    ALONE.check_alike({"anything": "at all"})


# The command


@pytest.fixture
def project(tiny, tmp_path):
    (tmp_path / "one").mkdir()
    small = {"factory": tiny.factory, "kwargs": {"width": 8}}
    training = {"epochs": 2, "batch_size": 16, "batchnorm": "frozen", "precision": "fp32"}
    return tiny.pipeline(
        tmp_path,
        {"train": training},
        {"distill": {"student": small, "cache": {"views": 1}, **training}},
        {"prune": {"target": {"macs": 0.7}, "recovery": training}},
        {"quantize": {"calibration": {"samples": 16}}},
        {"export": {"agreement": 0.5}},
    )


def test_a_pipeline_in_two_processes_ends_as_in_one(project, tmp_path):
    done = launch("-m", "compress", "run", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill done") == 1
    two = load_results(tmp_path / "runs" / "tiny" / "results.json")
    one = run(project, runs=tmp_path / "one", progress=Recorder())
    assert [row.stage for row in two.rows] == [row.stage for row in one.rows]
    for ours, alone in zip(two.rows, one.rows, strict=True):
        assert ours.parameters == alone.parameters
        assert ours.accuracy.test.percent == pytest.approx(alone.accuracy.test.percent, abs=2.5)
    assert two.command == "torchrun --nproc-per-node 2 -m compress run pipeline.yaml"
    assert (tmp_path / "runs" / "tiny" / "dist" / two.artifact.model).is_file()


MORTAL = {"epochs": 3, "batch_size": 16, "batchnorm": "frozen"}
CUTS = {"target": {"macs": 0.6}, "schedule": {"iterative": {"steps": 2, "epochs": 1}}, "recovery": MORTAL}


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(tiny, tmp_path):
    found = {}
    # An epoch has 10 steps, and each training looks at two batches before it begins. After each restart the count begins anew:
    # the first one dies in the training, the second one in the recovery after the last cut.
    for place, deaths in (("whole", []), ("killed", [15, 30])):
        folder = tmp_path / place
        folder.mkdir()
        tiny.pipeline(folder, {"train": MORTAL}, {"prune": CUTS}, model={"factory": tiny.named("mortal")})
        said = []
        for at in [*deaths, 0]:
            done = launch("-m", "compress", "run", "pipeline.yaml", cwd=folder, **({"DIE_AT": str(at)} if at else {}))
            assert (done.returncode == 0) == (at == 0), done.stderr
            said.append(done.stdout)
        found[place] = load_results(folder / "runs" / "tiny" / "results.json").rows[-1].digest
    assert found["whole"] == found["killed"]
    again = launch("-m", "compress", "run", "pipeline.yaml", cwd=tmp_path / "killed")
    assert again.stdout.count("cached") == 3, again.stderr
    assert "goes on after epoch 1 of 3" in said[1]
    assert "goes on after part 1 of 2 of pruning" in said[2]


@pytest.mark.slow
def test_stages_with_a_budget_are_searched_together_or_by_the_first_process_alone(tiny, tmp_path, trained):
    training = {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01}
    budget = {"accuracy_drop": 60.0, "trials": 2}
    pruned = {"target": {"macs": 0.1}, "multiple": 2, "recovery": training, "budget": budget}
    split = {
        "target": {"ratio": 0.2},
        "multiple": 1,
        "min_saving": 0.05,
        "faster_by": 0.0,
        "recovery": None,
        "budget": budget,
    }
    model = {"factory": tiny.factory, "weights": str(trained.path / "model.safetensors")}
    tiny.pipeline(tmp_path, {"prune": pruned}, {"factorize": split}, {"train": training}, model=model)
    done = launch("-m", "compress", "run", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = load_results(tmp_path / "runs" / "tiny" / "results.json").rows
    assert [row.stage for row in rows] == ["source", "prune", "factorize", "train"]
    for name in ("01-prune", "02-factorize"):
        (folder,) = (tmp_path / "runs" / "tiny").glob(f"{name}-*")
        notes = load_checkpoint(folder).history[-1].notes
        assert any(note.startswith("chosen: ") for note in notes)


def test_errors_name_the_process_and_other_commands_stay_alone(project, tmp_path):
    done = launch("-m", "compress", "validate", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode != 0
    # The launcher ends the others as soon as one has ended; which is first is chance.
    said = r"error \(process [01]\): compress validate is for one process: start it without a launcher"
    assert re.search(said, done.stderr)
    assert load_pipeline(tmp_path / "pipeline.yaml").name == "tiny"
