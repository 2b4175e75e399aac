"""What a step minimises: the model, what learns beside it, and the terms of the loss, as one module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from compress.config import LossEntry, ScheduleConfig
from compress.config.losses import FeatureTermConfig, LogitTermConfig, TermConfig
from compress.data.base import Batch, Inputs
from compress.methods.losses.ensemble import mean_probabilities
from compress.models.answers import logits_of
from compress.seeds import derive_seed
from compress.training.ema import MovingAverage
from compress.training.features import FeatureTerms
from compress.training.layers import listening
from compress.training.perturb import Perturbation
from compress.training.teachers import Teacher
from compress.training.terms import ANSWERS, Step, value_at

Penalty: TypeAlias = Callable[[nn.Module, float], Tensor]
"""From a model and the position in its training, 0 to 1, to a scalar that is added to the loss of each step."""


class _Seen(NamedTuple):
    """What one of the models that learn answers in a step."""

    clean: Tensor | None
    """Logits for the batch as it is; None where nobody needs them."""
    changed: Tensor
    """Logits for what the terms that imitate look at: the perturbed batch, or the batch as it is."""
    features: Mapping[str, Tensor]
    """What its layers give out beside those."""


class Objective(nn.Module):
    """The loss of a step.

    One module holds everything that learns, so that data-parallel training can wrap it as a whole, and everything that
    changes from step to step, so that its `state_dict` is all that a resumed training needs besides the optimizer's.
    The teacher does not learn and is no part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[LossEntry],
        teacher: Teacher | None,
        *,
        share: float | ScheduleConfig | None = None,
        features: FeatureTerms | None = None,
        peers: Sequence[nn.Module] = (),
        ema_decay: float | None = None,
        perturb: Perturbation | None = None,
        seed: int = 0,
        penalty: Penalty | None = None,
    ) -> None:
        """Take all that takes part.

        Args:
            model: the one that is kept.
            losses: the terms. The model has them all; peers all but those that compare layers or imitate the average.
            teacher: who answers for the teacher; None where no term imitates one.
            share: s: what imitates counts s times, all else 1 - s times; None: the weights of the terms alone.
            features: of the terms that compare layers, where there are any.
            peers: models that learn at the same time, each as the mean of all others; needed where a term imitates them.
            ema_decay: decay of the average of the model; needed where a term imitates it.
            perturb: what is done to the inputs of the terms that imitate; where none does, to those of all terms.
            seed: of the perturbations.
            penalty: of the weights of the model; what is kept of a training with one is its end, where the penalty has done
                its work, not the epoch that is best on validation.
        """
        super().__init__()
        self.model = model
        self.peers = nn.ModuleList(peers)
        self.average = MovingAverage(model, ema_decay) if ema_decay is not None else None
        self.features = features
        self.penalty = penalty
        self._terms = [entry.settings for entry in losses]
        self._teacher, self._share = teacher, share
        self._perturb, self._seed = perturb, seed

    def forward(self, batch: Batch, position: float) -> Tensor:
        """The scalar loss of a batch at `position` of the training, 0 (first step) to 1 (last step).

        With peers it is the sum over all models that learn; none of them has a gradient through another's answers.
        """
        learners = [self.model, *self.peers]
        seen = [self._look(place, learner, batch, position) for place, learner in enumerate(learners)]
        average = functools.cache(lambda: self._averages_answer(batch))
        total = seen[0].changed.new_zeros(())
        for place, answers in enumerate(seen):
            wanted: dict[str, Callable[[float], Tensor]] = {
                "teacher": functools.partial(self._teachers_answer, batch),
                "peers": functools.partial(_peers_answer, seen, place),
                "ema": lambda _: average(),
            }
            for number, term in enumerate(self._terms):
                if place == 0 or _is_for_peers(term):
                    loss = self._loss_of(number, term, answers, wanted, batch, position)
                    total = total + term.weight * self._factor(term, position) * loss
        return total if self.penalty is None else total + self.penalty(self.model, position)

    def to_device(self, device: torch.device, layout: torch.memory_format) -> None:
        """Go to a device, 4-d weights in this layout, and take the teacher along."""
        self.to(device=device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this form
        if self._teacher is not None:
            self._teacher.to(device, layout)

    def after_step(self) -> None:
        """Called once after each step of the optimizer."""
        if self.average is not None:
            self.average.follow(self.model)

    def _look(self, place: int, learner: nn.Module, batch: Batch, position: float) -> _Seen:
        layers = self.features.layers if self.features is not None and place == 0 else ()
        if self._perturb is None:
            with listening(learner, layers) as found:
                logits = _logits(learner, batch.inputs)
            return _Seen(logits, logits, found)
        # A step of the training and a part of a batch draw the same, whatever was drawn before them.
        seed = derive_seed(self._seed, "perturb", place, float(position).hex(), int(batch.indices[0]))
        inputs = self._perturb(learner, batch, torch.Generator().manual_seed(seed))
        clean = _logits(learner, batch.inputs) if self._looks_at_clean_inputs else None
        with listening(learner, layers) as found:
            changed = _logits(learner, inputs)
        return _Seen(clean, changed, found)

    @functools.cached_property
    def _looks_at_clean_inputs(self) -> bool:
        """Whether some terms imitate, on perturbed inputs, and others do not; peers are imitated for clean ones, too."""
        kinds = {term.imitated is not None for term in self._terms}
        return len(kinds) > 1 or len(self.peers) > 0

    def _loss_of(
        self,
        number: int,
        term: TermConfig,
        seen: _Seen,
        wanted: Mapping[str, Callable[[float], Tensor]],
        batch: Batch,
        position: float,
    ) -> Tensor:
        if isinstance(term, FeatureTermConfig):
            assert self.features is not None, "a term compares layers, and nobody looked for them"
            return self.features.loss(number, seen.features, batch)
        source = term.source if isinstance(term, LogitTermConfig) else "teacher"
        plain = seen.clean is not None and term.imitated is None
        logits = seen.clean if plain else seen.changed
        assert logits is not None
        return ANSWERS[type(term)](term, Step(logits, batch.labels, position, wanted[source]))

    def _factor(self, term: TermConfig, position: float) -> float:
        """What the teacher's share makes of a term's weight."""
        if self._share is None:
            return 1.0
        share = value_at(self._share, position)
        return share if term.imitated else 1.0 - share

    def _teachers_answer(self, batch: Batch, temperature: float) -> Tensor:
        assert self._teacher is not None, "settings refuse terms that imitate where there is no teacher"
        return self._teacher.logits(batch, temperature)

    @torch.no_grad()
    def _averages_answer(self, batch: Batch) -> Tensor:
        assert self.average is not None, "a term imitates the average, and nobody asked for one"
        return _logits(self.average.model, batch.inputs)


def _is_for_peers(term: TermConfig) -> bool:
    """Peers have the terms that need no layers and no average: those are the model's."""
    return not isinstance(term, FeatureTermConfig) and not (isinstance(term, LogitTermConfig) and term.source == "ema")


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return logits_of(model(*inputs)).float()


@torch.no_grad()
def _peers_answer(seen: Sequence[_Seen], place: int, temperature: float) -> Tensor:
    """What all models that learn, but the one at `place`, find on average for the batch as it is."""
    others = [each.clean.detach() for number, each in enumerate(seen) if number != place and each.clean is not None]
    assert others, "a term imitates peers, and there are none"
    return mean_probabilities(others, [1.0] * len(others), temperature)
