"""Losses on features against independent formulas, and what each of them is meant to overlook."""

from itertools import permutations

import jaxtyping
import numpy as np
import pytest
import torch
from loss_cases import N, normal

from compress.methods.losses.features import (
    attention_transfer,
    hint_loss,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

MAPS = (N, 3, 6, 4)


def unit(vector):
    return vector / np.linalg.norm(vector)


def huber(difference):
    return 0.5 * difference**2 if abs(difference) <= 1 else abs(difference) - 0.5


def rotation(width):
    return torch.linalg.qr(normal(99, width, width)).Q


@pytest.mark.parametrize("shape", [MAPS, (N, 9, 3), (N, 8)])
def test_hint_loss_is_half_the_mean_square(shape):
    student, teacher = normal(0, *shape), normal(1, *shape)
    losses = [0.5 * np.sum((s - t) ** 2) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    units = np.prod(shape[1:])
    assert hint_loss(student, teacher).item() == pytest.approx(np.mean(losses) / units, rel=1e-12)


def test_hints_need_one_shape():
    with pytest.raises(jaxtyping.TypeCheckError):
        hint_loss(normal(0, N, 3, 6, 4), normal(1, N, 3, 6, 5))


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["maps", "tokens"])
def test_attention_transfer_is_the_formula(power, kind):
    shapes = ((N, 3, 6, 4), (N, 8, 6, 4)) if kind == "maps" else ((N, 9, 3), (N, 9, 8))
    student, teacher = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    axis = 0 if kind == "maps" else 1
    losses = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        seen, wanted = (unit((np.abs(each) ** power).sum(axis).ravel()) for each in (s, t))
        losses.append(np.mean((seen - wanted) ** 2))
    assert attention_transfer(student, teacher, power).item() == pytest.approx(np.mean(losses), rel=1e-10)


@pytest.mark.parametrize(("student", "teacher"), [((12, 8), (6, 4)), ((6, 4), (12, 8)), ((12, 4), (6, 8))])
def test_larger_attention_maps_are_pooled(student, teacher):
    s, t = normal(0, N, 3, *student), normal(1, N, 5, *teacher)

    def pooled(image):
        down, across = image.shape[0] // 6, image.shape[1] // 4
        return np.array(
            [
                [image[i * down : (i + 1) * down, j * across : (j + 1) * across].mean() for j in range(4)]
                for i in range(6)
            ]
        )

    losses = []
    for seen, wanted in zip(s.numpy(), t.numpy(), strict=True):
        difference = unit(pooled((seen**2).sum(0)).ravel()) - unit(pooled((wanted**2).sum(0)).ravel())
        losses.append(np.mean(difference**2))
    assert attention_transfer(s, t, 2.0).item() == pytest.approx(np.mean(losses), rel=1e-10)


def test_attention_looks_at_proportions_within_a_sample():
    student, teacher = normal(0, *MAPS), normal(1, *MAPS)
    loss = attention_transfer(student, teacher, 2.0).item()
    factors = torch.tensor([1e-3, 1.0, 5.0, 1e4, -2.0], dtype=torch.float64)[:, None, None, None]
    assert attention_transfer(student * factors, teacher, 2.0).item() == pytest.approx(loss, rel=1e-9)
    assert attention_transfer(student[:, [2, 0, 1]], teacher, 2.0).item() == pytest.approx(loss, rel=1e-9)
    assert attention_transfer(student.flip(2), teacher, 2.0).item() != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [((N, 9, 3), (N, 8, 3)), ((N, 9, 3), MAPS), ((N, 9), (N, 9))])
def test_attention_of_things_that_are_not_alike_is_refused(student, teacher):
    with pytest.raises(ValueError, match="attention maps need features"):
        attention_transfer(normal(0, *student), normal(1, *teacher), 2.0)


@pytest.mark.parametrize(("student", "teacher"), [((N, 3, 6, 4), (N, 8, 3, 5)), ((N, 9, 3), (N, 7)), ((N, 6), (N, 6))])
def test_similarity_preserving_is_the_formula(student, teacher):
    s, t = normal(0, *student), normal(1, *teacher)
    matrices = []
    for each in (s.numpy().reshape(N, -1), t.numpy().reshape(N, -1)):
        products = np.array([[a @ b for b in each] for a in each])
        matrices.append(np.array([unit(row) for row in products]))
    expected = np.sum((matrices[1] - matrices[0]) ** 2) / N**2
    assert similarity_preserving(s, t).item() == pytest.approx(expected, rel=1e-10)


