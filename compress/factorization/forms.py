"""The forms that a layer can be split into: what each costs, and how far it is from what the layer does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from compress.edits import Split
from compress.factorization.calls import Call
from compress.factorization.responses import Heard
from compress.methods import lowrank
from compress.methods.seen import (
    channel_root,
    higher_order_seen,
    lost,
    lost_by_spatial,
    lost_by_tucker,
    split_spatial_seen,
    split_tucker_seen,
)
from compress.methods.spatial import merged_spatial, spatial_cost, spatial_values, split_spatial
from compress.methods.tucker import errors_by_ranks, higher_order, merged_tucker, split_tucker, tucker_cost
from compress.methods.whitening import shift_by_outputs, split_by_outputs, values_of_outputs

MOST = 12
"""Ranks, or pairs of ranks, that are tried of a spatial or a Tucker split: how much each loses must be computed."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Form:
    """One way to split a layer."""

    split: Split
    rank: int
    macs: int
    """Multiply-accumulates of all its parts for one sample."""
    error: float
    """Relative squared error, below 1: of the layer's outputs, their mean kept by the bias, or of its weight."""
    rank_in: int | None = None
    """Of 'tucker' only, as `compress.edits.Factor` has it."""

    def __str__(self) -> str:
        return (
            f"{self.split}, rank {self.rank}"
            if self.rank_in is None
            else f"{self.split}, ranks {self.rank_in}, {self.rank}"
        )


@dataclass(frozen=True)
class Limits:
    """Which forms there are."""

    multiple: int
    """Ranks are multiples of this."""
    min_saving: float
    """A layer is split only where that saves this fraction of its work, 0 to 1."""

    def pays(self, cost: tuple[int, int]) -> bool:
        """Whether a split costs enough less, told what the layer costs whole and split."""
        whole, split = cost
        return split <= whole * (1 - self.min_saving)

    def ranks(self, largest: int) -> list[int]:
        """The multiples up to the largest rank, and that."""
        return sorted({lowrank.rounded_rank(rank, self.multiple, largest) for rank in range(1, largest + 1)})


@dataclass(frozen=True, eq=False)
class Weights:
    """What a layer was split into."""

    parts: tuple[Tensor, ...]
    """Weights of its parts, in the order in which they are applied."""
    shift: Tensor | None
    """What to add to the bias, float64; None where only the weight counts."""


def forms_of(
    weight: Tensor, call: Call, splits: Iterable[Split], limits: Limits, heard: Heard | None = None
) -> tuple[Form, ...]:
    """All forms of a layer that cost enough less than it.

    The error is the same measure for all of them. With `heard` it is that of the outputs on calibration samples: of the
    channel split over all positions, in closed form, of the others on the patches that were remembered. Without, it is that
    of the weight. Of Tucker splits it is that of the truncated higher-order SVD, which `split_weights` is never above.

    Args:
        weight: (out, in) or (out, in, h, w).
        call: where the layer is applied.
        splits: which kinds of forms may be taken; those that the layer cannot have, or that would be the same as another,
            are left out: a kernel one pixel wide has no spatial split, one of a single pixel no Tucker split either.
        limits: of ranks, and of costs.
        heard: what the layer does; None to look at its weight only.
    """
    makers = {"channel": _channel, "spatial": _spatial, "tucker": _tucker}
    found = [form for split in dict.fromkeys(splits) for form in makers[split](weight, call, limits, heard)]
    return tuple(form for form in found if form.error < 1)  # else its mean alone would stand for it as well


def full_rank(weight: Tensor) -> int:
    """The rank that a channel split is exact at."""
    return min(lowrank.as_matrix(weight).shape)


def split_weights(weight: Tensor, bias: Tensor | None, form: Form, heard: Heard | None = None) -> Weights:
    """Weights of a form's parts.

    Spatial and Tucker splits are made of the weight alone and of the weight as the inputs weigh it, and the better one on the
    remembered patches is kept: never worse there than the plain one.

    Args:
        weight: (out, in) or (out, in, h, w).
        bias: of the layer.
        form: one of `forms_of`.
        heard: as it was given to `forms_of`.
    """
    if form.split == "channel":
        if heard is None:
            return Weights(lowrank.split(weight, form.rank), None)
        first, second = split_by_outputs(weight, heard.outputs.covariance, form.rank)
        mean = heard.outputs.mean if bias is None else heard.outputs.mean - bias.double()
        return Weights((first, second), shift_by_outputs(second, mean))
    candidates = list(_candidates(weight, form, heard))
    if heard is None or heard.patches is None:
        best = min(candidates, key=lambda parts: float((weight - merged(parts)).double().square().sum()))
        return Weights(best, None)
    rows = heard.patches
    best = min(candidates, key=lambda parts: lost(weight, merged(parts), rows))
    change = lowrank.as_matrix(weight.double() - merged(best).double())
    return Weights(best, change @ rows.double().mean(0))


