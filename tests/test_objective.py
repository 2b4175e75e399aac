"""What a step minimises: each term, who is imitated, on which inputs, and how much it counts at which time."""

import copy
import json
from types import NoneType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.config import LossEntry, PerturbConfig, ScheduleConfig
from compress.data.base import Batch, Input
from compress.errors import StageError
from compress.methods.averages import decay_after
from compress.methods.losses.features import (
    attention_transfer,
    hint_loss,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from compress.methods.losses.logits import (
    decoupled,
    dist,
    entropy,
    label_loss,
    logit_mse,
    soft_cross_entropy,
    soft_label_loss,
    standardize,
    teacher_label_loss,
)
from compress.models.factory import Arch, create
from compress.training.features import FeatureTerms
from compress.training.layers import listening
from compress.training.objective import Objective
from compress.training.perturb import perturbation
from compress.training.teachers import Ensemble, OneTeacher
from compress.training.terms import ANSWERS, FEATURES

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = 0.4, 0.3
IMAGE = Input("images", (1, 12, 8), mean=(MEAN,), std=(STD,))
N, CLASSES = 8, 4


class Counting(nn.Module):
    """A model that knows how often, and with which inputs, it was called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def entry(**term):
    return LossEntry.model_validate_json(json.dumps(term))


def a_batch(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(n, 1, 12, 8, generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return Batch(((pixels - MEAN) / STD,), labels, torch.arange(n))


@pytest.fixture
def batch():
    return a_batch()


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed).eval()


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Each term is its pure function times its weight


def test_every_term_of_the_settings_has_a_loss():
    kinds = {
        kind for field in LossEntry.model_fields.values() for kind in get_args(field.annotation) if kind is not NoneType
    }
    assert kinds == ANSWERS.keys() | FEATURES.keys()
    assert not ANSWERS.keys() & FEATURES.keys()
    assert {kind.reads for kind in FEATURES} == {"features"}


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ({"labels": {"weight": 0.3, "smoothing": 0.1}}, lambda s, t, y: 0.3 * label_loss(s, y, 0.1)),
        ({"kd": {}}, lambda s, t, y: soft_label_loss(s, t, 4.0)),
        ({"kd": {"temperature": 2.0, "weight": 3.0}}, lambda s, t, y: 3 * soft_label_loss(s, t, 2.0)),
        ({"kd": {"divergence": "cross_entropy"}}, lambda s, t, y: soft_cross_entropy(s, t, 4.0)),
        (
            {"kd": {"standardize": True, "temperature": 2}},
            lambda s, t, y: soft_label_loss(standardize(s), standardize(t), 2.0),
        ),
        ({"teacher_labels": {"smoothing": 0.2}}, lambda s, t, y: teacher_label_loss(s, t, 0.2)),
        ({"logit_mse": {"weight": 0.5}}, lambda s, t, y: 0.5 * logit_mse(s, t)),
        ({"dkd": {"alpha": 0.5, "beta": 2}}, lambda s, t, y: decoupled(s, t, y, 0.5, 2.0, 4.0)),
        ({"dist": {"gamma": 2, "weight": 2}}, lambda s, t, y: 2 * dist(s, t, 1.0, 2.0, 1.0)),
        ({"entropy": {"weight": 0.2}}, lambda s, t, y: -0.2 * entropy(s)),
    ],
)
def test_a_term_on_answers_is_its_loss_times_its_weight(make, batch, term, expected):
    student, teacher = make(0), make(1)
    found = Objective(student, (entry(**term),), OneTeacher(teacher))(batch, 0.0)
    assert found.item() != 0
    with torch.no_grad():
        wanted = expected(student(*batch.inputs), teacher(*batch.inputs), batch.labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ({"attention": {"weight": 2}}, lambda s, t: 2 * attention_transfer(s, t, 2.0)),
        ({"attention": {"weight": 1, "power": 4}}, lambda s, t: attention_transfer(s, t, 4.0)),
        ({"similarity": {"weight": 3}}, lambda s, t: 3 * similarity_preserving(s, t)),
        ({"relational": {}}, lambda s, t: 25 * relational_distance(s, t) + 50 * relational_angle(s, t)),
        ({"relational": {"angle": 0}}, lambda s, t: 25 * relational_distance(s, t)),
    ],
)
def test_a_term_on_layers_is_the_sum_over_its_pairs(make, batch, term, expected):
    student, teacher = make(0, width=8), make(1)
    ((kind, settings),) = term.items()
    losses = (entry(**{kind: {**settings, "layers": {"conv1": "bn1", "conv3": "conv3"}}}),)
    features = FeatureTerms(losses, student, teacher, batch.inputs, seed=0, at="distill")
    found = Objective(student, losses, features.teacher, features=features)(batch, 0.0)
    with torch.no_grad():
        first = student.conv1(*batch.inputs), teacher.bn1(teacher.conv1(*batch.inputs))
        last = [
            model.conv3(model.bn2(model.conv2(model.bn1(model.conv1(*batch.inputs)).relu())).relu())
            for model in (student, teacher)
        ]
        wanted = expected(*first) + expected(*last)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("width", "layer", "kind"), [(8, "conv3", nn.Conv2d), (8, "hidden", nn.Linear), (16, "conv3", nn.Identity)]
)
def test_a_hint_goes_through_an_adapter_where_channels_differ(make, batch, width, layer, kind):
    student, teacher = make(0, width=width), make(1)
    losses = (entry(hint={"layers": {layer: layer}, "weight": 2}),)
    features = FeatureTerms(losses, student, teacher, batch.inputs, seed=0, at="distill")
    ((adapter,),) = features.adapters.values()
    assert type(adapter) is kind
    objective = Objective(student, losses, features.teacher, features=features)
    with torch.no_grad(), listening(student, [layer]) as mine, listening(teacher, [layer]) as theirs:
        student(*batch.inputs), teacher(*batch.inputs)
        wanted = 2 * hint_loss(adapter(mine[layer]), theirs[layer])
    found = objective(batch, 0.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in objective.parameters()}


def test_the_seed_decides_an_adapters_first_weights(make, batch):
    losses = (entry(hint={"layers": {"conv1": "conv1", "conv3": "conv3"}}),)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (
        bits(FeatureTerms(losses, make(0, width=8), make(1), batch.inputs, seed=seed, at="distill"))
        for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_terms_add_up(make, batch):
    student, teacher = make(0), OneTeacher(make(1))
    terms = ({"kd": {}}, {"labels": {}}, {"dist": {}}, {"entropy": {}})
    alone = sum(Objective(student, (entry(**term),), teacher)(batch, 0.0) for term in terms)
    together = Objective(student, [entry(**term) for term in terms], teacher)(batch, 0.0)
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("term", [{"kd": {}}, {"labels": {}}, {"dkd": {}}, {"teacher_labels": {}}])
def test_mixed_labels_are_probabilities_or_the_larger_part(make, batch, term):
    shares = torch.full((N, CLASSES), 0.0).scatter_(1, batch.labels[:, None], 0.7)
    mixed = batch._replace(
        labels=shares.scatter_add_(1, (batch.labels[:, None] + 1) % CLASSES, torch.full((N, 1), 0.3))
    )
    student, teacher = make(0), OneTeacher(make(1))
    found = Objective(student, (entry(**term),), teacher)(mixed, 0.0).item()
    if "labels" in term:
        second = batch._replace(labels=(batch.labels + 1) % CLASSES)
        parts = [Objective(student, (entry(**term),), teacher)(each, 0.0).item() for each in (batch, second)]
        assert found == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], rel=1e-5)
    else:
        assert found == pytest.approx(Objective(student, (entry(**term),), teacher)(batch, 0.0).item(), rel=1e-6)


# Both published forms of the weights, and what changes over the training


SOFT = ({"kd": {"weight": 1.0, "temperature": 4.0}}, {"labels": {"weight": 1.0}})


def parts_of(student, teacher, batch, temperature=4.0):
    with torch.no_grad():
        logits, wanted = student(*batch.inputs), teacher(*batch.inputs)
    return float(soft_label_loss(logits, wanted, temperature)), float(label_loss(logits, batch.labels))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_splits_between_teacher_and_labels(make, batch, share):
    student, teacher = make(0), make(1)
    soft, hard = parts_of(student, teacher, batch)
    found = Objective(student, [entry(**t) for t in SOFT], OneTeacher(teacher), share=share)(batch, 0.3)
    assert found.item() == pytest.approx(share * soft + (1 - share) * hard, rel=1e-6)
    without = Objective(student, [entry(**t) for t in SOFT], OneTeacher(teacher))(batch, 0.3)
    assert without.item() == pytest.approx(soft + hard, rel=1e-6)


COSINE_QUARTER = (1 - 2**-0.5) / 2


@pytest.mark.parametrize(
    ("shape", "position", "done"),
    [
        ("linear", 0.0, 0.0),
        ("linear", 0.25, 0.25),
        ("linear", 1.0, 1.0),
        ("cosine", 0.0, 0.0),
        ("cosine", 0.25, COSINE_QUARTER),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 1.0),
    ],
)
def test_share_and_temperature_change_over_the_training(make, batch, shape, position, done):
    student, teacher = make(0), make(1)
    temperature = {"start": 8.0, "end": 2.0, "shape": shape}
    losses = (entry(kd={"weight": 1.0, "temperature": temperature}), entry(labels={"weight": 1.0}))
    share = ScheduleConfig(start=0.9, end=0.1, shape=shape)
    found = Objective(student, losses, OneTeacher(teacher), share=share)(batch, position)
    soft, hard = parts_of(student, teacher, batch, 8.0 - 6.0 * done)
    now = 0.9 - 0.8 * done
    assert found.item() == pytest.approx(now * soft + (1 - now) * hard, rel=1e-5)


# Teachers


def test_a_teacher_is_asked_once_however_many_terms_want_to_know(make, batch):
    teacher = Counting(make(1))
    student = make(0)
    losses = (
        entry(kd={"temperature": 4.0}),
        entry(kd={"temperature": 1.0}),
        entry(dist={}),
        entry(similarity={"layers": {"conv3": "model.conv3"}}),
        entry(hint={"layers": {"conv1": "model.conv1"}}),
    )
    features = FeatureTerms(losses, student, teacher, batch.inputs, seed=0, at="distill")
    objective = Objective(student, losses, features.teacher, features=features)
    teacher.seen.clear()
    objective(batch, 0.0)
    assert len(teacher.seen) == 1
    objective(a_batch(1), 0.5)
    assert len(teacher.seen) == 2


def test_a_teacher_is_asked_about_each_batch_anew_and_answers_in_evaluation_mode(make):
    model = make(1, dropout=0.5).train()
    teacher = OneTeacher(model)
    first, second = a_batch(0), a_batch(1)
    with torch.no_grad():
        wanted = [model.eval()(*each.inputs) for each in (first, second, first)]
    found = [teacher.logits(each, 4.0) for each in (first, second, first)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(each.requires_grad for each in found)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_several_teachers_answer_with_their_mean(make, batch, temperature, average):
    models = [Counting(make(seed)) for seed in (1, 2, 3)]
    ensemble = Ensemble([OneTeacher(model) for model in models], [1.0, 2.0, 1.0], average)
    with torch.no_grad():
        logits = torch.stack([model.model(*batch.inputs) for model in models]).double()
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)[:, None, None]
    if average == "probabilities":
        wanted = ((logits / temperature).softmax(2) * weights).sum(0)
    else:
        wanted = ((logits * weights).sum(0) / temperature).softmax(1)
    found = (ensemble.logits(batch, temperature).double() / temperature).softmax(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    losses = (entry(kd={"temperature": temperature, "weight": 1}), entry(kd={"temperature": 3, "weight": 1}))
    Objective(make(0), losses, ensemble)(batch, 0.0)
    assert [len(model.seen) for model in models] == [1, 1, 1]


# Peers


def test_peers_imitate_the_mean_of_the_others_and_all_learn(make, batch):
    student, *peers = (make(seed) for seed in (0, 1, 2))
    losses = (entry(kd={"from": "peers", "weight": 0.5}), entry(labels={"weight": 1}))
    objective = Objective(student, losses, None, peers=peers)
    objective(batch, 0.0).backward()
    everybody = [student, *peers]
    for place, model in enumerate(everybody):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        with torch.no_grad():
            others = [(m(*batch.inputs) / 4).softmax(1) for at, m in enumerate(everybody) if at != place]
        logits = alone(*batch.inputs)
        # A constant per row is no part of an answer: the logarithm of the mean will do.
        wanted = 0.5 * soft_label_loss(logits, 4 * torch.stack(others).mean(0).log(), 4.0)
        (wanted + label_loss(logits, batch.labels)).backward()
        for (name, expected), found in zip(gradients(alone).items(), gradients(model).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_peers_see_the_teacher_too_but_layers_and_average_are_the_students(make, batch):
    student, peer, teacher = Counting(make(0)), make(1), make(2)
    losses = (
        entry(kd={}),
        entry(kd={"from": "ema"}),
        entry(similarity={"layers": {"model.conv1": "conv1"}}),
        entry(logit_mse={"from": "peers"}),
    )
    features = FeatureTerms(losses, student, teacher, batch.inputs, seed=0, at="distill")
    objective = Objective(student, losses, features.teacher, features=features, peers=[peer], ema_decay=0.9)
    found = objective(batch, 0.0).item()
    with torch.no_grad():
        mine, theirs, wanted = student(*batch.inputs), peer(*batch.inputs), teacher(*batch.inputs)
        layers = student.model.conv1(*batch.inputs), teacher.conv1(*batch.inputs)
    expected = soft_label_loss(mine, wanted, 4.0) + soft_label_loss(theirs, wanted, 4.0)
    expected = expected + 3000 * similarity_preserving(*layers) + 2 * 0.1 * logit_mse(mine, theirs)
    assert found == pytest.approx(expected.item(), rel=1e-5)


# The average of the student


def test_the_average_follows_by_its_recurrence(make, batch):
    student = make(0).train()
    objective = Objective(student, (entry(kd={"from": "ema"}), entry(labels={})), None, ema_decay=0.4).train()
    expected = {name: tensor.double() for name, tensor in student.state_dict().items()}
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    for step in range(6):
        objective(batch, step / 5).backward()
        optimizer.step()
        objective.after_step()
        decay = decay_after(step, 0.4)
        assert decay == min(0.4, (1 + step) / (10 + step))
        for name, tensor in student.state_dict().items():
            old = expected[name]
            expected[name] = decay * old + (1 - decay) * tensor if tensor.is_floating_point() else tensor.double()
    found = objective.average.model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(found["conv1.weight"], student.conv1.weight)
    assert not objective.average.model.training
    assert all(p.grad is None and not p.requires_grad for p in objective.average.parameters())


def test_a_student_imitates_its_average(make, batch):
    student = make(0)
    objective = Objective(student, (entry(kd={"from": "ema"}),), None, ema_decay=0.9)
    assert objective(batch, 0.0).item() == pytest.approx(0.0, abs=1e-6)  # as long as they are one
    with torch.no_grad():
        student.head.weight.mul_(-2)
        wanted = soft_label_loss(student(*batch.inputs), objective.average.model(*batch.inputs), 4.0)
    assert objective(batch, 0.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert wanted > 1e-3


def test_the_state_holds_average_and_steps_but_the_model_does_not(make, batch):
    losses = (entry(labels={}), entry(kd={"from": "ema"}))
    first, second = (Objective(make(seed), losses, None, ema_decay=0.9) for seed in (0, 1))
    with torch.no_grad():
        first.model.conv1.weight += 1
    first.after_step()
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        with torch.no_grad():
            objective.model.conv1.weight += 1
        objective.after_step()
    assert same(bits(first.average), bits(second.average))
    assert not any("average" in name for name in first.model.state_dict())


# Layers that cannot be compared


class Odd(nn.Module):
    """Layers of every kind that cannot be compared."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.twice = nn.Identity()
        self.turned = Turned()
        self.best = Best()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x, _ = self.pair(self.act(self.norm(self.conv(x))))
        self.turned(x), self.best(x)
        return self.head(self.twice(self.twice(x)).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x * 1, x


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class Best(nn.Module):
    def forward(self, x):
        return x.argmax(1)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (
            {"cnv1": "conv"},
            (
                "the student has no layer 'cnv1'; did you mean 'conv1'? (there are: conv1 (n, 16, 12, 8), bn1 (n, 16, 12, 8), "
                "conv2 (n, 32, 6, 4), bn2 (n, 32, 6, 4), conv3 (n, 32, 6, 4), dropout (n, 32), hidden (n, 32), head (n, 4))"
            ),
        ),
        (
            {"conv1": "x", "y": "norm"},
            (
                "the student has no layer 'y' (there are: conv1 (n, 16, 12, 8), bn1 (n, 16, 12, 8), conv2 (n, 32, 6, 4), "
                "bn2 (n, 32, 6, 4), conv3 (n, 32, 6, 4), dropout (n, 32), hidden (n, 32), head (n, 4)); the teacher has no layer "
                "'x' (there are: conv (n, 6, 12, 8), act (n, 6, 12, 8), head (n, 4)); 'norm' of the teacher cannot be compared: "
                "it is overwritten in place by a later one; name that one, or the block around them"
            ),
        ),
        (
            {"conv1": "pair"},
            "'pair' of the teacher cannot be compared: it gives out a tuple, not one tensor; name a layer inside it",
        ),
        (
            {"conv1": "twice"},
            (
                "'twice' of the teacher cannot be compared: it is called 2 times in a forward pass; name a layer around one of "
                "them"
            ),
        ),
        (
            {"conv1": "turned"},
            (
                "'turned' of the teacher cannot be compared: it gives out the shape (6, 8, 12, 8) for 8 samples, not one row per "
                "sample"
            ),
        ),
        ({"conv1": "best"}, "'best' of the teacher cannot be compared: it gives out int64, not fractions"),
        ({"conv1": "unused"}, "'unused' of the teacher cannot be compared: it is not called in a forward pass"),
    ],
)
def test_layers_that_cannot_be_compared_are_told_before_training(make, batch, layers, told):
    losses = (entry(labels={}), entry(similarity={"layers": layers}))
    with pytest.raises(StageError) as caught:
        FeatureTerms(losses, make(0), Odd(), batch.inputs, seed=0, at="distill")
    assert str(caught.value) == f"distill.losses.1.similarity.layers: {told}"


