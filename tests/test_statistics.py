"""Intervals against independent computations, and what must hold for all inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compress.methods.statistics import (
    is_noisy_repeat,
    largest_loss,
    median_interval,
    middle_half_mean,
    paired_difference,
    paired_ratio,
    quantile,
    tellable_difference,
    two_proportions_differ,
    wilson,
)

counts = st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300)
floats = st.floats(-1e6, 1e6)


def columns(rows):
    """Two boolean vectors from a list of pairs."""
    table = np.array(rows, dtype=bool).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def from_counts(neither, only_reference, only_other, both):
    """Two boolean vectors with these numbers of samples."""
    cells = [(False, False), (True, False), (False, True), (True, True)]
    return columns(np.repeat(cells, [neither, only_reference, only_other, both], axis=0))


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 17), (17, 17), (3, 10), (360, 719), (9344, 10000)])
def test_wilson_agrees_with_scipy(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(counts)
def test_wilson_holds_the_proportion_and_mirrors(count):
    correct, n = count
    low, high = wilson(correct, n)
    assert 0 <= low < high <= 1
    if n:
        assert low <= correct / n <= high
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts.filter(lambda count: count[1] > 0), st.integers(2, 50))
def test_wilson_narrows_with_more_samples(count, times):
    correct, n = count
    few, many = wilson(correct, n), wilson(correct * times, n * times)
    assert many[1] - many[0] < few[1] - few[0]


def test_wilson_without_samples_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_impossible_counts_are_refused(correct, n):
    with pytest.raises(ValueError, match=f"got {correct} of {n}"):
        wilson(correct, n)
    with pytest.raises(ValueError, match=f"got {correct} of {n}"):
        two_proportions_differ(1, 2, correct, n)


def test_paired_difference_agrees_with_published_code():
    # R package statpsych, documentation of ci.prop.ps(.05, 12, 4, 26, 6); Bonett & Price are its authors' source.
    difference, low, high = paired_difference(*from_counts(12, 4, 26, 6))
    assert difference == pytest.approx(22 / 48)
    assert (low, high) == pytest.approx((0.2548067, 0.6251933), abs=5e-8)


def test_paired_difference_covers_what_it_promises():
    """Exact coverage, from all outcomes of small samples with a few cell probabilities."""
    n = 30
    for only_reference, only_other in [(0.1, 0.1), (0.05, 0.2), (0.3, 0.1), (0.02, 0.02)]:
        covered = 0.0
        for b in range(n + 1):
            for c in range(n + 1 - b):
                _, low, high = paired_difference(*from_counts(n - b - c, b, c, 0))
                if low <= only_other - only_reference <= high:
                    cells = [only_reference, only_other, 1 - only_reference - only_other]
                    covered += stats.multinomial.pmf([b, c, n - b - c], n, cells)
        assert covered > 0.94


@given(pairs)
def test_paired_difference_holds_the_difference_and_mirrors(rows):
    reference, other = columns(rows)
    difference, low, high = paired_difference(reference, other)
    assert -1 <= low <= difference <= high <= 1
    if rows:
        assert difference == pytest.approx(other.mean() - reference.mean(), abs=1e-12)
    assert paired_difference(other, reference) == pytest.approx((-difference, -high, -low), abs=1e-12)


@given(pairs.filter(bool))
def test_paired_difference_narrows_with_more_samples(rows):
    (_, low, high), (_, low_many, high_many) = paired_difference(*columns(rows)), paired_difference(*columns(rows * 20))
    assert high_many - low_many < high - low


def test_paired_difference_ignores_order_and_agreement_narrows_it():
    reference, other = from_counts(10, 20, 5, 100)
    shuffle = np.random.default_rng(0).permutation(len(reference))
    assert paired_difference(reference[shuffle], other[shuffle]) == paired_difference(reference, other)
    _, low, high = paired_difference(reference, other)
    # Unpaired samples of the same accuracies differ in more places.
    _, low_unpaired, high_unpaired = paired_difference(reference, np.sort(other)[::-1])
    assert high - low < high_unpaired - low_unpaired


@given(pairs.filter(bool), st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_confidence_takes_a_wider_interval_around_the_same_difference(rows, one, other):
    less, more = sorted((one, other))
    narrow, wide = (paired_difference(*columns(rows), confidence) for confidence in (less, more))
    assert narrow[0] == wide[0]
    assert wide[1] <= narrow[1] <= narrow[2] <= wide[2]
    assert paired_difference(*columns(rows), 0.95) == paired_difference(*columns(rows))


@given(pairs, st.floats(0.5, 0.999))
def test_the_largest_loss_is_the_end_of_an_interval_that_leaves_as_much_out_on_either_side(rows, confidence):
    reference, other = columns(rows)
    bound = largest_loss(reference, other, confidence)
    assert bound == -paired_difference(reference, other, 2 * confidence - 1)[1]
    assert -1 <= bound <= 1


def test_the_largest_loss_is_exceeded_as_rarely_as_it_promises():
    """Exactly, from all outcomes of small samples."""
    n, confidence = 40, 0.95
    for only_reference, only_other in [(0.1, 0.1), (0.2, 0.05), (0.15, 0.1)]:
        held = 0.0
        for b in range(n + 1):
            for c in range(n + 1 - b):
                if only_reference - only_other <= largest_loss(*from_counts(n - b - c, b, c, 0), confidence):
                    cells = [only_reference, only_other, 1 - only_reference - only_other]
                    held += stats.multinomial.pmf([b, c, n - b - c], n, cells)
        assert held > confidence - 0.02


def test_the_largest_loss_without_doubt_is_above_nothing_on_few_samples():
    alike = np.ones(50, bool)
    assert largest_loss(alike, alike, 0.95) > largest_loss(np.ones(500, bool), np.ones(500, bool), 0.95) > 0


def test_paired_difference_without_samples_knows_nothing():
    assert paired_difference(*columns([])) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        (np.ones(3, bool), np.ones(4, bool), r"one length, got \(3,\) and \(4,\)"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), "vectors"),
        (np.ones(3, int), np.ones(3, bool), "boolean, got int64 and bool"),
    ],
)
def test_paired_difference_refuses_what_is_no_pair_of_boolean_vectors(reference, other, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(reference, other)


@pytest.mark.parametrize("table", [(99, 100, 90, 100), (500, 1000, 520, 1000), (3, 4, 1, 9), (360, 360, 700, 719)])
def test_two_proportions_agree_with_the_chi_squared_test(table):
    correct_a, n_a, correct_b, n_b = table
    observed = [[correct_a, n_a - correct_a], [correct_b, n_b - correct_b]]
    expected = stats.chi2_contingency(observed, correction=False).pvalue
    assert two_proportions_differ(*table) == pytest.approx(expected, rel=1e-9)


@given(counts, counts)
def test_two_proportions_give_a_probability_and_swap(a, b):
    p_value = two_proportions_differ(*a, *b)
    assert 0 <= p_value <= 1
    assert two_proportions_differ(*b, *a) == pytest.approx(p_value, abs=1e-12)


@pytest.mark.parametrize("table", [(0, 0, 5, 10), (5, 10, 0, 0), (10, 10, 5, 5), (0, 10, 0, 5), (5, 10, 10, 20)])
def test_two_proportions_that_cannot_differ(table):
    assert two_proportions_differ(*table) == 1.0


def test_training_on_validation_stands_out():
    assert two_proportions_differ(5000, 5000, 9339, 10000) < 1e-12


@pytest.mark.parametrize("n", [*range(1, 60), 100, 999, 2001])
def test_median_interval_is_the_narrowest_that_covers(n):
    """The interval of 0, 1, …, n-1 tells the ranks it takes; their coverage is a binomial probability."""
    median, low, high = median_interval(np.arange(n)[::-1])
    assert median == (n - 1) / 2
    assert low + high == n - 1
    rank = int(low) + 1

    def coverage(k):
        return stats.binom.pmf(np.arange(k, n - k + 1), n, 0.5).sum()

    if n < 6:
        assert rank == 1
        return
    assert coverage(rank) >= 0.95
    assert coverage(rank + 1) < 0.95


def test_median_interval_covers_in_simulation():
    samples = np.random.default_rng(0).lognormal(size=(1000, 25))
    hits = sum(low <= 1.0 <= high for _, low, high in map(median_interval, samples))
    # 95.7 % expected; four standard errors below.
    assert hits >= 930


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1, 9, 2], 4.0),
        ([100, 3, 2, -50], 2.5),
        ([5, 5, 5, 6, 900], 16 / 3),
        ([0, 0, 1, 2, 3, 4, 99, 99], 2.5),
    ],
)
def test_middle_half_mean_by_hand(values, expected):
    assert middle_half_mean(values) == pytest.approx(expected)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=60), st.randoms())
def test_middle_half_mean_ignores_order_and_outliers(values, random):
    shuffled = random.sample(values, len(values))
    found = middle_half_mean(shuffled)
    assert found == middle_half_mean(sorted(values))
    # A quarter of them may be anything: whatever they are, it stays among the others.
    wild = sorted(values)[: len(values) - len(values) // 4] + [10**9] * (len(values) // 4)
    assert min(values) <= found == middle_half_mean(wild) <= max(values)


def test_middle_half_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mean needs at least one value"):
        middle_half_mean([])


def test_median_interval_of_many_values_agrees_with_the_binomial_quantile():
    n = 1_000_000
    _, low, _ = median_interval(np.arange(n))
    # ppf is the smallest k with P(B <= k) >= 2.5 %, so P(B < k) is below and k the rank.
    assert low + 1 == stats.binom.ppf(0.025, n, 0.5)


@given(st.lists(floats, min_size=1, max_size=60))
def test_median_interval_is_ordered_and_mirrors(values):
    median, low, high = median_interval(values)
    assert min(values) <= low <= median <= high <= max(values)
    assert median_interval([-value for value in values]) == (-median, -high, -low)


@given(st.lists(floats, min_size=1, max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise(values, q, r):
    low, high = sorted((q, r))
    assert quantile(values, 0) == min(values)
    assert quantile(values, 1) == max(values)
    assert quantile(values, low) <= quantile(values, high) + 1e-9 * max(map(abs, values))


def test_quantile_lies_between_order_statistics():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.9) == pytest.approx(3.7)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


times = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40).map(np.array)


@given(times)
def test_paired_ratio_is_that_of_the_pairs_and_inverts(pairs):
    above, below = pairs[:, 0], pairs[:, 1]
    value, low, high = paired_ratio(above, below)
    ratios = np.sort(above / below)
    middle = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    assert value == pytest.approx(np.sqrt(middle[0] * middle[1]))
    # The ends are ratios of single pairs, as far from either end as those of the interval of a median.
    _, first, last = median_interval(np.arange(len(ratios)))
    assert (low, high) == pytest.approx((ratios[int(first)], ratios[int(last)]))
    assert paired_ratio(below, above) == pytest.approx((1 / value, 1 / high, 1 / low))


@given(times, st.floats(0.01, 100))
def test_paired_ratio_scales_and_ignores_what_slows_both(pairs, factor):
    above, below = pairs[:, 0], pairs[:, 1]
    value, low, high = paired_ratio(above, below)
    drift = np.linspace(1, 5, len(pairs))
    assert paired_ratio(above * drift, below * drift) == pytest.approx((value, low, high))
    scaled = factor * value, factor * low, factor * high
    assert paired_ratio(above * factor, below) == pytest.approx(scaled)


@given(times)
def test_paired_ratio_of_equal_things_is_one(pairs):
    assert paired_ratio(pairs[:, 0], pairs[:, 0]) == (1.0, 1.0, 1.0)


def test_paired_ratio_covers_in_simulation():
    random = np.random.default_rng(0)
    drift = random.lognormal(sigma=1.0, size=(1000, 15))
    above, below = (drift * random.lognormal(mean=mean, sigma=0.05, size=drift.shape) for mean in (0.1, 0.0))
    found = [paired_ratio(*pair) for pair in zip(above, below, strict=True)]
    # 96.5 % expected with 15 pairs; four standard errors below.
    assert sum(low <= np.exp(0.1) <= high for _, low, high in found) >= 942
    # Unpaired, the drift would drown a tenth.
    assert sum(low > 1 for _, low, _ in found) >= 900


@pytest.mark.parametrize(
    ("above", "below", "message"),
    [
        ([1.0], [1.0, 2.0], "one length"),
        ([1.0, 0.0], [1.0, 2.0], "positive"),
        ([1.0, 1.0], [1.0, -2.0], "positive"),
        ([1.0, np.inf], [1.0, 2.0], "finite"),
        ([], [], "at least one"),
    ],
)
def test_paired_ratio_refuses_what_has_none(above, below, message):
    with pytest.raises(ValueError, match=message):
        paired_ratio(above, below)


@pytest.mark.parametrize(
    ("interval", "noisy", "difference"),
    [
        ((1.0, 1.0), False, 0.0),
        ((0.98, 1.02), False, 1 / 0.98 - 1),
        ((0.99, 1.049), False, 0.049),
        ((0.99, 1.051), True, 0.051),
        ((1 / 1.051, 1.0), True, 0.051),
        ((0.6, 2.0), True, 1.0),
        # Away from 1 in all rounds, but narrow: by 2 % one cannot help, by more than 3 % something is wrong.
        ((1.02, 1.03), False, 0.03),
        ((1.031, 1.04), True, 0.04),
        ((0.96, 0.97), True, 1 / 0.96 - 1),
    ],
)
def test_noise_is_how_far_equal_things_seem_apart(interval, noisy, difference):
    low, high = interval
    assert is_noisy_repeat(low, high) is noisy
    assert tellable_difference(low, high) == pytest.approx(difference)
    # The same of the two the other way round.
    assert is_noisy_repeat(1 / high, 1 / low) is noisy
    assert tellable_difference(1 / high, 1 / low) == pytest.approx(difference)


def test_planted_noise_is_found_and_its_absence_too():
    """Rounds of equal things: with 1 % of spread nine in ten repeats pass, with 20 % none does."""
    random = np.random.default_rng(0)

    def noisy(sigma):
        rounds = random.lognormal(sigma=sigma, size=(200, 2, 10))
        return sum(is_noisy_repeat(*paired_ratio(*pair)[1:]) for pair in rounds)

    assert noisy(0.01) <= 20
    assert noisy(0.2) == 200
