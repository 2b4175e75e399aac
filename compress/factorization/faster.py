"""Splits that really save time: what is not faster where it runs is forgotten, and the others are chosen again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.factorization.forms import Form
from compress.factorization.ranks import Layer, OutOfReachError
from compress.methods.times import Times

Choose = Callable[[Sequence[Layer]], dict[str, Form]]
"""Forms of some layers; OutOfReachError where their target cannot be met."""
Time = Callable[[Mapping[str, Form]], Mapping[str, Times]]
"""Times of each of these layers, whole and in that form; the same answer to the same question."""


@dataclass(frozen=True)
class Kept:
    """What `only_faster` keeps."""

    forms: dict[str, Form]
    slower: dict[str, Times]
    """Layers that stay whole because no split that was tried is faster; the last one tried."""
    is_met: bool
    """Whether the target was met with what is faster."""


def only_faster(layers: Sequence[Layer], choose: Choose, time: Time, faster_by: float) -> Kept:
    """Choose forms, time them, forget those that are not faster, and choose again, until all are.

    Of a form that is too slow all dearer ones of that kind are forgotten, and of the cheaper ones those half the way (by
    logarithm) to where its time would do if it followed the work: then few rounds suffice, and few that are fast are lost.

    Where the rest cannot meet the target any more, those of the last choice that are faster are kept. The cheapest forms of
    all would come nearer to it, but would cost far more than was asked for in every layer that can be split.

    Args:
        layers: with all their forms.
        choose: how forms are chosen.
        time: whole layers and forms.
        faster_by: the fraction of its time that a layer must save, 0 to 1.

    Raises:
        OutOfReachError: from the first call of `choose`.
    """
    chosen, slower = choose(layers), dict[str, Times]()
    while True:
        times = time(chosen) if chosen else {}
        found = {name: each for name, each in times.items() if not _is_faster(each, faster_by)}
        slower |= found
        if not found:
            return Kept(chosen, _whole(slower, chosen), is_met=True)
        layers = [
            _without(layer, chosen[layer.name], found[layer.name], faster_by) if layer.name in found else layer
            for layer in layers
        ]
        try:
            chosen = choose(layers)
        except OutOfReachError:
            forms = {name: form for name, form in chosen.items() if name not in found}
            return Kept(forms, _whole(slower, forms), is_met=False)


def _is_faster(times: Times, faster_by: float) -> bool:
    return times.after_ms < times.before_ms and times.after_ms <= times.before_ms * (1 - faster_by)


def _without(layer: Layer, slow: Form, times: Times, faster_by: float) -> Layer:
    needed = times.before_ms * (1 - faster_by)
    most = slow.macs * math.sqrt(min(1.0, needed / times.after_ms)) if times.after_ms > 0 else 0.0
    left = (form for form in layer.forms if form.split != slow.split or form.macs <= most)
    return replace(layer, forms=tuple(form for form in left if form != slow))


def _whole(slower: Mapping[str, Times], forms: Mapping[str, Form]) -> dict[str, Times]:
    return {name: times for name, times in slower.items() if name not in forms}
