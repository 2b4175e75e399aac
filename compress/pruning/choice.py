"""Which channels one cut takes: what may go, what each is worth, and how many of them bring the model to the cut's aim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from compress.config import PruneConfig
from compress.data.base import Inputs
from compress.edits import Edit
from compress.errors import StageError, listed
from compress.measured import PruningSensitivity
from compress.methods.cutting import cubic, geometric
from compress.methods.groups import ChannelGroup
from compress.methods.importance import lowest, random
from compress.methods.times import Times
from compress.models.cost import macs, output_positions, parameters
from compress.pruning.allotment import Allotment, told, with_removed
from compress.pruning.layer_limits import limits_for
from compress.pruning.pace import Pace
from compress.pruning.scores import Batches, scores_of
from compress.pruning.selection import Bounds, Kept, Limits, Selection, Size
from compress.pruning.surgeon import Removed, Surgeon
from compress.seeds import derive_seed

_TRIED_RATIO = 0.5
"""Fraction of its channels that a group loses in its trial: much, so that a wrong wire shows."""
_SHOWN = 5
_NEAR = 0.01
"""How far below its target a model may be, as a fraction of it, before that is worth a word."""
_TIMED = 7
"""Models that are timed at most on the way to a target of latency."""
_RANKED = {
    "local": "in each group alone",
    "global": "over all groups",
    "isomorphic": "over all groups of one kind",
    "sensitivity": "in each group alone, which loses as many as cost the least accuracy for what they save",
}
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Aim:
    """How far one cut goes, counted from the model before the first one."""

    value: float
    """As in the target: the fraction of MACs or parameters that remains, or of the channels that is gone."""
    pressure: float = 1.0
    """How much of the way to the target this is, 0 to 1."""


@dataclass(frozen=True)
class Whole:
    """The model before the first cut: what targets and limits are fractions of."""

    parameters: int
    macs: int
    channels: Mapping[str, int]
    """Of its groups, by name."""


@dataclass(frozen=True)
class Choice:
    """Channels to remove, and what that means for every tensor."""

    removed: Removed
    edits: tuple[Edit, ...]
    notes: tuple[str, ...]
    """How they were chosen where that is not the usual way, and that the target is not met closely where it is not."""
    sensitivity: PruningSensitivity | None = None
    """What the groups cost, where that decided, and how many channels each of them loses."""


@dataclass(frozen=True)
class Meters:
    """What a choice is measured by, where the settings ask for it."""

    batches: Callable[[], Batches]
    """Training samples, for criteria that look at them."""
    costs: Callable[[nn.Module, Sequence[ChannelGroup], Mapping[str, Tensor]], PruningSensitivity]
    """What each group of a model costs, told the scores of its channels."""
    pace: Callable[[], Pace]
    """What times models."""


class OutOfReachError(StageError):
    """The target, or a limit, cannot be met in these multiples; in others it may be."""


class _BlamedError(Exception):
    """Channels could not go together; who is to blame is left alone now."""


def aims_of(config: PruneConfig) -> list[Aim]:
    """How far each cut goes; the last one to the target itself."""
    target, schedule = config.target, config.schedule
    if schedule.one_shot is not None:
        return [Aim(target.settings)]
    is_ratio = target.kind == "ratio"
    final = 1 - target.settings if is_ratio else target.settings
    curve = geometric if schedule.iterative is not None else cubic
    left = curve(final, schedule.steps)[:-1]
    aims = [Aim(1 - share if is_ratio else share, (1 - share) / (1 - final)) for share in left]
    return [*aims, Aim(target.settings)]


class Chooser:
    """Chooses the channels of one cut after the other."""

    def __init__(self, config: PruneConfig, example: Inputs, whole: Whole, warn: Warn) -> None:
        """Take the settings, a batch of each input, what the model was, and who is told of what is left alone."""
        assert config.multiple != "auto", "it is taken before anything is chosen"
        self._config, self._multiple = config, config.multiple
        self._example, self._whole, self._warn = example, whole, warn

    def choose(self, surgeon: Surgeon, aim: Aim, meters: Meters, seed: int) -> Choice:
        """The channels of the surgeon's model that go now; groups that cannot be cut or scored are left alone.

        Args:
            surgeon: of the model as it is now.
            aim: how far to go.
            meters: what is measured on the way.
            seed: of the criterion 'random'.

        Raises:
            OutOfReachError: where the target, or a limit, cannot be met, naming what can.
        """
        config, model = self._config, surgeon.model
        limits, found = self._limits(surgeon, aim), list(surgeon.groups)
        if config.schedule.steps > 1:
            # Once one group of a convolution is left it is a usual one, whose channels count one by one: other units.
            coarse = [group for group in surgeon.groups if any(len(members) > 1 for members in group.members)]
            surgeon.exclude(
                {group.name: "loses whole groups of a convolution, which one_shot alone cuts" for group in coarse}
            )
        few = [group for group in surgeon.groups if group.channels <= limits.multiple_of(group)]
        surgeon.exclude({group.name: f"has {group.channels} channels, not more than the multiple" for group in few})
        surgeon.try_groups({group.name: _tried(group, limits.on_trial()) for group in surgeon.groups})
        for group in surgeon.groups:
            self._check_room(group, replace(limits, pressure=1.0))
        scores = scores_of(model, surgeon.groups, config.criterion, config.reduction, meters.batches, seed)
        if dumb := [group.name for group in surgeon.groups if group.name not in scores]:
            reason = f"nothing of them can be scored by '{config.criterion}'"
            self._warn(f"the channels of {listed(map(repr, dumb), _SHOWN)} are left alone: {reason}")
            surgeon.exclude(dict.fromkeys(dumb, reason))
        costs = meters.costs(model, surgeon.groups, scores) if config.ranking == "sensitivity" else None
        size = _Remaining(model, self._example, self._whole, self._counted)
        while True:
            try:
                choice = self._choice(surgeon, scores, limits, aim, size, costs, meters)
            except _BlamedError:
                continue  # each group passed its trial, but not with as many channels as the target takes
            self._warn_of_ceilings(found, surgeon)
            return choice

    def _choice(
        self,
        surgeon: Surgeon,
        scores: Mapping[str, Tensor],
        limits: Limits,
        aim: Aim,
        size: _Remaining,
        costs: PruningSensitivity | None,
        meters: Meters,
    ) -> Choice:
        """The channels that go, of the groups that are left.

        Raises:
            _BlamedError: where they cannot go together.
        """
        config, model = self._config, surgeon.model
        kinds = {group.name: _kind(model, group) for group in surgeon.groups}
        allotment = None if costs is None else Allotment(costs, surgeon.groups, limits, size.of_one(scores))
        plan = None if allotment is None else allotment.at
        selection = Selection(surgeon.groups, scores, limits, config.ranking, config.normalize, kinds, plan)
        if config.target.kind == "latency":
            kept, times = self._kept_in_time(selection, size, surgeon, meters.pace())
            timed = [f"{times.share:.3f} of the time remains ({times}, {config.timed_as}, one sample, one thread)"]
        else:
            kept, timed = self._kept(selection, size, surgeon, aim), []
        removed = selection.removed(kept)
        notes = [*self._told(selection, kept, size), *timed]
        if costs is not None and allotment is not None:
            notes.append(told(costs, removed, allotment.loss(kept)))
            costs = with_removed(costs, removed)
        return Choice(removed, _proven(surgeon, removed), tuple(notes), costs)

    def _kept_in_time(self, selection: Selection, size: _Remaining, surgeon: Surgeon, pace: Pace) -> tuple[Kept, Times]:
        """The most channels that can stay within the time, as far as a few measurements tell.

        What is searched is the fraction of MACs: of two models whose channels go by the same rule, the smaller one is not
        always the faster one, so that there may be better ones that are not found.
        """
        target = self._config.target.settings
        tried: dict[tuple[int, ...], Times] = {}

        def times(kept: Kept) -> Times:
            key = tuple(kept[group.name] for group in selection.groups)
            if key not in tried:
                tried[key] = pace.times(surgeon.model, _proven(surgeon, selection.removed(kept)))
            return tried[key]

        best: Kept = selection.at(1.0)
        least = times(best)
        if least.share > target:
            own = ", or at that of prune.layers" if self._config.layers else ""
            raise OutOfReachError(
                f"prune.target.latency: {target:g} cannot be reached: {least.share:.3f} of the time remains ({least}) with every "
                f"group at its floor of {self._config.floor:.0%} of its channels{own}, in multiples of {self._multiple}"
                + (f"; left alone: {_described(surgeon.left_alone)}" if surgeon.left_alone else "")
            )
        low, high = size.of(selection, best), 1.0
        for _ in range(_TIMED):
            middle = (low + high) / 2
            kept = selection.meeting(middle, lambda some: size.of(selection, some))
            assert kept is not None, "less remains at the floors"
            if times(kept).share > target:
                high = middle
                continue
            low, best = middle, kept
            if times(kept).share >= target * (1 - _NEAR):
                break
        return best, times(best)

    @property
    def _counted(self) -> Literal["macs", "parameters"]:
        return "parameters" if self._config.target.kind == "parameters" else "macs"

    def _limits(self, surgeon: Surgeon, aim: Aim) -> Limits:
        config = self._config
        found = {group.name: entry for group in surgeon.groups if (entry := limits_for(group.producers, config.layers))}
        of = {
            name: Bounds(entry.multiple or self._multiple, entry.floor or config.floor, entry.ceiling or 1.0)
            for name, entry in found.items()
        }
        return Limits(self._multiple, config.floor, of, self._whole.channels, aim.pressure)

    def _check_room(self, group: ChannelGroup, limits: Limits) -> None:
        least, most = limits.range(group)
        if least > most:
            entry = limits_for(group.producers, self._config.layers)
            assert entry is not None
            raise OutOfReachError(
                f"prune.layers: no multiple of {limits.multiple_of(group)} lies between the floor and the ceiling that "
                f"'{entry.match}' gives the {limits.channels(group)} channels of '{group.name}': at least {least} stay, and at "
                f"most {most} may; lower the floor, raise the ceiling, or take a smaller multiple"
            )

    def _kept(self, selection: Selection, size: _Remaining, surgeon: Surgeon, aim: Aim) -> Kept:
        config = self._config
        if config.target.kind == "ratio":
            return selection.at(aim.value)
        # Not only this cut's aim: nobody wants to know after hours that the target itself is out of reach.
        reach = size.of(selection, selection.at(1.0))
        if reach > config.target.settings:
            own = ", or at that of prune.layers" if config.layers else ""
            raise OutOfReachError(
                f"prune.target.{config.target.kind}: {config.target.settings} cannot be reached: {reach:.3f} remains with "
                f"every group at its floor of {config.floor:.0%} of its channels{own}, in multiples of {self._multiple}"
                + (f"; left alone: {_described(surgeon.left_alone)}" if surgeon.left_alone else "")
            )
        kept = selection.meeting(aim.value, lambda some: size.of(selection, some))
        assert kept is not None
        return kept

    def _told(self, selection: Selection, kept: Kept, size: _Remaining) -> Iterator[str]:
        config, usual = self._config, type(self._config).model_fields
        if any(getattr(config, name) != usual[name].default for name in ("criterion", "reduction", "ranking")):
            by = f", scores of a group's tensors by their {config.reduction}" if config.criterion != "random" else ""
            yield f"channels chosen by '{config.criterion}'{by}, ranked {_RANKED[config.ranking]}"
        target = config.target
        left = size.of(selection, kept)
        if (
            target.kind in ("macs", "parameters")
            and any(selection.removed(kept).values())
            and left < target.settings * (1 - _NEAR)
        ):
            ceilings = any(entry.ceiling is not None for entry in config.layers)
            how = "whole multiples" + (" and the ceilings of prune.layers" if ceilings else "")
            yield f"{left:.3f} remains, as near to target.{target.kind} {target.settings:g} as {how} come"

    def _warn_of_ceilings(self, groups: Sequence[ChannelGroup], surgeon: Surgeon) -> None:
        """Say which layers keep more than they may, because they are left alone."""
        by_name = {group.name: group for group in groups}
        for name, reason in surgeon.left_alone.items():
            group = by_name.get(name)
            entry = limits_for(group.producers if group is not None else (name,), self._config.layers)
            if entry is None or entry.ceiling is None:
                continue
            if group is None or group.channels > entry.ceiling * self._whole.channels.get(name, group.channels):
                self._warn(
                    f"prune.layers: '{name}' keeps more than the ceiling of {entry.ceiling:g}: it is left alone ({reason})"
                )


class _Remaining:
    """What remains of the whole model after a cut."""

    def __init__(self, model: nn.Module, example: Inputs, whole: Whole, counted: Literal["macs", "parameters"]) -> None:
        now = Whole(parameters(model), macs(model, tuple(tensor[:1] for tensor in example)), {})
        self._size = Size(model, output_positions(model, example), now.parameters, now.macs)
        # Where nothing has gone yet this is 1.
        self._share: float = getattr(now, counted) / max(1, getattr(whole, counted))
        self._counted = counted

    def of(self, selection: Selection, kept: Kept) -> float:
        """The fraction of the whole that remains where these channels stay."""
        return self._share * self._size.remains(selection.groups, selection.removed(kept), self._counted)

    def of_one(self, scores: Mapping[str, Tensor]) -> Callable[[ChannelGroup, int], float]:
        """The fraction of the model as it is now that remains where one group alone keeps this many channels."""

        def remains(group: ChannelGroup, channels: int) -> float:
            gone = lowest(scores[group.name], group.channels - channels, group.blocks)
            return self._size.remains([group], {group.name: gone}, self._counted)

        return remains


def _proven(surgeon: Surgeon, removed: Removed) -> tuple[Edit, ...]:
    edits = surgeon.edits(removed)
    if edits is None:
        raise _BlamedError
    return edits


def _tried(group: ChannelGroup, limits: Limits) -> list[int]:
    """Channels to remove on trial, here and there: those at one end would tell less of a shuffle."""
    gone = group.channels - limits.kept(group, group.channels * (1 - _TRIED_RATIO))
    return lowest(random(group.channels, derive_seed(0, "trial", group.name)), gone, group.blocks)


def _kind(model: nn.Module, group: ChannelGroup) -> tuple[tuple[str, str, int], ...]:
    """The kinds of layers and the axes of a group's tensors: what scores of two groups must share to be compared."""
    found = []
    for item in group.coupled:
        layer, _, leaf = item.tensor.rpartition(".")
        found.append((type(model.get_submodule(layer)).__name__, leaf, item.axis))
    return tuple(sorted(set(found)))


def _described(left_alone: Mapping[str, str]) -> str:
    return listed((f"{name} ({reason})" for name, reason in left_alone.items()), _SHOWN)