@pytest.mark.parametrize(
    ("kind", "layers", "told"),
    [
        (
            "attention",
            {"hidden": "conv3"},
            (
                "'hidden' of the student gives out (n, 32), 'conv3' of the teacher (n, 32, 6, 4): attention maps need features "
                "(n, channels, height, width), or (n, tokens, channels) with equally many tokens"
            ),
        ),
        (
            "hint",
            {"conv3": "conv3", "conv1": "conv2"},
            (
                "'conv1' of the student gives out (n, 16, 12, 8), 'conv2' of the teacher (n, 32, 6, 4): a hint needs the same "
                "number of axes on both sides, and the same height and width or number of tokens"
            ),
        ),
        (
            "hint",
            {"head": "conv2"},
            (
                "'head' of the student gives out (n, 4), 'conv2' of the teacher (n, 32, 6, 4): a hint needs the same number of "
                "axes on both sides, and the same height and width or number of tokens"
            ),
        ),
    ],
)
def test_shapes_that_do_not_fit_are_told_with_both_before_training(make, batch, kind, layers, told):
    with pytest.raises(StageError) as caught:
        FeatureTerms(
            (entry(**{kind: {"layers": layers}}),), make(0), make(1), batch.inputs, seed=0, at="prune.recovery"
        )
    assert str(caught.value) == f"prune.recovery.losses.0.{kind}.layers: {told}"


