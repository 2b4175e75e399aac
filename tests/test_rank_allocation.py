"""Which option each layer takes, against all combinations tried one by one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.methods.rank_allocation import Option, allocate

OPTIONS = st.lists(st.builds(Option, st.integers(0, 60), st.floats(0, 10)), min_size=1, max_size=5)
WHOLE = st.builds(Option, st.integers(1, 60), st.just(0.0))
LAYER = st.builds(lambda whole, others: [whole, *others], WHOLE, OPTIONS)
LAYERS = st.lists(LAYER, min_size=1, max_size=4).map(
    lambda layers: {f"layer{n}": layer for n, layer in enumerate(layers)}
)


def totals(layers, chosen):
    assert list(chosen) == list(layers)
    options = [layers[name][index] for name, index in chosen.items()]
    return sum(option.macs for option in options), math.fsum(option.error for option in options)


def least_macs(layers):
    return sum(min(option.macs for option in layer) for layer in layers.values())


def most_macs(layers):
    return sum(max(option.macs for option in layer) for layer in layers.values())


def best_error(layers, budget):
    """By trying everything."""
    combinations = itertools.product(*layers.values())
    errors = [math.fsum(x.error for x in some) for some in combinations if sum(x.macs for x in some) <= budget]
    return min(errors)


def longest_step(layers):
    """The most error that lies between neighbouring corners of a layer's hull, found by testing every pair of options."""
    longest = 0.0
    for layer in layers.values():
        for dear, cheap in itertools.permutations(layer, 2):
            if dear.macs <= cheap.macs or dear.error >= cheap.error:
                continue
            slope = (cheap.error - dear.error) / (dear.macs - cheap.macs)
            if all(x.error >= dear.error + slope * (dear.macs - x.macs) - 1e-9 for x in layer):
                longest = max(longest, cheap.error - dear.error)
    return longest


@given(LAYERS, st.integers(0, 250))
def test_within_the_budget_and_near_the_best_of_all_combinations(layers, above):
    budget = least_macs(layers) + above
    macs, error = totals(layers, allocate(layers, budget))
    assert macs <= budget
    best = best_error(layers, budget)
    assert best - 1e-9 <= error <= best + longest_step(layers) + 1e-9


@given(LAYERS, st.lists(st.integers(0, 250), min_size=2, max_size=6))
def test_more_budget_never_means_more_error(layers, above):
    errors = [totals(layers, allocate(layers, least_macs(layers) + more))[1] for more in sorted(above)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


@given(LAYERS)
def test_both_ends(layers):
    roomy = allocate(layers, most_macs(layers))
    assert totals(layers, roomy)[1] == 0
    for name, index in roomy.items():  # of several without error, the cheapest
        assert layers[name][index].macs == min(option.macs for option in layers[name] if option.error == 0)
    macs, error = totals(layers, allocate(layers, least_macs(layers)))
    assert macs == least_macs(layers)
    assert error == pytest.approx(best_error(layers, macs), abs=1e-9)
    with pytest.raises(ValueError, match=f"the least reachable is {least_macs(layers):,}"):
        allocate(layers, least_macs(layers) - 1)


@given(LAYERS, st.integers(0, 250), st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(layers, above, random):
    names = list(layers)
    random.shuffle(names)
    budget = least_macs(layers) + above
    assert allocate({name: layers[name] for name in names}, budget) == allocate(layers, budget)


def test_of_equal_layers_the_order_decides_nothing_either():
    layer = [Option(10, 0.0), Option(5, 1.0)]
    chosen = [allocate(dict.fromkeys(names, layer), 25) for names in itertools.permutations("abc")]
    assert all(found == chosen[0] for found in chosen)
    assert sorted(chosen[0].values()) == [0, 0, 1]


@given(LAYER, st.integers(0, 250))
def test_a_single_layer_takes_its_best(layer, above):
    layers = {"only": layer}
    budget = least_macs(layers) + above
    assert totals(layers, allocate(layers, budget))[1] == best_error(layers, budget)


def decaying(rng, count, steps=5):
    """Layers whose error falls the slower the more is spent, as that of ranks does."""
    layers = {}
    for n in range(count):
        whole, scale = int(rng.integers(100, 10_000)), rng.uniform(0.1, 1)
        shares = (np.arange(steps) + 1) / (steps + 1)
        layers[f"{n}"] = [
            Option(whole, 0.0),
            *(Option(int(whole * share), float(scale * (1 - share) ** 3)) for share in shares),
        ]
    return layers


def test_nearly_always_the_best_where_errors_are_those_of_ranks():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        layers = decaying(rng, 4)
        budget = int(rng.uniform(least_macs(layers), most_macs(layers)))
        found.append((totals(layers, allocate(layers, budget))[1], best_error(layers, budget)))
    assert sum(error <= best + 1e-12 for error, best in found) >= 36
    assert sum(error for error, _ in found) <= 1.01 * sum(best for _, best in found)


def test_many_layers_leave_little_of_the_budget():
    layers = decaying(np.random.default_rng(1), 100, steps=30)
    for share in (0.3, 0.5, 0.8):
        budget = int(share * most_macs(layers))
        macs, _ = totals(layers, allocate(layers, budget))
        assert 0.999 * budget <= macs <= budget


def test_by_hand():
    layers = {
        "dear": [Option(100, 0.0), Option(60, 1.0), Option(20, 4.0)],  # 1/40, then 3/40 for each saved
        "cheap": [Option(50, 0.0), Option(30, 0.2)],  # 1/100
        "costlier": [Option(10, 0.0), Option(12, 0.1)],  # its factors save nothing
    }
    assert allocate(layers, 160) == {"dear": 0, "cheap": 0, "costlier": 0}
    assert allocate(layers, 140) == {"dear": 0, "cheap": 1, "costlier": 0}
    assert allocate(layers, 139) == {"dear": 1, "cheap": 0, "costlier": 0}  # not both, though 1/100 comes first
    assert allocate(layers, 119) == {"dear": 1, "cheap": 1, "costlier": 0}
    assert allocate(layers, 60) == {"dear": 2, "cheap": 1, "costlier": 0}


def test_an_option_above_the_hull_is_taken_where_only_it_fits():
    layers = {"a": [Option(100, 0.0), Option(90, 0.9), Option(0, 1.0)]}
    assert allocate(layers, 95) == {"a": 1}
    assert allocate(layers, 89) == {"a": 2}


def test_without_layers():
    assert allocate({}, 0) == {}


def test_what_cannot_be_allocated():
    with pytest.raises(ValueError, match=r"a budget of 1,999 .* the least reachable is 2,000"):
        allocate({"a": [Option(5000, 0.0), Option(2000, 1.0)]}, 1999)
    with pytest.raises(ValueError, match="'b' has no options"):
        allocate({"a": [Option(1, 0.0)], "b": []}, 10)
    for error in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=f"'a' has an option of error {error}"):
            allocate({"a": [Option(1, 0.0), Option(0, error)]}, 10)
