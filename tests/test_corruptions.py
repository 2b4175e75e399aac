"""Corruptions of images and of numbers: range, severity, randomness, and each family against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from scipy.stats import binom

from compress.methods.corruptions import (
    FAMILIES,
    SEVERITIES,
    VALUE_FAMILIES,
    corrupt,
    corrupt_values,
)

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "occlusion", "missing_pixels")


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    return one_thread


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed * 10_000 + index) for index in range(n)]


def images(n=6, channels=3, height=20, width=28, seed=0):
    """Smooth pictures with edges, in [0, 1]: a slope, stripes and a little noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    slope = (rows / height + columns / width) / 2
    stripes = 0.3 * np.sin(rng.uniform(0.3, 1.2, (n, channels, 1, 1)) * (rows + 2 * columns))
    noise = rng.normal(0, 0.03, (n, channels, height, width))
    return torch.from_numpy((slope + stripes + noise).clip(0, 1)).float()


@pytest.mark.parametrize("family", FAMILIES)
@given(
    channels=st.integers(1, 5),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    severity=st.sampled_from(SEVERITIES),
    fill=st.sampled_from([None, 0.0, 1.0]),
)
def test_every_family_keeps_shape_range_and_type(family, channels, height, width, severity, fill):
    given_images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(height))
    if fill is not None:
        given_images = torch.full_like(given_images, fill)
    before = given_images.clone()
    found = corrupt(given_images, family, severity, generators(2))
    assert (found.shape, found.dtype) == (before.shape, torch.float32)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(given_images, before)  # the input is untouched


@pytest.mark.parametrize("side", [16, 32, 80, 224])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_higher_severity_is_further_from_the_clean_images(family, side):
    clean = images(4, height=side, width=side + 8)
    distances = [
        (corrupt(clean, family, severity, generators(4)) - clean).abs().mean().item() for severity in SEVERITIES
    ]
    assert distances[0] > 0
    assert all(low < high for low, high in itertools.pairwise(distances)), distances


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_corrupted_the_same_in_every_batch(family):
    clean = images(5)
    whole = corrupt(clean, family, 3, generators(5))
    alone = torch.cat([corrupt(clean[i : i + 1], family, 3, generators(5)[i : i + 1]) for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert torch.equal(whole, corrupt(clean, family, 3, generators(5)))
    other = corrupt(clean, family, 3, generators(5, seed=1))
    assert torch.equal(whole, other) == (family not in RANDOM)


@pytest.mark.parametrize("family", RANDOM)
def test_images_of_a_batch_are_corrupted_differently(family):
    same = images(1).expand(4, -1, -1, -1)
    found = corrupt(same, family, 4, generators(4))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_published_strengths_are_met_and_sizes_between_lie_between(family):
    chosen = FAMILIES[family]
    for severity in SEVERITIES:
        small, large = chosen.small[severity - 1], chosen.large[severity - 1]
        assert chosen.strength(severity, 32) == pytest.approx(small)
        assert chosen.strength(severity, 224) == pytest.approx(large)
        assert min(small, large) * 0.999999 <= chosen.strength(severity, 96) <= max(small, large) * 1.000001
        grown = 2.0 if chosen.is_length else 1.0
        assert chosen.strength(severity, 448) == pytest.approx(large * grown)
        assert chosen.strength(severity, 16) == pytest.approx(small / grown)
    # A size half way between 32 and 224 on a logarithmic scale has the geometric mean of the two.
    middle = chosen.strength(2, round(math.sqrt(32 * 224)))
    assert middle == pytest.approx(math.sqrt(chosen.small[1] * chosen.large[1]), rel=0.01)


# --- families against their definitions ------------------------------------------------------------------------------


def test_gaussian_noise_has_its_standard_deviation():
    clean = torch.full((40, 3, 32, 32), 0.5)
    noise = corrupt(clean, "gaussian_noise", 4, generators(40)) - clean
    assert noise.std().item() == pytest.approx(0.09, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.001)


def test_shot_noise_is_that_of_counted_photons():
    clean = torch.full((60, 1, 32, 32), 0.4)
    found = corrupt(clean, "shot_noise", 5, generators(60))
    assert found.mean().item() == pytest.approx(0.4, abs=0.002)
    assert found.var().item() == pytest.approx(0.4 / 50, rel=0.03)
    assert torch.allclose(found * 50, (found * 50).round(), atol=1e-4)


def test_impulses_are_black_or_white_and_as_many_as_they_should_be():
    clean = torch.full((30, 3, 32, 32), 0.5)
    found = corrupt(clean, "impulse_noise", 5, generators(30))
    assert set(found.unique().tolist()) == {0.0, 0.5, 1.0}
    low, high = binom.interval(0.9999, clean.numel(), 0.07)
    assert low <= (found != 0.5).sum().item() <= high
    assert (found == 1.0).sum().item() == pytest.approx((found == 0.0).sum().item(), rel=0.1)


def test_blur_is_scipys_with_repeated_edges():
    clean = images(2, height=32, width=40)
    expected = clean.double().numpy()
    for axis in (2, 3):
        # scipy rounds the reach, ours is never shorter: weights beyond four standard deviations do not matter
        expected = gaussian_filter1d(expected, 0.7, axis=axis, mode="nearest", truncate=6)
    assert np.abs(corrupt(clean, "gaussian_blur", 3, generators(2)).numpy() - expected).max() < 1e-4


def test_pixels_become_means_of_blocks():
    clean = torch.arange(8.0).repeat(1, 1, 6, 1) / 8  # columns 0 to 7 eighths
    found = corrupt(clean, "pixelate", 5, generators(1))[0, 0]  # 0.65 of 8 columns are 5
    fine = torch.arange(8.0).repeat_interleave(5).reshape(5, 8).mean(1) / 8  # each of 5 columns is 8 fifths wide
    assert torch.allclose(found, fine[[0, 0, 1, 2, 2, 3, 4, 4]].expand(6, 8), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_jpeg_is_what_pillow_writes_and_reads(channels):
    from io import BytesIO

    from PIL import Image

    clean = images(2, channels)
    found = corrupt(clean, "jpeg", 5, generators(2))
    stream = BytesIO()
    pixels = (clean[1] * 255).round().byte().numpy()
    picture = Image.fromarray(pixels.transpose(1, 2, 0) if channels == 3 else pixels[0])
    picture.save(stream, "JPEG", quality=40)
    expected = np.asarray(Image.open(stream), dtype=np.float32) / 255
    got = found[1].permute(1, 2, 0).numpy() if channels == 3 else found[1, 0].numpy()
    assert np.array_equal(got, expected)


def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation():
    import colorsys

    clean = images(1, height=6, width=5)
    found = corrupt(clean, "brightness", 3, generators(1))
    for before, after in zip(clean[0].flatten(1).T.tolist(), found[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15)), abs=1e-5)


def test_black_gets_grey_when_it_gets_brighter():
    assert torch.allclose(corrupt(torch.zeros(1, 3, 4, 4), "brightness", 5, generators(1)), torch.tensor(0.3))


def test_contrast_shrinks_around_the_mean_of_each_channel():
    clean = images(3)
    found = corrupt(clean, "contrast", 2, generators(3))
    mean = clean.mean((2, 3), keepdim=True)
    assert torch.allclose(found - mean, 0.5 * (clean - mean), atol=1e-6)


def test_one_grey_square_lies_anywhere_within_the_image():
    clean = torch.zeros(300, 2, 10, 14)
    covered = corrupt(clean, "occlusion", 3, generators(300)) == 0.5
    assert torch.equal(covered[:, 0], covered[:, 1])
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert (rows.sum(1) == 4).all()
    assert (columns.sum(1) == 4).all()
    assert (covered[:, 0].sum((1, 2)) == 16).all()
    assert set(rows.int().argmax(1).tolist()) == set(range(7))
    assert set(columns.int().argmax(1).tolist()) == set(range(11))


def test_lost_pixels_are_lost_in_all_channels_and_leave_the_mean_alone():
    clean = images(50, height=32, width=32)
    found = corrupt(clean, "missing_pixels", 5, generators(50))
    is_lost = (found != clean).all(1)
    assert torch.equal(is_lost, (found != clean).any(1))
    assert is_lost.float().mean().item() == pytest.approx(0.6, abs=0.01)
    mean = clean.mean((2, 3), keepdim=True).expand_as(clean)
    assert torch.allclose(found[is_lost[:, None].expand_as(found)], mean[is_lost[:, None].expand_as(found)])


def test_what_is_lost_at_one_severity_is_lost_at_the_next():
    clean = images(3)
    for family in ("missing_pixels", "impulse_noise"):
        before = torch.zeros_like(clean, dtype=torch.bool)
        for severity in SEVERITIES:
            changed = corrupt(clean, family, severity, generators(3)) != clean
            assert (changed | ~before).all()
            before = changed


# --- numbers that are no images --------------------------------------------------------------------------------------


def features(n=200):
    values = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0, 10.0, 0.0]]) + 5
    return values, values.mean(0), values.std(0, correction=0)


