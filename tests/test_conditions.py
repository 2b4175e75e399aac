"""Conditions of `compress compare --fail-if`: what they mean, and what they refuse."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.comparison.conditions import FLAGS, QUANTITIES, RELATIONS, Condition, Unknown, judge, parse, shown
from compress.errors import CompressError

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
CONDITIONS = st.builds(Condition, st.sampled_from(list(QUANTITIES)), st.sampled_from(list(RELATIONS)), NUMBERS)


@given(condition=CONDITIONS, space=st.sampled_from(["", " ", "\t "]))
def test_what_is_written_is_read_again(condition, space):
    assert parse(str(condition)) == condition
    spaced = f"{space}{condition.quantity}{space}{condition.relation}{space}{condition.limit!r}{space}"
    assert parse(spaced) == condition


@given(quantity=st.sampled_from(list(QUANTITIES)), value=NUMBERS, limit=NUMBERS)
def test_relations_are_those_of_numbers(quantity, value, limit):
    holds = {relation: Condition(quantity, relation, limit).holds(value) for relation in RELATIONS}
    assert holds[">"] is not holds["<="]
    assert holds["<"] is not holds[">="]
    assert not (holds[">"] and holds["<"])
    assert (holds[">="] and holds["<="]) == (value == limit)


@given(text=st.text(max_size=30))
def test_any_text_is_a_condition_or_a_message(text):
    with contextlib.suppress(CompressError):
        condition = parse(text)
        assert condition.quantity in QUANTITIES or condition.quantity in FLAGS


@given(condition=CONDITIONS, values=st.lists(st.none() | NUMBERS, min_size=1, max_size=5))
def test_every_model_is_passed_failed_or_unknown(condition, values):
    models = {
        f"run {number}": {condition.quantity: Unknown("why") if value is None else value}
        for number, value in enumerate(values)
    }
    verdict = judge([condition], models)
    assert len(verdict.unknown) == sum(value is None for value in values)
    assert len(verdict.failed) == sum(value is not None and condition.holds(value) for value in values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy_drop>1", "'acuracy_drop' is nothing that is compared (there are accuracy_drop, "),
        ("acuracy_drop>1", "; did you mean 'accuracy_drop'?"),
        ("", "'' is nothing that is compared"),
        (">1", "'' is nothing that is compared"),
        (
            "accuracy_drop",
            "needs a limit, such as 'accuracy_drop>1.0' (in quotes, because the shell takes > and < for itself)",
        ),
        ("accuracy_drop 1", "needs a limit"),
        ("accuracy_drop=1", "'=' must be one of >, >=, <, <="),
        ("accuracy_drop!=1", "'!=' must be one of"),
        ("accuracy_drop>>1", "'>>' must be one of"),
        ("accuracy_drop>", "the limit must be a number, got ''"),
        ("accuracy_drop>one", "the limit must be a number, got 'one'"),
        ("accuracy_drop>1.0 points", "the limit must be a number, got '1.0 points'"),
        ("accuracy_drop>nan", "the limit must be a number, got 'nan'"),
        ("accuracy_drop>inf", "the limit must be a number, got 'inf'"),
        ("budget_missed>1", "'budget_missed' takes no limit"),
        ("budget_missed 1", "'budget_missed' takes no limit"),
    ],
)
def test_messages_name_what_is_wrong(text, message):
    with pytest.raises(CompressError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_name_condition_model_and_value():
    models = {
        "a": {
            "accuracy_drop": 1.25,
            "speedup": Unknown("another machine"),
            "budget_missed": 1.0,
            "size_bytes": 148702.0,
        },
        "b": {"accuracy_drop": 1.0, "speedup": 2.0, "budget_missed": 0.0, "size_bytes": 3.0},
    }
    texts = ("accuracy_drop>1.0", "speedup<1.5", "budget_missed", "size_bytes>=1e5", "size_bytes>=100000")
    verdict = judge(map(parse, texts), models)
    assert verdict.failed == (
        "accuracy_drop>1 holds for 'a', its accuracy_drop is 1.25",
        "budget_missed holds for 'a'",
        "size_bytes>=100000 holds for 'a', its size_bytes is 148,702",
    )
    assert verdict.unknown == ("speedup<1.5 cannot be told of 'a': another machine",)


def test_figures_are_shown_whole_or_to_six_digits():
    assert [shown(value) for value in (3424536.0, 0.0, -0.0, -2.0, 1 / 3, 23.0298, 1234567.5, -123456.78)] == [
        "3,424,536",
        "0",
        "0",
        "-2",
        "0.333333",
        "23.0298",
        "1,234,567.5",
        "-123,456.8",
    ]
