"""Distillation end to end: every form that a pipeline file can have, who is kept, and what is said before anything runs."""

import json
import sys

import pytest
import torch
from conftest import MODEL
from training_cases import Recorder

from compress import cli, run
from compress.config import LossEntry, TrainingConfig
from compress.errors import ConfigError, ModelError
from compress.events import Silent
from compress.models.factory import Arch, create
from compress.plan import Keys, make_plan, planned_stages
from compress.training import Objective, Workplace, evaluate, fit

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "precision": "fp32"}
LAYERS = {"conv1": "conv1", "conv3": "conv3"}


@pytest.fixture
def student(tiny):
    return {"factory": tiny.factory, "kwargs": {"width": 8}}


@pytest.fixture
def weights(tiny, tmp_path):
    """A file of weights for the default network."""
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file(create(Arch(tiny.factory), seed=5).state_dict(), path)
    return path


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Every form


CHANGING = {"start": 8, "end": 2, "shape": "cosine"}
FORMS = {
    "labels alone": {"losses": [{"labels": {"smoothing": 0.1}}]},
    "lambda": {"losses": [{"kd": {"weight": 0.5}}, {"labels": {"weight": 1}}]},
    "alpha": {"losses": [{"kd": {"weight": 1}}, {"labels": {"weight": 1}}], "teacher_share": 0.7},
    "share that falls": {
        "losses": [{"kd": {}}, {"labels": {}}],
        "teacher_share": {"start": 0.9, "end": 0.1, "shape": "cosine"},
    },
    "temperature that falls": {"losses": [{"kd": {"temperature": CHANGING}}, {"labels": {}}]},
    "cross-entropy": {"losses": [{"kd": {"divergence": "cross_entropy"}}]},
    "standardized": {"losses": [{"kd": {"standardize": True, "temperature": 2}}, {"labels": {}}]},
    "hard labels": {"losses": [{"teacher_labels": {"smoothing": 0.1}}, {"labels": {}}]},
    "logits": {"losses": [{"logit_mse": {}}]},
    "entropy": {"losses": [{"kd": {}}, {"entropy": {"weight": 0.01}}]},
    "dkd": {"losses": [{"dkd": {"temperature": CHANGING}}, {"labels": {"weight": 1}}]},
    "dist": {"losses": [{"dist": {}}, {"labels": {"weight": 1}}]},
    "hint": {"losses": [{"hint": {"layers": LAYERS}}, {"labels": {}}]},
    "attention": {"losses": [{"attention": {"layers": LAYERS}}, {"labels": {}}]},
    "similarity": {"losses": [{"similarity": {"layers": {"hidden": "conv3"}}}, {"labels": {}}]},
    "relational": {"losses": [{"relational": {"layers": {"hidden": "hidden"}}}, {"kd": {}}]},
    "average": {"losses": [{"kd": {"from": "ema"}}, {"labels": {"weight": 1}}], "ema_teacher": 0.9},
    "noise": {"perturb": {"noise": {"std": 0.05}}},
    "adversarial": {"perturb": {"adversarial": {"steps": 2}}},
    "mixed": {"losses": [{"dkd": {}}, {"labels": {}}], "mixup": 0.2, "cutmix": 1.0},
    "in parts": {"losses": [{"kd": {}}, {"dist": {"from": "ema"}}], "accumulate": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_the_student_alone(workshop, trained, student, form):
    made = workshop.run(trained, "distill", student=student, **QUICK, **FORMS[form])
    (row,) = made.history[-1].training
    assert row["loss"] != 0
    names = workshop.build(made).state_dict().keys()
    assert names == create(Arch(student["factory"], student["kwargs"]), seed=0).state_dict().keys()


@pytest.mark.parametrize("form", ["hint", "average", "noise", "adversarial", "mixed"])
def test_what_a_form_draws_follows_from_the_seed(workshop, trained, student, form):
    settings = {"student": student, **QUICK, **FORMS[form]}
    digests = [workshop.run(trained, "distill", seed=seed, **settings).digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_forms_differ_from_each_other(workshop, trained, student):
    rows = {}
    for form in ("labels alone", "lambda", "alpha", "dkd", "hint", "noise", "adversarial", "average"):
        made = workshop.run(trained, "distill", student=student, **QUICK, **FORMS[form])
        rows[form] = made.digest
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_several_teachers(workshop, trained, student, tiny, weights, average):
    other = {"factory": tiny.factory, "weights": str(weights), "share": 3}
    ensemble = {"others": [other], "average": average}
    made = workshop.run(trained, "distill", student=student, ensemble=ensemble, **QUICK)
    alone = workshop.run(trained, "distill", student=student, **QUICK)
    assert made.digest != alone.digest
    notes = made.history[-1].notes
    assert f"teachers, {average} averaged: 25 % the model that comes in, 75 % model.py:make" in notes


def test_recovery_may_compare_layers_with_the_reference(workshop, trained):
    losses = [{"attention": {"layers": LAYERS}}, {"hint": {"layers": LAYERS}}, {"kd": {}}]
    recovery = {**QUICK, "losses": losses, "perturb": {"noise": {}}}
    made = workshop.run(trained, "prune", reference=trained, target={"macs": 0.6}, recovery=recovery)
    notes = made.history[-1].notes
    assert "loss: 1000 × attention, 1 × hint, 1 × kd at T 4" in notes
    assert "images are changed: noise (std 0.1)" in notes
    assert len(made.history[-1].training) == 1


@pytest.mark.parametrize("perturb", [{"noise": {}}, {"adversarial": {"steps": 1}}])
def test_training_from_labels_may_change_its_images(workshop, trained, perturb):
    plain, changed = (workshop.run(trained, "train", **QUICK, **more) for more in ({}, {"perturb": perturb}))
    assert plain.digest != changed.digest
    assert plain.history[-1].notes == ()
    assert changed.history[-1].notes[0].startswith(f"images are changed: {next(iter(perturb))} (")


# Peers and the average


def test_peers_all_learn_and_only_the_student_is_kept(workshop, trained, student, make, tiny_data, tmp_path):
    losses = [
        LossEntry.model_validate({"kd": {"from": "peers"}}),
        LossEntry.model_validate({"labels": {"weight": 1.0}}),
    ]
    models = [make(seed) for seed in (0, 1, 2)]
    objective = Objective(models[0], losses, None, peers=models[1:])
    settings = TrainingConfig(epochs=4, batch_size=16, learning_rate=0.05, precision="fp32")
    fit(objective, tiny_data.for_decisions(), settings, Workplace("cpu", 0, tmp_path, Silent()))
    for model in models:
        _, correct = evaluate(model, tiny_data.validation, "cpu")
        assert 100 * correct / len(tiny_data.validation) > 50  # chance: 25

    form = {"losses": [{"kd": {"from": "peers"}}, {"labels": {"weight": 1}}], **QUICK}
    peers = [student, {"factory": student["factory"], "kwargs": {"width": 12}}]
    made = workshop.run(trained, "distill", student=student, peers=peers, **form)
    assert made.digest == workshop.run(trained, "distill", student=student, peers=peers, **form).digest
    assert workshop.build(made).state_dict()["conv1.weight"].shape[0] == 8
    notes = made.history[-1].notes
    assert "peers: model.py:make, model.py:make" in notes
    assert "no term of the loss imitates the model that comes in: it teaches nothing" in notes
    assert made.history[-1].warnings == ()
    fewer = workshop.run(trained, "distill", student=student, peers=peers[:1], **form)
    assert fewer.digest != made.digest


def test_peers_with_the_same_weights_are_warned_of(workshop, trained, tiny, weights):
    model = {"factory": tiny.factory, "weights": str(weights)}
    form = {"losses": [{"kd": {"from": "peers"}}, {"labels": {}}], **QUICK}
    made = workshop.run(trained, "distill", student=model, peers=[model], **form)
    told = "some of student and peers begin with the same weights: they have little to learn from each other"
    assert told in made.history[-1].warnings


class KilledError(Exception):
    """Stands for whatever ends a process between two epochs."""


class Killer(Silent):
    def epoch(self, result):
        if result.epoch == 2:
            raise KilledError


@pytest.mark.parametrize("perturb", [False, True])
def test_peers_average_adapters_and_draws_survive_a_kill_to_the_bit(make, tiny_data, tmp_path, perturb):
    from compress.config import PerturbConfig
    from compress.training.features import FeatureTerms
    from compress.training.perturb import perturbation

    terms = (
        {"kd": {"from": "ema"}},
        {"kd": {"from": "peers"}},
        {"hint": {"layers": LAYERS}},
        {"labels": {}},
    )
    losses = [LossEntry.model_validate(term) for term in terms]
    data = tiny_data.for_decisions()
    config = TrainingConfig(epochs=4, batch_size=16, learning_rate=0.02, precision="fp32")

    def train(scratch, progress):
        model, peer = make(0, width=8, dropout=0.2), make(1, width=12)
        features = FeatureTerms(losses, model, make(2), data.example(), seed=0, at="distill")
        noise = PerturbConfig.model_validate({"noise": {"std": 0.1}}) if perturb else None
        changed = perturbation(noise, data.inputs, "distill")
        more = {"features": features, "peers": [peer], "ema_decay": 0.99, "perturb": changed, "seed": 1}
        objective = Objective(model, losses, features.teacher, **more)
        rows = fit(objective, data, config, Workplace("cpu", 0, scratch, progress))
        return objective.state_dict(), [row["loss"] for row in rows]

    straight, losses_straight = train(tmp_path / "straight", Silent())
    with pytest.raises(KilledError):
        train(tmp_path / "killed", Killer())
    resumed, losses_resumed = train(tmp_path / "killed", Silent())
    assert losses_straight == losses_resumed
    assert same(straight, resumed)
    kinds = {name.partition(".")[0] for name in straight}
    assert kinds == {"model", "peers", "average", "features"}
    assert int(straight["average._extra_state"]) == 4 * (len(data.train) // 16)


# Whole runs


@pytest.fixture
def pipeline(tiny, tmp_path):
    """A pipeline with a trained teacher and the given distillation."""

    def pipeline(distill, *more, **settings):
        train = {"train": {"epochs": 1, "batch_size": 32, "precision": "fp32"}}
        return tiny.pipeline(tmp_path, train, {"distill": {**QUICK, **distill}}, *more, **settings)

    return pipeline


def test_a_run_knows_its_peers_and_teachers_and_keeps_their_answers(pipeline, student, tiny, weights, tmp_path):
    teacher = {"factory": tiny.factory, "weights": str(weights)}
    distill = {
        "student": student,
        "peers": [{"factory": tiny.named("branches")}],
        "ensemble": {"others": [teacher]},
        "losses": [{"kd": {}}, {"logit_mse": {"from": "peers"}}, {"labels": {}}],
        "cache": {},
    }
    results = run(pipeline(distill), runs=tmp_path / "runs")
    assert [row.stage for row in results.rows] == ["source", "train", "distill"]
    folder = tmp_path / "runs" / "tiny" / "teacher"
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) == 2  # an answer each, not one of their mean
    run(
        pipeline({**distill, "learning_rate": 0.01, "ensemble": {"others": [{**teacher, "share": 2}]}}),
        runs=tmp_path / "runs",
    )
    assert {path.name for path in folder.iterdir()} == kept


@pytest.mark.slow
def test_fresh_asks_the_teacher_again(pipeline, student, tmp_path):
    for fresh in (False, True):
        recorder = Recorder()
        run(pipeline({"student": student, "cache": {}}), runs=tmp_path / "runs", fresh=fresh, progress=recorder)
        assert sum("the teacher's answers take" in note for note in recorder.notes) == 1


def test_layers_are_known_to_recovery_after_a_student_took_over(pipeline, tiny, tmp_path):
    losses = [{"similarity": {"layers": {"left": "conv1"}}}, {"kd": {}}]
    prune = {"prune": {"target": {"macs": 0.8}, "recovery": {**QUICK, "losses": losses}}}
    results = run(pipeline({"student": {"factory": tiny.named("branches")}}, prune), runs=tmp_path / "runs")
    assert results.rows[-1].stage == "prune"


def test_every_model_is_named_once_with_its_key(pipeline, student, tiny, weights):
    other = {"factory": tiny.factory, "weights": str(weights)}
    losses = [{"kd": {}}, {"kd": {"from": "peers"}}]
    distill = {"student": student, "peers": [student, student], "ensemble": {"others": [other]}, "losses": losses}
    assert [key for key, _ in pipeline(distill).models()] == [
        "model",
        "stages.1.distill.student",
        "stages.1.distill.peers.0",
        "stages.1.distill.peers.1",
        "stages.1.distill.ensemble.others.0",
    ]


def test_another_teachers_weights_are_part_of_the_key_by_content(pipeline, student, tiny, weights, tmp_path):
    def key(path):
        other = {"factory": tiny.factory, "weights": str(path)}
        made = pipeline({"student": student, "ensemble": {"others": [other]}})
        return Keys(made).stage(planned_stages(made)[2], None, None, None)

    before = key(weights)
    moved = tmp_path / "elsewhere" / weights.name
    moved.parent.mkdir()
    moved.write_bytes(weights.read_bytes())
    assert key(moved) == before
    moved.write_bytes(b"something else")
    assert key(moved) != before


# What is said before anything runs

HEAD = """name: tiny
device: cpu
threads: 1
data:
  kind: arrays
  root: {root}/data
  classes: [north, east, south, west]
  validation: {{from: given}}
model: {{factory: "{root}/model.py:make"}}
bench: {{latency: null}}
stages:
  - train: {{epochs: 1}}
"""
STUBBORN_LINE = MODEL[: MODEL.index("no forward today")].count("\n") + 1
STUDENT = '{{factory: "{root}/model.py:make", kwargs: {{width: 8}}}}'


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch, capsys):
    """The one line that `compress run` says of these stages, after which nothing lies in the run's folder."""

    def refused(stages):
        (tmp_path / "p.yaml").write_text((HEAD + stages.replace("STUDENT", STUDENT)).format(root=tiny.root))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["compress", "run", "p.yaml"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        folder = tmp_path / "runs" / "tiny"
        assert not folder.exists() or not list(folder.iterdir())
        return line.removeprefix("error: ").replace(f"{tiny.root}/", "")

    return refused


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (
            """  - distill:
      student: STUDENT
      losses:
        - labels:
        - hint:
            layers: {{conv4: conv3}}
""",
            (
                "p.yaml:18: stages.1.distill.losses.1.hint.layers: the student has no layer 'conv4'; did you mean 'conv3'? "
                "(there are: conv1 (n, 8, 12, 8), bn1 (n, 8, 12, 8), conv2 (n, 16, 6, 4), bn2 (n, 16, 6, 4), "
                "conv3 (n, 16, 6, 4), dropout (n, 16), hidden (n, 16), head (n, 4))"
            ),
        ),
        (
            """  - distill:
      student: STUDENT
      losses:
        - attention: {{layers: {{conv3: hidden}}}}
""",
            (
                "p.yaml:16: stages.1.distill.losses.0.attention.layers: 'conv3' of the student gives out (n, 16, 6, 4), "
                "'hidden' of the teacher (n, 32): attention maps need features (n, channels, height, width), or (n, tokens, "
                "channels) with equally many tokens"
            ),
        ),
        (
            """  - prune:
      recovery:
        losses: [similarity: {{layers: {{conv: conv1}}}}]
""",
            (
                "p.yaml:15: stages.1.prune.recovery.losses.0.similarity.layers: the student has no layer 'conv'; did you mean "
                "'conv3'? (there are: conv1 (n, 16, 12, 8), bn1 (n, 16, 12, 8), conv2 (n, 32, 6, 4), bn2 (n, 32, 6, 4), conv3 "
                "(n, 32, 6, 4), dropout (n, 32), hidden (n, 32), head (n, 4))"
            ),
        ),
        (
            """  - distill: {{student: STUDENT, losses: [kd: {{from: peers}}]}}
""",
            "p.yaml:13: stages.1.distill.peers: a term imitates them ('from: peers'), but none are named",
        ),
        (
            """  - distill: {{student: STUDENT, peers: [STUDENT]}}
""",
            "p.yaml:13: stages.1.distill.peers: no term of the losses imitates them; add one such as {kd: {from: peers}}",
        ),
        (
            """  - train: {{losses: [kd: {{}}]}}
""",
            (
                "p.yaml:13: stages.1.train.losses: 'train' has no teacher, so 'kd' cannot be used; use 'labels', or the stage "
                "'distill'"
            ),
        ),
        (
            """  - prune: {{recovery: {{losses: [kd: {{from: peers}}]}}}}
""",
            "p.yaml:13: stages.1.prune.recovery.losses: recovery has no peers; 'from: peers' is for the stage 'distill'",
        ),
        (
            """  - distill: {{student: STUDENT, losses: [labels: {{}}], teacher_share: 0.5}}
""",
            "p.yaml:13: stages.1.distill.teacher_share: no term of the losses imitates anybody",
        ),
        (
            """  - distill: {{student: STUDENT, teacher_share: {{start: 0.5, end: 2}}}}
""",
            "p.yaml:13: stages.1.distill.teacher_share: must lie between 0 and 1 from start to end",
        ),
        (
            """  - distill: {{student: STUDENT, losses: [labels: {{}}], cache: {{}}}}
""",
            "p.yaml:13: stages.1.distill.cache: no term of the losses imitates the teacher",
        ),
        (
            """  - distill: {{student: STUDENT, losses: [hint: {{layers: {{a: b}}}}], cache: {{}}}}
""",
            "p.yaml:13: stages.1.distill.cache: keeps what the teacher answers, not what its layers give out; leave it out here",
        ),
        (
            """  - distill: {{student: STUDENT, losses: [hint: {{layers: {{a: b}}}}], compile: true}}
""",
            "p.yaml:13: stages.1.distill.compile: a compiled model does not tell what its layers give out; leave it out here",
        ),
        (
            """  - distill: {{student: STUDENT, losses: [labels: {{}}],
      ensemble: {{others: [{{factory: "cifar:resnet20", weights: a.pth}}]}}}}
""",
            "p.yaml:14: stages.1.distill.ensemble: no term of the losses imitates a teacher",
        ),
        (
            """  - distill: {{student: STUDENT, ensemble: {{others: [{{factory: "cifar:resnet20"}}]}}}}
""",
            (
                "p.yaml:13: stages.1.distill.ensemble.others.0.weights: a teacher with random weights knows nothing; name a "
                "file or published weights"
            ),
        ),
        (
            """  - distill:
      student: STUDENT
      losses: [kd: {{from: peers}}]
      peers:
        - STUDENT
        - {{factory: "{root}/model.py:stubborn"}}
""",
            (
                "p.yaml:18: stages.1.distill.peers.1: the forward pass fails on inputs of shape (1, 12, 8): no forward today "
                "(model.py:LINE)"
            ),
        ),
        (
            """  - distill:
      student: STUDENT
      ensemble:
        others:
          - factory: "{root}/model.py:make"
            kwargs: {{num_classes: 5}}
""",
            (
                "p.yaml:17: stages.1.distill.ensemble.others.0: answers (2, 5) for 2 samples, but the data has 4 classes; "
                "set its kwargs to {num_classes: 4}, or what its factory calls it"
            ),
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_line_before_anything_runs(refused, stages, told):
    assert refused(stages) == told.replace("LINE", str(STUBBORN_LINE))


def test_missing_weights_of_peers_and_teachers_are_told_at_their_keys(pipeline, student, tiny, tmp_path):
    gone = {"factory": tiny.factory, "weights": str(tmp_path / "gone" / "v.pth")}
    losses = [{"kd": {}}, {"kd": {"from": "peers"}}]
    made = pipeline({"student": student, "peers": [gone], "ensemble": {"others": [gone]}, "losses": losses})
    with pytest.raises(ConfigError) as caught:
        make_plan(made, tmp_path / "runs")
    told = [problem.key for problem in caught.value.problems]
    assert told == ["stages.1.distill.peers.0.weights", "stages.1.distill.ensemble.others.0.weights"]
    assert all("p" in problem.where for problem in caught.value.problems)


def test_a_further_teachers_weights_that_do_not_fit_are_told_at_it(pipeline, student, tiny, weights, tmp_path):
    other = {"factory": tiny.factory, "kwargs": {"width": 4}, "weights": str(weights)}
    told = r"stages\.1\.distill\.ensemble\.others\.0\.weights: other\.safetensors: does not fit the model"
    with pytest.raises(ModelError, match=told):
        run(pipeline({"student": student, "ensemble": {"others": [other]}}), runs=tmp_path / "runs")


def test_vectors_have_no_pixels_to_change(tmp_path, tiny, student, monkeypatch, capsys):
    import numpy as np

    for split, n in (("train", 32), ("validation", 16), ("test", 16)):
        np.save(tmp_path / f"{split}_images.npy", np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(n) % 2)
    (tmp_path / "net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(5, 2)\n")
    data = {"kind": "arrays", "root": str(tmp_path), "layout": "any", "validation": {"from": "given"}}
    document = {
        "name": "tiny",
        "data": data,
        "model": {"factory": "net.py:make"},
        "stages": [{"train": {"perturb": {"noise": {}}}}],
    }
    (tmp_path / "p.yaml").write_text(json.dumps(document, indent=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress", "run", "p.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line
        == "error: p.yaml:17: stages.0.train.perturb: changes pixels of images, but the data has none ('input' of shape (5,))"
    )