@pytest.mark.parametrize("family", VALUE_FAMILIES)
def test_numbers_get_worse_with_severity_and_the_same_in_every_batch(family):
    values, mean, std = features()
    found = [corrupt_values(values, mean, std, family, severity, generators(200)) for severity in SEVERITIES]
    distances = [(each - values).abs().mean().item() for each in found]
    assert distances == sorted(distances)
    assert distances[0] > 0
    alone = corrupt_values(values[7:9], mean, std, family, 2, generators(200)[7:9])
    assert torch.equal(alone, found[1][7:9])


def test_noise_of_numbers_is_relative_to_the_spread_of_each_feature():
    values, mean, std = features(3000)
    noise = corrupt_values(values, mean, std, "value_noise", 4, generators(3000)) - values
    assert noise.std((0, 1)).tolist() == pytest.approx([0.5, 5.0, 0.0], rel=0.05)


def test_missing_numbers_become_the_mean():
    values, mean, std = features(2000)
    found = corrupt_values(values, mean, std, "missing_values", 3, generators(2000))
    changed = (found != values)[:, :, :2]
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(found[:, :, :2][changed], mean[:, :2].expand(2000, 2, 2)[changed])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_other_severities_are_refused(severity):
    values, mean, std = features(2)
    with pytest.raises(ValueError, match=rf"severity must be one of \(1, 2, 3, 4, 5\), got {severity}"):
        corrupt(images(2), "jpeg", severity, generators(2))
    with pytest.raises(ValueError, match="severity must be one of"):
        corrupt_values(values, mean, std, "value_noise", severity, generators(2))


def test_other_families_and_other_numbers_of_generators_are_refused():
    values, mean, std = features(2)
    with pytest.raises(ValueError, match=r"family must be one of gaussian_noise, .*, got 'fog'"):
        corrupt(images(2), "fog", 1, generators(2))
    with pytest.raises(ValueError, match="family must be one of value_noise, missing_values, got 'jpeg'"):
        corrupt_values(values, mean, std, "jpeg", 1, generators(2))
    with pytest.raises(ValueError, match="one generator per sample, got 1 for 2"):
        corrupt(images(2), "jpeg", 1, generators(1))