def test_similarities_ignore_factors_and_rotations_but_not_shifts():
    student, teacher = normal(0, N, 6), normal(1, N, 9)
    loss = similarity_preserving(student, teacher).item()
    assert similarity_preserving(-7e3 * student @ rotation(6), 1e-5 * teacher).item() == pytest.approx(loss, rel=1e-9)
    assert similarity_preserving(student + 1, teacher).item() != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [((N, 6), (N, 9)), ((N, 3, 6, 4), (N, 8, 3, 5)), ((2, 6), (2, 9))])
def test_relational_distance_is_the_formula(student, teacher):
    s, t = normal(0, *student), 3 * normal(1, *teacher)
    pairs = list(permutations(range(student[0]), 2))
    relative = []
    for each in (s.numpy().reshape(student[0], -1), t.numpy().reshape(student[0], -1)):
        distances = np.array([np.linalg.norm(each[i] - each[j]) for i, j in pairs])
        relative.append(distances / distances.mean())
    expected = np.mean([huber(a - b) for a, b in zip(*relative, strict=True)])
    assert relational_distance(s, t).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_far_distances_count_linearly():
    # Distances 0.01, 10 and about 10: far apart relative to those of a teacher with equal ones, one differs by over 1.
    student = torch.tensor([[0.0], [0.01], [0.02], [10.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [10.0], [0.01], [0.02]], dtype=torch.float64)
    pairs = list(permutations(range(4), 2))
    relative = []
    for each in (student[:, 0].numpy(), teacher[:, 0].numpy()):
        distances = np.array([abs(each[i] - each[j]) for i, j in pairs])
        relative.append(distances / distances.mean())
    assert np.abs(relative[0] - relative[1]).max() > 1.5
    expected = np.mean([huber(a - b) for a, b in zip(*relative, strict=True)])
    assert relational_distance(student, teacher).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [((N, 6), (N, 9)), ((N, 3, 6, 4), (N, 8, 3, 5)), ((3, 2), (3, 9))])
def test_relational_angle_is_the_formula(student, teacher):
    s, t = normal(0, *student), normal(1, *teacher)
    cosines = [
        [unit(each[i] - each[j]) @ unit(each[k] - each[j]) for i, j, k in permutations(range(student[0]), 3)]
        for each in (s.numpy().reshape(student[0], -1), t.numpy().reshape(student[0], -1))
    ]
    expected = np.mean([huber(a - b) for a, b in zip(*cosines, strict=True)])
    assert relational_angle(s, t).item() == pytest.approx(expected, rel=1e-9)


def test_opposite_angles_count_linearly():
    # Three on a line, another one between the other two: cosines of 1 meet cosines of -1.
    student = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [2.0], [1.0]], dtype=torch.float64)
    assert relational_angle(student, teacher).item() == pytest.approx(4 * huber(2.0) / 6)


@pytest.mark.parametrize("loss", [relational_distance, relational_angle])
def test_relations_ignore_shift_rotation_and_factor(loss):
    student, teacher = normal(0, N, 6), normal(1, N, 9)
    value = loss(student, teacher).item()
    assert loss(1e3 * student @ rotation(6) + 5, teacher / 1e3 - 2).item() == pytest.approx(value, rel=1e-6)
    stretched = student * torch.arange(1.0, 7.0, dtype=torch.float64)
    assert loss(stretched, teacher).item() != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("loss", [relational_distance, relational_angle])
def test_relations_far_from_the_origin_keep_their_digits(loss):
    student, teacher = normal(0, 16, 32), normal(1, 16, 64)
    exact = loss(student, teacher).item()
    assert loss((student + 100).float(), teacher.float()).item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("loss", "n"), [(relational_distance, 1), (relational_angle, 1), (relational_angle, 2)])
def test_too_few_samples_have_no_relations(loss, n):
    assert loss(normal(0, n, 6), normal(1, n, 9)).item() == 0


@pytest.mark.parametrize("loss", [relational_distance, relational_angle])
def test_samples_that_coincide_do_not_spoil_the_others(loss):
    student, teacher = normal(0, N, 6).float(), normal(1, N, 9).float()
    student[1] = student[0]
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert 0 < value.item() < 2
    assert torch.isfinite(student.grad).all()
    assert student.grad[2:].abs().sum(1).min() > 0
    assert student.grad.abs().max() < 10
