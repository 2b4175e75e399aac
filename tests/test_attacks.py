"""FGSM and PGD: within reach, never better than nothing, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.methods.attacks import Reach, fgsm, label_loss_of, pgd
from compress.models.modes import in_evaluation

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    return one_thread


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normalised(n=4, seed=0, edges=True, height=5, width=7):
    """Images as a model gets them; with pixels that are black or white."""
    pixels = torch.rand(n, 3, height, width, generator=seeded(seed))
    if edges:
        pixels = ((pixels - 0.5) * 1.5 + 0.5).clamp(0, 1)
    shape = (-1, 1, 1)
    return (pixels - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def network(seed=0, classes=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 5 * 7, classes)
        )
    return model.eval()


def attack(name, loss, images, reach, **changes):
    if name == "fgsm":
        return fgsm(loss, images, reach)
    settings = {"step": reach.epsilon / 2, "steps": 3, "restarts": 2, "generator": seeded(3)} | changes
    return pgd(loss, images, reach, **settings)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(1e-4, 0.7),
    step=st.floats(1e-3, 2.0),
    mean=st.floats(0, 1),
    std=st.floats(0.01, 3),
)
def test_every_pixel_stays_within_reach_exactly(name, seed, epsilon, step, mean, std):
    pixels = torch.rand(2, 3, 5, 7, generator=seeded(seed)).mul(1.4).sub(0.2).clamp(0, 1)
    reach = Reach.of_pixels(epsilon, (mean, 0.5, mean), (std, 1.0, std / 2))
    images = (pixels - torch.tensor((mean, 0.5, mean)).view(-1, 1, 1)) / torch.tensor((std, 1.0, std / 2)).view(
        -1, 1, 1
    )
    weights = torch.randn(3, 5, 7, generator=seeded(seed + 1))
    found = attack(name, lambda inputs: (inputs * weights).sum((1, 2, 3)), images, reach, step=step)
    assert (found >= reach.lower).all()
    assert (found <= reach.upper).all()
    # In double precision, so that the check itself does not round.
    assert ((found.double() - images.double()).abs() <= epsilon * reach.scale.double()).all()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_of_a_linear_loss_the_worst_corner_is_found(name):
    images = normalised(edges=False) * 0.5  # far from black and white
    weights = torch.randn(3, 5, 7, generator=seeded(1))
    reach = Reach.of_pixels(2 / 255, MEAN, STD)
    found = attack(name, lambda inputs: (inputs * weights).sum((1, 2, 3)), images, reach, step=4 / 255)
    expected = images + 2 / 255 * weights.sign() / torch.tensor(STD).view(-1, 1, 1)
    assert torch.allclose(found, expected, atol=1e-6)


@given(seed=st.integers(0, 200), epsilon=st.floats(1e-3, 0.5), steps=st.integers(1, 4))
def test_pgd_never_lowers_the_loss_of_any_image(seed, epsilon, steps):
    images, labels = normalised(seed=seed), torch.tensor([0, 1, 2, 3])
    loss = label_loss_of(network(seed % 5), labels)
    found = pgd(
        loss, images, Reach.of_pixels(epsilon, MEAN, STD), step=2 * epsilon, steps=steps, generator=seeded(seed)
    )
    with torch.no_grad():
        assert (loss(found) >= loss(images) - 1e-5).all()


def test_an_image_that_is_already_the_worst_stays():
    def loss(inputs):
        return -inputs.square().sum((1, 2, 3))

    images = torch.zeros(2, 3, 5, 7)
    found = pgd(loss, images, Reach.of_pixels(0.1, (0.5,) * 3, (1.0,) * 3), step=0.05, steps=3, generator=seeded())
    assert torch.equal(found, images)


def test_more_steps_and_restarts_are_no_weaker():
    images, labels = normalised(16), torch.arange(16) % 5
    loss, reach = label_loss_of(network(), labels), Reach.of_pixels(8 / 255, MEAN, STD)
    with torch.no_grad():
        losses = [
            loss(pgd(loss, images, reach, step=2 / 255, steps=steps, restarts=restarts, generator=seeded()))
            .mean()
            .item()
            for steps, restarts in ((1, 1), (5, 1), (5, 4))
        ]
        assert loss(images).mean().item() < losses[0] < losses[1] <= losses[2]


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_fool_a_network(name):
    images, model = normalised(64), network()
    with torch.no_grad():
        labels = model(images).argmax(1)
    found = attack(name, label_loss_of(model, labels), images, Reach.of_pixels(0.1, MEAN, STD))
    with torch.no_grad():
        assert (model(found).argmax(1) == labels).float().mean() < 0.3


def test_pgd_is_the_same_for_the_same_generator_and_moves_it():
    images, loss = normalised(), label_loss_of(network(), torch.tensor([0, 1, 2, 3]))
    reach = Reach.of_pixels(4 / 255, MEAN, STD)

    def run(generator):
        return pgd(loss, images, reach, step=1 / 255, steps=2, generator=generator)

    one = seeded()
    first = run(one)
    assert torch.equal(first, run(seeded()))
    assert not torch.equal(first, run(one))


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_nothing_is_left_behind(name):
    """Neither gradients of parameters, nor moved running means, nor another mode, nor a graph, nor changed images."""
    model, images = network().train(), normalised()
    model[0].eval()
    before, untouched = {key: value.clone() for key, value in model.state_dict().items()}, images.clone()
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
        found = attack(name, label_loss_of(model, torch.tensor([0, 1, 2, 3])), images, Reach.of_pixels(0.1, MEAN, STD))
    assert [module.training for module in model] == [False, True, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not found.requires_grad
    assert not images.requires_grad
    assert torch.equal(images, untouched)


def test_modes_come_back_where_the_attack_fails():
    model = network().train()
    with pytest.raises(RuntimeError, match="broken"), in_evaluation(model):
        raise RuntimeError("broken")
    assert all(module.training for module in model.modules())


def test_any_loss_can_be_attacked():
    """As robust distillation does: the student's divergence from what the teacher says of the clean images."""
    student, teacher, images = network(1), network(2), normalised()
    with torch.no_grad():
        target = F.softmax(teacher(images), 1)

    def divergence(inputs):
        return F.kl_div(F.log_softmax(student(inputs), 1), target, reduction="none").sum(1)

    with torch.no_grad():  # what the caller turned off is on inside
        found = pgd(divergence, images, Reach.of_pixels(0.05, MEAN, STD), step=0.02, steps=3, generator=seeded())
        assert (divergence(found) > divergence(images) + 0.01).all()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_gradients_that_are_no_numbers_move_nothing_out_of_reach(name):
    images, reach = normalised(), Reach.of_pixels(0.1, MEAN, STD)
    found = attack(name, lambda inputs: (inputs * float("nan")).sum((1, 2, 3)), images, reach)
    assert torch.equal(found, images)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@pytest.mark.parametrize(
    "loss", [lambda inputs: inputs.round().detach().sum((1, 2, 3)), lambda inputs: torch.ones(4, requires_grad=True)]
)
def test_a_loss_without_a_gradient_is_refused(name, loss):
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        attack(name, loss, normalised(), Reach.of_pixels(0.1, MEAN, STD))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"restarts": 0}, {"step": 0.0}])
def test_numbers_that_are_too_small_are_refused(changes):
    with pytest.raises(ValueError, match="needs steps, restarts >= 1 and step > 0"):
        attack("pgd", lambda x: x.sum((1, 2, 3)), normalised(), Reach.of_pixels(0.1, MEAN, STD), **changes)


def test_label_loss_is_the_cross_entropy_of_each_sample():
    images, labels, model = normalised(), torch.tensor([0, 1, 2, 3]), network()
    with torch.no_grad():
        expected = -torch.log_softmax(model(images), 1)[range(4), labels]
        assert torch.allclose(label_loss_of(model, labels)(images), expected, atol=1e-6)
