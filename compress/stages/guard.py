"""A stage that goes only as far towards its target as the accuracy allows.

Any stage whose settings have a `target` and a `budget` can be searched: it is run as it is, with other values of its target.
Half of validation is all that the trials see, and decides the search; the other half checks what was found, because the best
of several trials looks better than it is on the samples that chose it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from compress.checkpoint import Checkpoint, Draft
from compress.config import SurgeryConfig
from compress.data.splits import halves
from compress.errors import DivergedError, StageError
from compress.methods.search import Axis, search
from compress.seeds import derive_seed
from compress.stages.base import Context, Run
from compress.stages.lost import Comparison, Loss, in_points, rounded_up
from compress.stages.trials import Trials


def guarded(run: Run) -> Run:
    """The stage, held to the budget of its settings where they have one."""

    def held(parent: Checkpoint, config: Any, context: Context, **own: Any) -> Draft:
        if config.budget is None:
            return run(parent, config, context, **own)
        return _Search(functools.partial(run, **own), parent, config, context).draft()

    return held


class _Search:
    """The search of one stage."""

    def __init__(self, run: Run, parent: Checkpoint, config: SurgeryConfig, context: Context) -> None:
        """Divide validation.

        Raises:
            StageError: where there is nothing to divide.
        """
        assert config.budget is not None
        self._parent, self._budget, self._context = parent, config.budget, context
        self._axis = Axis(config.target.nothing[config.target.kind], config.target.settings)
        is_input = self._budget.against == "input"
        standard = parent if is_input else context.reference
        self._standard = "input of this stage" if is_input else "source"
        validation, confidence = context.data.validation, self._budget.confidence
        if len(validation) < 2:
            raise StageError("budget: one half of validation searches and the other checks, but it has 1 sample")
        first, second = (
            validation.take(half) for half in halves(validation.labels, derive_seed(context.seed, "guard"))
        )
        self._searched = Comparison(first, standard, confidence, context)
        self._checked = Comparison(second, standard, confidence, context)
        self._trials = Trials(run, parent, config, context, first)
        self._losses: dict[float, Loss] = {}
        self._idle: list[float] = []
        self._astray: dict[float, str] = {}

    def draft(self) -> Draft:
        """What the stage makes with the strongest setting found that keeps within the budget on both halves.

        Raises:
            StageError: where there is none, or could be none; and whatever the stage raises.
        """
        self._check_resolution()
        self._introduce()
        self._check_input()
        tried = search(self._axis, self._passes, self._budget.trials)
        if self._axis.target in self._idle:
            return self._unchanged()
        passed = [trial.value for trial in tried if trial.passed and trial.value not in self._idle]
        refused: dict[float, Loss] = {}
        for value in self._axis.strongest_first(passed):
            loss = self._checked.loss(self._trials.result(value))
            if self._holds(loss):
                asked = "" if value == self._axis.target else f" instead of {self._axis.target:g}"
                found = f"{self._losses[value]} that chose it, {loss} that did not"
                self._context.note(f"chosen: {self._trials.name(value)}{asked}: {found}")
                return self._chosen(value)
            refused[value] = loss
            self._context.note(f"{self._trials.name(value)} does not hold on the other half: {loss}: too much")
        raise StageError(self._why_none(refused))

    def _unchanged(self) -> Draft:
        """What the target itself makes, where that removes nothing; it says why.

        Raises:
            StageError: where what trained on the way cost too much.
        """
        value = self._axis.target
        result = self._trials.result(value)
        for comparison in (self._searched, self._checked):
            loss = comparison.loss(result)
            if not self._holds(loss):
                raise StageError(
                    f"budget.accuracy_drop: {self._trials.name(value)} removes nothing, but what trains on the way costs too "
                    f"much: {loss}"
                )
        return self._chosen(value)

    def _chosen(self, value: float) -> Draft:
        draft = self._trials.chosen(value)
        self._context.group.meet()  # the leader removes what all have read
        return draft

    def _passes(self, value: float) -> bool:
        """Try a value, and tell how it went."""
        name = self._trials.name(value)
        try:
            self._trials.make(value)
        except DivergedError as error:  # by the same validation in all processes
            self._astray[value] = str(error)
            self._context.note(f"{name}: {error}: too much")
            return False
        result = self._trials.result(value)
        if result.edits == self._parent.edits:
            # What training alone does is no answer; something stronger may be one.
            self._idle.append(value)
            self._context.note(f"{name}: nothing of the model is removed")
            return True
        loss = self._losses[value] = self._searched.loss(result)
        holds = self._holds(loss)
        self._context.note(f"{name}: {loss}: {'within the budget' if holds else 'too much'}")
        return holds

    def _holds(self, loss: Loss) -> bool:
        return loss.decisive <= self._budget.accuracy_drop

    def _introduce(self) -> None:
        budget = self._budget
        sure = "" if budget.confidence is None else f", with {100 * budget.confidence:g} % confidence"
        self._context.note(
            f"budget: {in_points(budget.accuracy_drop)} of accuracy against the {self._standard}{sure}; {len(self._searched):,} "
            f"validation samples are all that the trials see, {len(self._checked):,} others check what is chosen"
        )

    def _check_resolution(self) -> None:
        """Check that models which answer alike would keep within the budget.

        Raises:
            StageError: where they would not.
        """
        least, budget = max(self._searched.least, self._checked.least), self._budget
        if budget.confidence is not None and least > budget.accuracy_drop:
            raise StageError(
                f"budget.confidence: must be lower, or accuracy_drop {rounded_up(least):g} or more, got {budget.confidence} and "
                f"{budget.accuracy_drop:g}: {len(self._checked):,} samples, half of validation, show no less even where "
                "nothing is lost; or give more validation samples, or leave confidence out"
            )

    def _check_input(self) -> None:
        """Check that a model which nothing is removed from keeps within the budget.

        Raises:
            StageError: where what comes in has lost too much already.
        """
        if self._budget.against == "input":
            return
        loss = self._searched.loss(self._parent)
        if not self._holds(loss):
            raise StageError(
                f"budget.accuracy_drop: must be {rounded_up(loss.decisive):g} or more, got {self._budget.accuracy_drop:g}: what "
                f"comes into this stage has lost too much against the source before it begins: {loss}; or set against: input"
            )

    def _why_none(self, refused: Mapping[float, Loss]) -> str:
        """What was tried, what would be within, and what to change."""
        known = refused or self._losses
        if not known:
            return (
                f"budget.accuracy_drop: of all settings tried none keeps within {in_points(self._budget.accuracy_drop)} of the "
                f"{self._standard}: {'; '.join(self._told(refused))}; train more carefully in recovery"
            )
        nearest = min(known, key=lambda value: (known[value].decisive, -self._axis.strength(value)))
        where = "" if refused else " on the half that searches"
        return (
            f"budget.accuracy_drop: of all settings tried none keeps within {in_points(self._budget.accuracy_drop)} of the "
            f"{self._standard}, only the untouched model does: {'; '.join(self._told(refused))}; an accuracy_drop of "
            f"{rounded_up(known[nearest].decisive):g} would allow {self._trials.name(nearest)}{where}; or allow more trials, or "
            "train longer in recovery"
        )

    def _told(self, refused: Mapping[float, Loss]) -> Iterator[str]:
        for value in self._axis.strongest_first([*self._losses, *self._idle, *self._astray]):
            name = self._trials.name(value)
            if value in self._astray:
                yield f"{name}: {self._astray[value]}"
            elif value in self._idle:
                yield f"{name} removes nothing"
            elif value in refused:
                yield f"{name}: {self._losses[value]}, but {refused[value]} that check"
            else:
                yield f"{name}: {self._losses[value]}"
