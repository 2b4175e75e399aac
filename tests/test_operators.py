"""Shares of time: they add up, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measured import OperatorTime, Profile
from compress.operators import KINDS, by_kind, by_operator

NODES = [
    ("in", "QuantizeLinear", "convert", 0.5),
    ("a", "QLinearConv", "int8", 4.0),
    ("pool", "MaxPool", "int8", 1.0),
    ("b", "QLinearConv", "int8", 2.0),
    ("c", "Softmax", "float", 1.5),
    ("other pool", "MaxPool", "float", 1.0),
]


def profile(nodes):
    times = [
        OperatorTime(name=name, operator=operator, kind=kind, milliseconds=ms) for name, operator, kind, ms in nodes
    ]
    return Profile(provider="CPUExecutionProvider", batch_size=1, threads=1, calls=5, call_ms=11.0, nodes=tuple(times))


def test_operators_are_summed_by_name_and_kind_the_longest_first():
    found = by_operator(profile(NODES))
    assert [(each.operator, each.kind, each.count, each.milliseconds) for each in found] == [
        ("QLinearConv", "int8", 2, 6.0),
        ("Softmax", "float", 1, 1.5),
        ("MaxPool", "float", 1, 1.0),
        ("MaxPool", "int8", 1, 1.0),
        ("QuantizeLinear", "convert", 1, 0.5),
    ]
    assert [each.share for each in found] == [0.6, 0.15, 0.1, 0.1, 0.05]


def test_kinds_stand_in_one_order_also_where_there_is_none():
    found = by_kind(profile(NODES))
    assert [(each.kind, each.count, each.milliseconds, each.share) for each in found] == [
        ("int8", 3, 7.0, 0.7),
        ("float", 2, 2.5, 0.25),
        ("convert", 1, 0.5, 0.05),
    ]
    (only,) = [each for each in by_kind(profile(NODES[4:5])) if each.count]
    assert (only.kind, only.share) == ("float", 1.0)
    assert [each.kind for each in by_kind(profile([]))] == list(KINDS)


def test_nothing_takes_no_share():
    idle = profile([("a", "Reshape", "float", 0.0)])
    assert [each.share for each in (*by_operator(idle), *by_kind(idle))] == [0.0] * 4
    assert by_operator(profile([])) == ()


@given(
    st.lists(
        st.tuples(
            st.just("node"),
            st.sampled_from(["Conv", "Gemm", "Cast"]),
            st.sampled_from(KINDS),
            st.floats(0, 1e4, allow_subnormal=False),
        ),
        min_size=1,
    )
)
def test_shares_add_up_in_any_order(nodes):
    there, back = profile(nodes), profile(nodes[::-1])
    for share in (by_operator, by_kind):
        found = share(there)
        assert sum(each.count for each in found) == len(nodes)
        assert sum(each.milliseconds for each in found) == pytest.approx(sum(node[3] for node in nodes))
        assert sum(each.share for each in found) == pytest.approx(1.0 if any(node[3] for node in nodes) else 0.0)
        keys = [(getattr(each, "operator", ""), each.kind, each.count) for each in found]
        assert sorted(keys) == sorted((getattr(each, "operator", ""), each.kind, each.count) for each in share(back))
    milliseconds = [each.milliseconds for each in by_operator(there)]
    assert milliseconds == sorted(milliseconds, reverse=True)
