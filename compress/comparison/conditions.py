"""Conditions such as `accuracy_drop>1.0`, on which `compress compare` fails: from their text to what is to be said.

Pure: what the figures are is for others to find out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from compress.errors import CompressError, listed, nearest

OPTION = "--fail-if"
RELATIONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
QUANTITIES: Final[Mapping[str, str]] = {
    "accuracy_drop": "points of validation accuracy lost against the baseline",
    "test_accuracy_drop": "points of test accuracy lost",
    "accuracy": "validation accuracy, percent",
    "test_accuracy": "test accuracy, percent",
    "size_bytes": "bytes of the ONNX file",
    "gzip_bytes": "its bytes once gzipped",
    "size_ratio": "times smaller than the baseline",
    "latency_ms": "median milliseconds of a call, smallest batch and most threads that were measured",
    "speedup": "times faster than the baseline in that setting",
    "parameters": "parameters of the model, before batch normalisation is folded",
    "macs": "multiply-accumulates of a sample",
}
FLAGS: Final[Mapping[str, str]] = {"budget_missed": "the run missed the accuracy budget of its own pipeline file"}

_FORM = re.compile(r"\s*(?P<name>[^\s<>=!]*)\s*(?P<relation>[<>=!]*)\s*(?P<limit>.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """Something that must not hold."""

    quantity: str
    """One of `QUANTITIES`, or of `FLAGS`."""
    relation: str = ""
    """One of `RELATIONS`; empty for a flag."""
    limit: float = 0.0

    def holds(self, value: float) -> bool:
        """Whether it holds of a value; of a flag, whether it is set."""
        return RELATIONS[self.relation](value, self.limit) if self.relation else bool(value)

    def __str__(self) -> str:
        return f"{self.quantity}{self.relation}{_exact(self.limit)}" if self.relation else self.quantity


@dataclass(frozen=True)
class Unknown:
    """A figure that cannot be had, and why."""

    reason: str


Figures = Mapping[str, float | Unknown]
"""A value for each of `QUANTITIES` and `FLAGS`."""


@dataclass(frozen=True)
class Verdict:
    """What conditions say of some models, a line each."""

    failed: tuple[str, ...]
    """Conditions that hold: condition, model and value."""
    unknown: tuple[str, ...]
    """Conditions that cannot be told: condition, model and why. They must not pass for met."""


def parse(text: str) -> Condition:
    """Read a condition.

    Raises:
        CompressError: where it is none; names the nearest quantity and what is allowed.
    """
    match = _FORM.fullmatch(text)
    assert match is not None, "every text has the form"
    name, relation, limit = match["name"], match["relation"], match["limit"]
    at = f"{OPTION} {text.strip() or repr(text)}"
    if name not in QUANTITIES and name not in FLAGS:
        known = [*QUANTITIES, *FLAGS]
        raise CompressError(
            f"{at}: '{name}' is nothing that is compared (there are {listed(known)}){nearest(name, known)}"
        )
    if name in FLAGS:
        if relation or limit:
            raise CompressError(f"{at}: '{name}' takes no limit")
        return Condition(name)
    if not relation:
        hint = "in quotes, because the shell takes > and < for itself"
        raise CompressError(f"{at}: needs a limit, such as '{name}>1.0' ({hint})")
    if relation not in RELATIONS:
        raise CompressError(f"{at}: '{relation}' must be one of {listed(RELATIONS)}")
    return Condition(name, relation, _number(limit, at))


def judge(conditions: Iterable[Condition], models: Mapping[str, Figures]) -> Verdict:
    """What holds of which model, in the order of the conditions.

    Args:
        conditions: what must not hold.
        models: the figures of each, by name.
    """
    failed: list[str] = []
    unknown: list[str] = []
    for condition in dict.fromkeys(conditions):
        for name, figures in models.items():
            value = figures[condition.quantity]
            if isinstance(value, Unknown):
                unknown.append(f"{condition} cannot be told of '{name}': {value.reason}")
            elif condition.holds(value):
                measured = f", its {condition.quantity} is {shown(value)}" if condition.relation else ""
                failed.append(f"{condition} holds for '{name}'{measured}")
    return Verdict(tuple(failed), tuple(unknown))


def shown(value: float) -> str:
    """A figure for people: whole numbers whole, others to six digits, but never without decimals."""
    if value == round(value):
        return f"{value + 0.0:,.0f}"  # -0.0 + 0.0 is 0.0: nothing lost is no loss of minus nothing
    return f"{value:.6g}" if abs(value) < 99_999 else f"{value:,.1f}"


def _number(text: str, at: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CompressError(f"{at}: the limit must be a number, got '{text}'")
    return value


def _exact(value: float) -> str:
    return repr(value).removesuffix(".0")
