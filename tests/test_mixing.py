"""Mixup and CutMix: what comes out, in which proportions, and how their numbers are drawn."""

import numpy as np
import pytest
import torch
from scipy import stats

from compress.errors import StageError
from compress.methods.mixing import Box, cutmix, draw_box, draw_share, mixup

N, CLASSES = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
PARTNERS = torch.tensor([2, 1, 4, 0, 3])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(seed=0, height=6, width=9):
    return torch.randn(N, 3, height, width, generator=generator(seed))


def certain(labels):
    return np.eye(CLASSES)[labels.numpy()]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_blends_every_input_and_the_labels_alike(share):
    inputs = (images(), torch.randn(N, 2, generator=generator(1)))
    mixed, targets = mixup(inputs, LABELS, CLASSES, share, PARTNERS)
    for new, old in zip(mixed, inputs, strict=True):
        for i in range(N):
            expected = share * old[i].numpy() + (1 - share) * old[PARTNERS[i]].numpy()
            assert np.allclose(new[i].numpy(), expected, atol=1e-6)
    assert np.allclose(targets.numpy(), share * certain(LABELS) + (1 - share) * certain(LABELS[PARTNERS]), atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(N))


@pytest.mark.parametrize("box", [Box(1, 4, 2, 9), Box(0, 6, 0, 9), Box(2, 2, 0, 9)])
def test_cutmix_puts_the_partners_box_in_and_counts_pixels(box):
    inputs = (images(), images(1))
    mixed, targets = cutmix(inputs, LABELS, CLASSES, box, PARTNERS)
    for new, old in zip(mixed, inputs, strict=True):
        for i in range(N):
            for row in range(6):
                for column in range(9):
                    inside = box.top <= row < box.bottom and box.left <= column < box.right
                    source = old[PARTNERS[i]] if inside else old[i]
                    assert torch.equal(new[i, :, row, column], source[:, row, column])
    kept = 1 - (box.bottom - box.top) * (box.right - box.left) / 54
    assert np.allclose(targets.numpy(), kept * certain(LABELS) + (1 - kept) * certain(LABELS[PARTNERS]), atol=1e-6)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_the_inputs_stay_as_they_are_and_keep_their_layout(mix):
    batch = images().contiguous(memory_format=torch.channels_last)
    before = batch.clone()
    number = 0.4 if mix is mixup else Box(0, 3, 0, 3)
    (mixed,), _ = mix((batch,), LABELS, CLASSES, number, PARTNERS)
    assert torch.equal(batch, before)
    assert not torch.equal(mixed, before)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == batch.dtype


def test_mixup_refuses_words():
    with pytest.raises(StageError, match="input 2 holds int64; leave mixup out"):
        mixup((images(), torch.zeros(N, 7, dtype=torch.int64)), LABELS, CLASSES, 0.5, PARTNERS)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(N, 7),), r"input 1 is \(5, 7\) of float32"),
        ((torch.zeros(N, 3, 6, 9), torch.zeros(N, 3, 6, 9, dtype=torch.uint8)), r"input 2 is \(5, 3, 6, 9\) of uint8"),
        ((torch.zeros(N, 3, 6, 9), torch.zeros(N, 1, 4, 4)), "one size, but the inputs have 4×4, 6×9"),
    ],
)
def test_cutmix_refuses_what_is_no_image(inputs, message):
    with pytest.raises(StageError, match=message):
        cutmix(inputs, LABELS, CLASSES, Box(0, 1, 0, 1), PARTNERS)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_are_beta_distributed(alpha):
    source = generator()
    drawn = [draw_share(alpha, source) for _ in range(1000)]
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_draws_follow_their_generator_alone():
    torch.manual_seed(1)
    first = draw_share(0.4, generator(3)), draw_box(0.6, 32, 48, generator(3))
    torch.manual_seed(2)
    assert (draw_share(0.4, generator(3)), draw_box(0.6, 32, 48, generator(3))) == first
    source = generator(3)
    assert len({draw_share(0.4, source) for _ in range(50)}) == 50


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_boxes_have_the_images_proportions_and_lie_in_it(share):
    source = generator()
    boxes = [draw_box(share, 40, 60, source) for _ in range(500)]
    assert all(0 <= box.top <= box.bottom <= 40 and 0 <= box.left <= box.right <= 60 for box in boxes)
    assert max(box.bottom - box.top for box in boxes) == int(40 * np.sqrt(1 - share))
    assert max(box.right - box.left for box in boxes) == int(60 * np.sqrt(1 - share))


def test_boxes_are_centred_everywhere_in_the_image():
    source = generator()
    covered = np.zeros((8, 12))
    for _ in range(4000):
        box = draw_box(0.75, 8, 12, source)
        covered[box.top : box.bottom, box.left : box.right] += 1
    # Boxes of 4 by 6 around centres drawn evenly: away from the edges each pixel is covered by a quarter of them.
    assert covered[4, 6] / 4000 == pytest.approx(0.25, abs=0.03)
    assert 0 < covered.min() < covered.max()


@pytest.mark.parametrize(("share", "area"), [(1.0, 0), (0.0, None)])
def test_ends_of_the_range(share, area):
    source = generator()
    areas = {draw_box(share, 6, 9, source).area for _ in range(300)}
    assert areas == {0} if area == 0 else max(areas) == 54
