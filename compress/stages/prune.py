"""`prune`: remove whole channels, the lowest scores first, then recover the accuracy by training.

With a schedule the channels go in several cuts, with a short training after each but the last, and a sparsity training can come
before the first. These parts are kept as they finish; a killed run goes on with the one that it was killed in.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from pydantic import JsonValue
from torch import nn

from compress.bench.trial_latency import layer_times
from compress.bench.trial_worker import ROUNDS
from compress.checkpoint import Checkpoint, Draft
from compress.config import PruneConfig, RecoveryConfig
from compress.data.base import Batch, Inputs
from compress.edits import EDITS, Attribute, Edit
from compress.errors import StageError
from compress.events import EpochResult, Forwarding, Progress
from compress.files import canonical_json
from compress.methods.times import Timer
from compress.pruning.choice import Aim, Choice, Chooser, Meters, Whole, aims_of
from compress.pruning.layer_limits import warn_of_idle_limits
from compress.pruning.multiples import Taken, take
from compress.pruning.pace import Pace
from compress.pruning.sparse import SparsityPenalty
from compress.pruning.surgeon import Surgeon, cut, is_layer
from compress.pruning.trail import Trail
from compress.seeds import derive_seed
from compress.stages.base import (
    Context,
    Cost,
    Recovered,
    check_forward,
    cost_of,
    described,
    recover,
    recovered,
    trained_to_recover,
    warn_of_idle_patterns,
    what_remains,
)
from compress.stages.group_costs import group_costs
from compress.stages.kept_times import kept_times

_TRIED_SAMPLES = 4
_BATCH = 64
_SECONDS = 0.05
"""Of calls of a whole model in each round of timing."""
_ROUNDS = 16
"""More than medians need: of 16 the interval leaves out the three at either end, which others on the machine disturb."""
_FASTER_BY = 0.02
"""Fraction of its time by which a larger multiple must be faster."""
_TIMES, _MULTIPLE = "times.json", "multiple.json"


def run(parent: Checkpoint, config: PruneConfig, context: Context, *, timer: Timer | None = None) -> Draft:
    """Prune to the target and recover.

    Args:
        parent: the model.
        config: settings.
        context: data, seed, and who else trains along.
        timer: how models are timed for a target of latency, or a multiple; by default in ONNX Runtime.

    Raises:
        StageError: where the target or a limit cannot be met, naming what can.
    """
    model = parent.build(context.trusted)
    example = context.example()
    warn_of_idle_patterns("prune.protect", config.protect, [name for name, _ in model.named_modules()], context)
    timer = kept_times(timer or _timer(config), context.scratch / _TIMES, context.group)
    work = _Work(config, model, example, cost_of(model, example), timer, parent.digest)
    if config.multiple == "auto":
        config = _with_multiple(work, _folder(parent, config, context) / _MULTIPLE, context)
        work = replace(work, config=config)
    *earlier, last = aims_of(config)
    parts: list[_Part] = [*([_sparser] if config.sparsity is not None else [])]
    parts += [functools.partial(_a_cut, number=number, aim=aim) for number, aim in enumerate(earlier, 1)]
    if parts:
        _do(parts, work, _folder(parent, config, context), context)
    return _last_cut(parent, last, work, context)


@dataclass
class _Work:
    """A model on its way, which each part changes in place."""

    config: PruneConfig
    model: nn.Module
    example: Inputs
    before: Cost
    timer: Timer
    parent: str
    """Digest of the checkpoint it comes from."""
    trail: Trail = field(default_factory=Trail)

    @property
    def recovery(self) -> RecoveryConfig:
        """How the parts before the last cut train."""
        assert self.config.recovery is not None, "settings refuse parts that train where there is no recovery"
        return self.config.recovery


def _timer(config: PruneConfig) -> Timer:
    rounds = _ROUNDS if config.multiple == "auto" else ROUNDS
    return functools.partial(layer_times, int8=config.timed_as == "int8", seconds=_SECONDS, rounds=rounds)


def _with_multiple(work: _Work, path: Path, context: Context) -> PruneConfig:
    """The settings with the multiple that pays here, which holds for all cuts; what a killed stage took is taken again."""
    group, kept = context.group, Taken.load(path)
    if not group.told(kept is not None):
        kept = _multiple(work, context)
        if group.leads:
            kept.save(path)
    taken = Taken.model_validate(group.told(kept.model_dump() if kept is not None else None))
    context.note(taken.note)
    return work.config.model_copy(update={"multiple": taken.multiple})


def _multiple(work: _Work, context: Context) -> Taken:
    """Meet the target in each multiple, and time what comes of it."""
    config = work.config
    pace = Pace(work.timer, work.example, "prune.multiple", "give a number")
    # What a candidate is warned of is no matter unless it is taken, and then it is said again.
    quiet = replace(context, notes=[], warnings=[], progress=_Unsaid(context.progress))

    def edits_in(multiple: int) -> tuple[Edit, ...]:
        trial = replace(work, config=config.model_copy(update={"multiple": multiple}))
        # A choice leaves groups alone for good, so that each needs a surgeon of its own.
        return _choice(_surgeon(trial, quiet), aims_of(config)[-1], trial, quiet).edits

    def done(number: int, total: int) -> None:
        context.progress.work("multiples of channels", number, total)

    return take(edits_in, work.model, work.example, pace, _FASTER_BY, done)


class _Unsaid(Forwarding):
    """A `Progress` that shows how far work is, and none of what is said on the way."""

    def note(self, text: str) -> None:
        """Forgets it."""

    def warn(self, text: str) -> None:
        """Forgets it."""


_Part: TypeAlias = Callable[[_Work, Context], None]


def _do(parts: list[_Part], work: _Work, folder: Path, context: Context) -> None:
    """The parts before the last cut, from the first one on that is not done yet; all processes do the same ones."""
    told = len(context.notes), len(context.warnings)
    found = Trail.load(folder, work.model)
    done = context.group.told(0 if found is None else found.done)
    context.group.meet()  # nobody looks once the leader has gone on
    if found is not None:
        if found.done != done:
            raise StageError(f"prune: part {done} is done, but this process finds {found.done} in {folder}")
        context.notes[told[0] :], context.warnings[told[1] :] = found.notes, found.warnings
        context.progress.note(f"goes on after part {done} of {len(parts) + 1} of pruning")
        work.trail = found
    elif done:
        raise StageError(f"prune: part {done} is done, but this process finds nothing of it in {folder}")
    for number, part in enumerate(parts[work.trail.done :], work.trail.done):
        scratch = folder / str(number)
        part(work, _context_of(number, scratch, work, context))
        notes, warnings = context.notes[told[0] :], context.warnings[told[1] :]
        work.trail = replace(work.trail, done=number + 1, notes=tuple(notes), warnings=tuple(warnings))
        if context.group.leads:
            work.trail.save(folder, work.model)
            shutil.rmtree(scratch, ignore_errors=True)


def _context_of(number: int, scratch: Path, work: _Work, context: Context) -> Context:
    """What a part before the last cut works in: chance and training state of its own, epochs counted on."""
    return replace(
        context,
        seed=derive_seed(context.seed, "part", number),
        scratch=scratch,
        cache=context.cache or context.scratch / "teacher",
        progress=_counting_on(work, context.progress),
    )


def _sparser(work: _Work, context: Context) -> None:
    """Train the whole model with a penalty on its channels."""
    config = work.config.sparsity
    assert config is not None
    surgeon = _surgeon(work, context)
    choice = _choice(surgeon, aims_of(work.config)[-1], work, context)
    penalty = SparsityPenalty(work.model, surgeon.groups, config, choice.removed)
    before = context.validation_percent(work.model), penalty.share(work.model)
    # The penalty is the point, not the epoch that validation likes best: that would be the least sparse one.
    training = work.recovery.model_copy(update={"epochs": config.epochs, "early_stopping": None})
    rows = trained_to_recover(work.model, training, context, penalty)
    work.trail = work.trail.longer(rows)
    after = context.validation_percent(work.model), penalty.share(work.model)
    context.note(
        f"sparsity training ({config.kind}, weight {config.weight:g}, {_epochs(rows)}): {before[0]:.2f} % on validation before, "
        f"{after[0]:.2f} % after it; the channels that the target takes hold {before[1]:.1%} of the squared norm before, "
        f"{after[1]:.1%} after it"
    )


def _a_cut(work: _Work, context: Context, *, number: int, aim: Aim) -> None:
    """One of the cuts before the last, and its training."""
    pruned = _cut(_surgeon(work, context), aim, work, context)
    step = f"cut {number} of {work.config.schedule.steps}"
    if not pruned.edits:
        context.note(f"{step}: nothing goes, the model is small enough already; no training")
        return
    quiet = replace(context, notes=[], warnings=[])
    training = work.recovery.model_copy(update={"epochs": work.config.schedule.settings.epochs})
    found = recovered(work.model, training, work.config.batchnorm_samples, quiet)
    for text in quiet.warnings:
        if text not in context.warnings:
            context.warnings.append(text)  # shown already
    work.trail = work.trail.longer(found.training)
    context.note(f"{step}: {what_remains(work.before, cost_of(work.model, work.example))}; {_told(found)}")


def _last_cut(parent: Checkpoint, aim: Aim, work: _Work, context: Context) -> Draft:
    """The cut to the target, and the whole recovery."""
    surgeon = _surgeon(work, context)
    choice = _cut(surgeon, aim, work, context)
    trail = work.trail
    if not trail.pruned:
        context.warn(f"nothing was pruned: {_why_nothing(surgeon, work.config)}")
    steps = work.config.schedule.steps
    step = f"cut {steps} of {steps}: " if steps > 1 else ""
    pruned = f"{len(trail.pruned)} of {len(choice.removed) + len(surgeon.left_alone)} groups pruned"
    context.note(f"{step}{what_remains(work.before, cost_of(work.model, work.example))}; {pruned}")
    for note in choice.notes:
        context.note(note)
    del surgeon  # its random weights are as large as the model, and training takes hours
    following = replace(context, progress=_counting_on(work, context.progress))
    training = recover(work.model, work.config.recovery, work.config.batchnorm_samples if trail.edits else 0, following)
    return Draft(
        parent.arch,
        (*parent.edits, *trail.edits),
        work.model,
        training=trail.longer(training).rows,
        sensitivity=choice.sensitivity,
    )


def _surgeon(work: _Work, context: Context) -> Surgeon:
    """Of the model as it is now; the first one also learns how many channels there are."""
    surgeon = Surgeon(work.model, work.example, _samples(context), work.config.protect, _once(context))
    if work.trail.channels is None:
        work.trail = replace(work.trail, channels={group.name: group.channels for group in surgeon.groups})
        groups = [group.producers for group in surgeon.groups] + [(name,) for name in surgeon.left_alone]
        warn_of_idle_limits(work.config.layers, groups, context.warn)
    return surgeon


def _choice(surgeon: Surgeon, aim: Aim, work: _Work, context: Context) -> Choice:
    def batches() -> Iterator[Batch]:
        return context.samples(work.config.samples, derive_seed(context.seed, "scores")).batches(_BATCH)

    def pace() -> Pace:
        return Pace(work.timer, work.example, "prune.target.latency", "take a target of macs")

    edits: JsonValue = EDITS.dump_python(work.trail.edits, mode="json")
    origin: dict[str, JsonValue] = {"parent": work.parent, "edits": edits}
    meters = Meters(batches, group_costs(work.config.sensitivity_samples, origin, context), pace)
    whole = Whole(work.before.parameters, work.before.macs, work.trail.channels or {})
    return Chooser(work.config, work.example, whole, _once(context)).choose(surgeon, aim, meters, context.seed)


def _cut(surgeon: Surgeon, aim: Aim, work: _Work, context: Context) -> Choice:
    """Choose, and cut the model in place."""
    choice = _choice(surgeon, aim, work, context)
    _tell_of_sizes(work.model, choice.edits, context)
    cut(work.model, choice.edits)
    check_forward(work.model, work.example, len(context.data.classes), "prune: the pruned model")
    lost = [name for name, gone in choice.removed.items() if gone]
    trail = work.trail
    work.trail = replace(
        trail, edits=(*trail.edits, *choice.edits), pruned=tuple(dict.fromkeys((*trail.pruned, *lost)))
    )
    return choice


def _tell_of_sizes(model: nn.Module, edits: tuple[Edit, ...], context: Context) -> None:
    for edit in edits:
        if isinstance(edit, Attribute) and not is_layer(model.get_submodule(edit.module)):
            context.note(f"the model's '{'.'.join(filter(None, (edit.module, edit.name)))}' becomes {edit.value}")


def _samples(context: Context) -> Inputs:
    """A few training samples, far from each other."""
    places = np.linspace(0, len(context.data.train) - 1, _TRIED_SAMPLES).round().astype(int).tolist()
    return next(iter(context.data.train.take(places).batches(_TRIED_SAMPLES))).inputs


def _once(context: Context) -> Callable[[str], None]:
    """Warns, but not of the same thing after each cut."""

    def warn(text: str) -> None:
        if text not in context.warnings:
            context.warn(text)

    return warn


class _CountingOn(Forwarding):
    """A `Progress` that sees the trainings of a stage as one: epochs are counted through all of them."""

    def __init__(self, progress: Progress, before: int, total: int) -> None:
        super().__init__(progress)
        self._before, self._total = before, total

    def epoch(self, result: EpochResult) -> None:
        """Passes it on under its number of all."""
        super().epoch(replace(result, epoch=self._before + result.epoch, epochs=self._total))


def _counting_on(work: _Work, progress: Progress) -> Progress:
    config, schedule = work.config, work.config.schedule
    if config.recovery is None or (config.sparsity is None and schedule.steps == 1):
        return progress
    planned = [config.sparsity.epochs] if config.sparsity is not None else []
    if schedule.steps > 1:
        planned += (schedule.steps - 1) * [schedule.settings.epochs]
    planned.append(config.recovery.epochs)
    # Parts that are done count what they trained: a cut that took nothing trains nothing, and others may stop early.
    before = len(work.trail.rows)
    return _CountingOn(progress, before, before + sum(planned[work.trail.done :]))


def _folder(parent: Checkpoint, config: PruneConfig, context: Context) -> Path:
    """Where finished parts are kept: another folder wherever they would come out otherwise."""
    conditions: Mapping[str, JsonValue] = {
        "parent": parent.digest,
        "reference": context.reference.digest,
        "settings": config.model_dump(mode="json", by_alias=True),
        "seed": context.seed,
        "device": context.device,
        "threads": context.threads,
        "processes": context.group.shard.world,
    }
    return context.scratch / f"parts-{hashlib.sha256(canonical_json(conditions)).hexdigest()[:16]}"


def _told(found: Recovered) -> str:
    trained = f"{found.kept:.2f} % after {_epochs(found.training)} of training"
    return f"{found.straight:.2f} % on validation straight after it, {trained}"


def _epochs(rows: tuple[dict[str, float | int], ...]) -> str:
    return f"{len(rows)} epoch{'' if len(rows) == 1 else 's'}"


def _why_nothing(surgeon: Surgeon, config: PruneConfig) -> str:
    """Which filter excluded the groups."""
    if surgeon.groups:
        return f"no group can lose a multiple of {config.multiple} channels at this target"
    reasons = described(surgeon.left_alone) or "there is no convolution or linear layer"
    return f"no group of channels can be pruned: {reasons}"