@pytest.mark.parametrize(
    ("student", "teacher", "shape", "found"),
    [
        ("cifar:resnet20", "cifar:resnet56", (3, 32, 32), ["layer1", "layer2", "layer3"]),
        ("torchvision:resnet18", "torchvision:resnet18", (3, 64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        (
            "torchvision:squeezenet1_1",
            "torchvision:squeezenet1_1",
            (3, 64, 64),
            ["features.1", "features.4", "features.7", "classifier.2"],
        ),
    ],
)
def test_auto_is_the_last_layer_of_each_stage(student, teacher, shape, found):
    models = (create(Arch(name), seed=0) for name in (student, teacher))
    terms = FeatureTerms((entry(hint={"layers": "auto"}),), *models, (torch.zeros(2, *shape),), seed=0, at="distill")
    assert terms.found == {"hint": found}
    assert terms.layers == sorted(found)


def test_auto_is_the_same_as_naming_the_layers(make, batch):
    named = {"layers": {name: name for name in ("bn1", "conv3")}}
    losses = []
    for layers in ({"layers": "auto"}, named):
        terms = FeatureTerms((entry(hint=layers),), make(0), make(1), batch.inputs, seed=0, at="distill")
        with listening(student := make(0), terms.layers) as found:
            student(*batch.inputs)
        losses.append(terms.loss(0, found, batch).item())
    assert losses[0] == losses[1] > 0


def test_where_auto_finds_nothing_layers_must_be_named(make, batch):
    losses = (entry(hint={"layers": "auto"}),)
    with pytest.raises(
        StageError, match=r"^distill\.losses\.0\.hint\.layers: auto finds no layer .* name them, student: teacher$"
    ):
        FeatureTerms(losses, make(0), Odd(), batch.inputs, seed=0, at="distill")


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_no_hook_stays_neither_after_a_step_nor_after_an_error(make, batch):
    student, teacher = make(0), make(1)
    losses = (entry(similarity={"layers": {"conv3": "conv3"}}),)
    features = FeatureTerms(losses, student, teacher, batch.inputs, seed=0, at="distill")
    Objective(student, losses, features.teacher, features=features)(batch, 0.0)
    assert hooks_of(student) == hooks_of(teacher) == 0

    def forward(x):
        raise ValueError("no forward today")

    student.head.forward = forward
    with pytest.raises(ValueError, match="no forward today"):
        Objective(student, losses, features.teacher, features=features)(batch, 0.0)
    with pytest.raises(AttributeError), listening(student, ["conv3", "nowhere"]):
        pass
    assert hooks_of(student) == 0


def test_looking_for_layers_leaves_a_model_as_it_is(make, batch):
    student = make(0, dropout=0.5).train()
    student.bn1.eval()
    before = bits(student)
    FeatureTerms((entry(hint={"layers": {"conv3": "conv3"}}),), student, make(1), batch.inputs, seed=0, at="distill")
    assert same(before, bits(student))
    assert student.training
    assert not student.bn1.training


# Perturbed inputs


ATTACK = {"adversarial": {"epsilon": 0.1, "step": 0.04, "steps": 4}}
NOISE = {"noise": {"std": 0.2}}


def perturb_of(settings, inputs=(IMAGE,)):
    return perturbation(PerturbConfig.model_validate_json(json.dumps(settings)), inputs, "distill")


def pixels(inputs):
    return inputs * STD + MEAN


@pytest.mark.parametrize("settings", [ATTACK, NOISE])
def test_terms_that_imitate_see_changed_inputs_all_others_and_the_teacher_clean_ones(make, batch, settings):
    student, teacher = Counting(make(0)), Counting(make(1))
    losses = (entry(kd={"weight": 1}), entry(labels={"weight": 1}))
    objective = Objective(student, losses, OneTeacher(teacher), perturb=perturb_of(settings), seed=3)
    found = objective(batch, 0.5).item()
    *crafting, clean, changed = student.seen
    assert len(crafting) == (6 if "adversarial" in settings else 0)  # the clean one, four steps, the last one
    assert torch.equal(clean, *batch.inputs)
    assert [torch.equal(x, *batch.inputs) for x in teacher.seen] == [True]
    assert not torch.equal(changed, clean)
    with torch.no_grad():
        soft = soft_label_loss(student.model(changed), teacher.model(clean), 4.0)
        hard = label_loss(student.model(clean), batch.labels)
    assert found == pytest.approx((soft + hard).item(), rel=1e-6)
    assert pixels(changed).min() >= -1e-6
    assert pixels(changed).max() <= 1 + 1e-6


@pytest.mark.parametrize("settings", [ATTACK, NOISE])
def test_where_nothing_imitates_all_terms_see_changed_inputs(make, batch, settings):
    student = Counting(make(0))
    losses = (entry(labels={"weight": 1}), entry(entropy={}))
    found = Objective(student, losses, None, perturb=perturb_of(settings), seed=3)(batch, 0.5)
    changed = student.seen[-1]
    assert not any(torch.equal(x, *batch.inputs) for x in student.seen[1:])
    with torch.no_grad():
        logits = student.model(changed)
    expected = label_loss(logits, batch.labels) - 0.1 * entropy(logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_noise_has_its_spread_in_pixels():
    grey = Batch(
        (torch.zeros(64, 1, 12, 8) + (0.5 - MEAN) / STD,), torch.zeros(64, dtype=torch.int64), torch.arange(64)
    )
    (noisy,) = perturb_of({"noise": {"std": 0.05}})(nn.Identity(), grey, torch.Generator().manual_seed(0))
    assert pixels(noisy).std().item() == pytest.approx(0.05, rel=0.03)
    assert pixels(noisy).mean().item() == pytest.approx(0.5, abs=0.002)


def test_an_attack_raises_the_loss_of_every_sample_within_reach(make, batch):
    student = make(0).train()
    (changed,) = perturb_of(ATTACK)(student, batch, torch.Generator().manual_seed(0))
    student.eval()
    with torch.no_grad():
        clean = F.cross_entropy(student(*batch.inputs), batch.labels, reduction="none")
        attacked = F.cross_entropy(student(changed), batch.labels, reduction="none")
    assert (attacked > clean).all()
    assert (pixels(changed) - pixels(*batch.inputs)).abs().max() <= 0.1 + 1e-6


def test_crafting_moves_no_statistics_no_gradients_and_no_modes(make, batch):
    student = make(0, dropout=0.5).train()
    student.bn1.eval()
    before = bits(student)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    perturb_of(ATTACK)(student, batch, torch.Generator().manual_seed(0))
    assert same(before, bits(student))
    assert all(p.grad is None for p in student.parameters())
    assert student.training
    assert not student.bn1.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_on_attacked_inputs_has_the_gradients_of_the_loss_there(make, batch, bf16):
    student, teacher = make(0), OneTeacher(make(1))
    losses = (entry(kd={"weight": 1}),)
    perturb = perturb_of(ATTACK)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        objective = Objective(Counting(student), losses, teacher, perturb=perturb, seed=3)
        loss = objective(batch, 0.5)
    loss.backward()
    found = gradients(student)
    student.zero_grad()
    changed = objective.model.seen[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        soft_label_loss(student(changed).float(), teacher.logits(batch, 4.0), 4.0).backward()
    for (name, expected), gradient in zip(gradients(student).items(), found.values(), strict=True):
        torch.testing.assert_close(gradient, expected, msg=name)
        assert gradient.abs().sum() > 0 or "bias" in name


def test_what_is_drawn_depends_on_seed_time_and_samples_alone(make, batch):
    def drawn(seed=3, position=0.5, of=batch):
        student = Counting(make(0))
        torch.manual_seed(torch.randint(100, ()))
        Objective(student, (entry(labels={}),), None, perturb=perturb_of(NOISE), seed=seed)(of, position)
        return student.seen[-1]

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=4), drawn(position=0.25), drawn(of=batch._replace(indices=batch.indices + N))):
        assert not torch.equal(drawn(), other)


VECTOR, TOKENS = Input("values", (5,)), Input("tokens", (7,), "int64")


@pytest.mark.parametrize(
    ("settings", "inputs", "told"),
    [
        (NOISE, (VECTOR,), "perturb: changes pixels of images, but the data has none ('values' of shape (5,))"),
        (ATTACK, (TOKENS,), "perturb: changes pixels of images, but the data has none ('tokens' of shape (7,))"),
        (
            ATTACK,
            (IMAGE, VECTOR, IMAGE),
            (
                "perturb.adversarial: attacks one image, but the data has 2 ('images' of shape (1, 12, 8), 'values' of shape "
                "(5,), 'images' of shape (1, 12, 8))"
            ),
        ),
    ],
)
def test_only_images_have_pixels_to_change(settings, inputs, told):
    with pytest.raises(StageError) as caught:
        perturb_of(settings, inputs)
    assert str(caught.value) == f"distill.{told}"


@pytest.mark.parametrize("settings", [ATTACK, NOISE])
def test_other_inputs_beside_the_image_stay(settings):
    class Two(nn.Module):
        def forward(self, tokens, images):
            return images.flatten(1)[:, :CLASSES] * tokens.sum(1, keepdim=True)

    images = a_batch().inputs[0]
    tokens = torch.ones(N, 7, dtype=torch.int64)
    both = Batch((tokens, images), torch.zeros(N, dtype=torch.int64), torch.arange(N))
    same_tokens, changed = perturb_of(settings, (TOKENS, IMAGE))(Two(), both, torch.Generator().manual_seed(0))
    assert torch.equal(same_tokens, tokens)
    assert not torch.equal(changed, images)