def merged(parts: Sequence[Tensor]) -> Tensor:
    """The weight of the one convolution that does what a spatial or a Tucker split does."""
    return merged_spatial(*parts) if len(parts) == 2 else merged_tucker(*parts)


def _candidates(weight: Tensor, form: Form, heard: Heard | None) -> Iterable[tuple[Tensor, ...]]:
    seen = None if heard is None or heard.patches is None else channel_root(heard.patches, weight.shape[1])
    if form.split == "spatial":
        yield split_spatial(weight, form.rank)
        if seen is not None:
            yield split_spatial_seen(weight, seen, form.rank)
        return
    assert form.rank_in is not None
    for rounds in (
        0,
        5,
    ):  # alternating lowers the error that is minimised, which with inputs is not quite the one that counts
        yield split_tucker(weight, form.rank, form.rank_in, rounds)
        if seen is not None:
            yield split_tucker_seen(weight, seen, form.rank, form.rank_in, rounds)


def _channel(weight: Tensor, call: Call, limits: Limits, heard: Heard | None) -> Iterable[Form]:
    values = lowrank.singular_values(weight) if heard is None else values_of_outputs(weight, heard.outputs.covariance)
    errors = lowrank.errors_by_rank(values).tolist()
    for rank in limits.ranks(len(errors)):
        cost = lowrank.factor_cost(weight.shape[0], weight[0].numel(), call.out, rank)
        if limits.pays(cost):
            yield Form("channel", rank, cost[1], errors[rank - 1])


def _spatial(weight: Tensor, call: Call, limits: Limits, heard: Heard | None) -> Iterable[Form]:
    if weight.dim() != 4 or weight.shape[3] == 1:
        return
    out, inp, height, width = weight.shape
    all_costs = {
        rank: spatial_cost(out, inp, height, width, call.middle, call.out, rank)
        for rank in limits.ranks(min(out * width, inp * height))
    }
    costs = {rank: cost[1] for rank, cost in all_costs.items() if limits.pays(cost)}
    ranks = _thinned(sorted(costs))
    if not ranks:
        return
    if heard is None or heard.patches is None:
        values = lowrank.errors_by_rank(spatial_values(weight))
        errors = [float(values[rank - 1]) for rank in ranks]
    else:
        seen = channel_root(heard.patches, inp)
        ways = split_spatial(weight, ranks[-1]), split_spatial_seen(weight, seen, ranks[-1])
        curves = [lost_by_spatial(weight, *way, heard.patches, ranks) for way in ways]
        errors = [min(each) for each in zip(*curves, strict=True)]
    for rank, error in zip(ranks, errors, strict=True):
        yield Form("spatial", rank, costs[rank], error)


def _tucker(weight: Tensor, call: Call, limits: Limits, heard: Heard | None) -> Iterable[Form]:
    if weight.dim() != 4 or weight.shape[2:].numel() == 1:
        return
    plain = higher_order(weight.double())
    patches = None if heard is None else heard.patches
    seen = None if patches is None else higher_order_seen(weight, channel_root(patches, weight.shape[1]))
    path = _path(weight, call, limits, errors_by_ranks((plain if seen is None else seen)[1]))
    if not path:
        return
    pairs = [(form.rank, form.rank_in or 0) for form in path]
    errors = [form.error for form in path]
    if patches is not None and seen is not None:
        curves = [lost_by_tucker(weight, way, patches, pairs) for way in (plain, seen)]
        errors = [min(each) for each in zip(*curves, strict=True)]
    for form, error in zip(path, errors, strict=True):
        yield Form("tucker", form.rank, form.macs, error, form.rank_in)


def _path(weight: Tensor, call: Call, limits: Limits, errors: Tensor) -> list[Form]:
    """Pairs of ranks, the cheapest first, of which no other has less error at no more cost; a few of them."""
    out, inp, height, width = weight.shape
    area = height * width
    found: list[Form] = []
    lost_at = errors.tolist()
    for rank in limits.ranks(len(lost_at)):
        for rank_in in limits.ranks(len(lost_at[0])):
            if rank > rank_in * area or rank_in > rank * area:
                continue
            cost = tucker_cost(out, inp, height, width, call.into, call.out, rank, rank_in)
            if limits.pays(cost):
                found.append(Form("tucker", rank, cost[1], lost_at[rank - 1][rank_in - 1], rank_in))
    path: list[Form] = []
    for form in sorted(found, key=lambda form: (form.macs, form.error)):
        if not path or form.error < path[-1].error:
            path.append(form)
    return _thinned(path)


def _thinned(items: Sequence[_Item]) -> list[_Item]:
    """At most `MOST` of them: the first, the last, and some evenly between."""
    if len(items) <= MOST:
        return list(items)
    at = torch.linspace(0, len(items) - 1, MOST).round().int().tolist()
    return [items[position] for position in at]
