"""Spatial and Tucker splits that look at the inputs: what they minimise, and what they lose, against plain sums."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.seen import (
    channel_root,
    higher_order_seen,
    lost,
    lost_by_spatial,
    lost_by_tucker,
    split_spatial_seen,
    split_tucker_seen,
)
from compress.methods.spatial import merged_spatial, split_spatial
from compress.methods.tucker import errors_by_ranks, higher_order, merged_tucker, split_tucker

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
SHAPE = (6, 4, 3, 2)


def weight(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches(shape=SHAPE, rows=60, seed=1, whole=False):
    """Patches whose channels vary together, by different amounts, and not around 0; of pixels that are independent.

    With `whole`, every combination of signs of all pixels' components, so that sample moments are exact.
    """
    rng = np.random.default_rng(seed)
    _, inp, height, width = shape
    mixing = rng.normal(size=(inp, inp)) * np.exp(2 * rng.normal(size=inp))
    if whole:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=inp * height * width)))
        pixels = signs.reshape(-1, inp, height, width)
    else:
        pixels = rng.normal(size=(rows, inp, height, width))
    seen = np.einsum("nihw,ij->njhw", pixels, mixing) + rng.normal(size=(inp, 1, 1))
    return torch.tensor(seen.reshape(len(seen), -1))


def lost_by_loops(tensor, approximation, rows):
    change, whole = [], []
    for row in rows.numpy() - rows.numpy().mean(0):
        change.append(((tensor - approximation).flatten(1).numpy() @ row) ** 2)
        whole.append((tensor.flatten(1).numpy() @ row) ** 2)
    return np.sum(change) / np.sum(whole)


def test_what_is_lost_is_what_outputs_lose():
    tensor, rows = weight(), patches()
    approximation = merged_spatial(*split_spatial(tensor, 2))
    assert lost(tensor, approximation, rows) == pytest.approx(lost_by_loops(tensor, approximation, rows))
    assert lost(tensor, tensor, rows) == 0
    assert lost(tensor, 0 * tensor, rows) == pytest.approx(1)
    constant = torch.ones(8, 24, dtype=torch.float64)
    assert lost(tensor, 0 * tensor, constant) == 0


def test_the_root_is_that_of_the_channels_covariance():
    rows = patches()
    pixels = rows.reshape(60, 4, 6).movedim(1, 2).flatten(0, 1)
    root = channel_root(rows, 4)
    covariance = torch.cov(pixels.T, correction=0)
    energies = torch.linalg.eigvalsh(covariance)
    assert energies[0] > 1e-4 * energies.mean(), "else the ridge would show"
    torch.testing.assert_close(root.root @ root.root, covariance)
    torch.testing.assert_close(root.root @ root.inverse, torch.eye(4, dtype=torch.float64))


def test_channels_never_seen_or_never_different_stay_finite():
    rows = patches()
    rows.reshape(60, 4, 6)[:, 2] = 7.0
    root = channel_root(rows, 4)
    assert root.inverse.isfinite().all()
    for part in split_tucker_seen(weight(), root, 3, 2):
        assert part.isfinite().all()
    still = channel_root(torch.ones(5, 24, dtype=torch.float64), 4)
    torch.testing.assert_close(still.root, torch.eye(4, dtype=torch.float64))


@given(SIZES, st.integers(0, 1000))
def test_at_full_rank_nothing_is_lost(shape, seed):
    tensor, rows = weight(shape, seed), patches(shape, seed=seed)
    root = channel_root(rows, shape[1])
    out, inp, height, width = shape
    spatial = split_spatial_seen(tensor, root, min(out * width, inp * height))
    assert lost(tensor, merged_spatial(*spatial), rows) < 1e-12
    area = height * width
    assert (
        lost(tensor, merged_tucker(*split_tucker_seen(tensor, root, min(out, inp * area), min(inp, out * area))), rows)
        < 1e-12
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_where_pixels_are_independent_no_spatial_pair_loses_less(rank):
    shape = (5, 2, 3, 2)
    tensor, rows = weight(shape), patches(shape, whole=True)
    found = lost(tensor, merged_spatial(*split_spatial_seen(tensor, channel_root(rows, 2), rank)), rows)
    plain = lost(tensor, merged_spatial(*split_spatial(tensor, rank)), rows)
    assert found < plain
    generator = torch.Generator().manual_seed(0)
    first, second = split_spatial_seen(tensor, channel_root(rows, 2), rank)
    for _ in range(50):  # nor does any near it
        near = [
            part + 0.01 * torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in (first, second)
        ]
        assert lost(tensor, merged_spatial(*near), rows) >= found


def test_where_pixels_are_independent_a_seen_tucker_split_loses_less():
    shape = (5, 3, 2, 2)
    tensor, rows = weight(shape), patches(shape, whole=True)
    root = channel_root(rows, 3)
    for ranks in ((2, 2), (4, 2), (4, 1)):
        seen, plain = split_tucker_seen(tensor, root, *ranks), split_tucker(tensor, *ranks)
        assert lost(tensor, merged_tucker(*seen), rows) < lost(tensor, merged_tucker(*plain), rows)


@given(SIZES, st.integers(0, 1000))
def test_curves_are_what_each_rank_loses(shape, seed):
    tensor, rows = weight(shape, seed), patches(shape, seed=seed)
    root = channel_root(rows, shape[1])
    out, inp, height, width = shape
    most = min(out * width, inp * height)
    ranks = sorted({1, (most + 1) // 2, most})
    for first, second in (split_spatial(tensor, most), split_spatial_seen(tensor, root, most)):
        curve = lost_by_spatial(tensor, first, second, rows, ranks)
        each = [lost(tensor, merged_spatial(first[:rank], second[:, :rank]), rows) for rank in ranks]
        assert curve == pytest.approx(each, abs=1e-9)
    full_out, full_in = min(out, inp * height * width), min(inp, out * height * width)
    pairs = [(full_out, full_in), (max(1, full_out - 1), full_in), (1, 1)]
    for first, core, last in (higher_order(tensor), higher_order_seen(tensor, root)):
        curve = lost_by_tucker(tensor, (first, core, last), rows, pairs)
        each = [lost(tensor, merged_tucker(first[:b], core[:a, :b], last[:, :a]), rows) for a, b in pairs]
        assert curve == pytest.approx(each, abs=1e-9)


@given(SIZES, st.integers(0, 1000))
def test_the_core_tells_what_every_pair_of_ranks_loses(shape, seed):
    tensor = weight(shape, seed)
    first, core, last = higher_order(tensor)
    torch.testing.assert_close(merged_tucker(first, core, last), tensor, rtol=0, atol=1e-9)
    errors = errors_by_ranks(core)
    sides = [np.linalg.svd(np.asarray(tensor.transpose(0, axis).flatten(1)), compute_uv=False) ** 2 for axis in (0, 1)]
    whole = float(tensor.square().sum())
    for a, b in itertools.product(range(1, errors.shape[0] + 1), range(1, errors.shape[1] + 1)):
        truncated = merged_tucker(first[:b], core[:a, :b], last[:, :a])
        found = float(errors[a - 1, b - 1])
        assert found == pytest.approx(float((tensor - truncated).square().sum()) / whole, abs=1e-9)
        assert found <= (sides[0][a:].sum() + sides[1][b:].sum()) / whole + 1e-9  # the usual bound


def test_factors_keep_the_type_of_the_weight():
    tensor, root = weight().float(), channel_root(patches(), 4)
    for part in (*split_spatial_seen(tensor, root, 3), *split_tucker_seen(tensor, root, 3, 2)):
        assert part.dtype == torch.float32
        assert part.is_contiguous()
