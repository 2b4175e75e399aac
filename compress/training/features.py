"""The terms that compare what layers of student and teacher give out, and the adapters that learn with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.config import HintConfig, LossEntry
from compress.data.base import Batch, Inputs
from compress.errors import StageError
from compress.seeds import derive_seed
from compress.training.layers import Layers, alike, shape_of, try_layers
from compress.training.teachers import OneTeacher
from compress.training.terms import FEATURES

_MOST = 4
"""Layers that `auto` finds; each costs memory and time in every step."""
_ONE_ADAPTER = "a hint needs the same number of axes on both sides, and the same height and width or number of tokens"


class FeatureTerms(nn.Module):
    """The terms of a loss that compare layers; its parameters are the adapters of hints, which end with the training."""

    def __init__(
        self,
        losses: Sequence[LossEntry],
        student: nn.Module,
        teacher: nn.Module,
        example: Inputs,
        *,
        seed: int,
        at: str,
    ) -> None:
        """Try both models on the example, look for the layers, and make the adapters.

        Args:
            losses: all terms of the loss; the others are passed over.
            student: on the CPU; not kept.
            teacher: on the CPU.
            example: inputs of at least two samples, on the CPU.
            seed: of the adapters' initial weights.
            at: the key of the settings that hold the losses, for messages.

        Raises:
            StageError: where a layer does not exist, or two cannot be compared, with names and shapes.
        """
        super().__init__()
        mine, theirs = try_layers(student, example), try_layers(teacher, example)
        self._pairs: dict[int, list[tuple[str, str]]] = {}
        self._terms = {
            place: entry.settings for place, entry in enumerate(losses) if entry.settings.reads == "features"
        }
        self.found: dict[str, list[str]] = {}
        """The layers that `auto` stands for, by kind of term."""
        self.adapters = nn.ModuleDict()
        for place, term in self._terms.items():
            key = f"{at}.losses.{place}.{losses[place].kind}.layers"
            if term.layers == "auto":
                pairs = _found(mine, theirs, key)
                self.found[losses[place].kind] = [name for name, _ in pairs]
            else:
                pairs = list(term.layers.items())
                _check_names(pairs, mine, theirs, key)
            adapters = nn.ModuleList()
            for number, (student_layer, teacher_layer) in enumerate(pairs):
                seen, wanted = mine.outputs[student_layer], theirs.outputs[teacher_layer]
                try:
                    adapter = _adapter(term, seen, wanted, derive_seed(seed, "adapter", place, number))
                    with torch.no_grad():
                        FEATURES[type(term)](term, adapter(seen), wanted)
                except ValueError as error:
                    raise StageError(
                        f"{key}: '{student_layer}' of the student gives out {shape_of(seen)}, '{teacher_layer}' of the "
                        f"teacher {shape_of(wanted)}: {str(error).partition(', got ')[0]}"
                    ) from None
                adapters.append(adapter)
            self._pairs[place] = pairs
            self.adapters[str(place)] = adapters
        self.layers = sorted({student_layer for pairs in self._pairs.values() for student_layer, _ in pairs})
        """Names of the student's layers that are compared."""
        self.teacher = OneTeacher(teacher, sorted({layer for pairs in self._pairs.values() for _, layer in pairs}))
        """The teacher, which gives logits and features of a batch in one pass."""

    def loss(self, place: int, found: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss of the term at `place` of the list, summed over its pairs of layers, before its weight.

        Args:
            place: from 0.
            found: what the student's layers gave out, by name.
            batch: what the teacher is asked about.
        """
        term, wanted = self._terms[place], self.teacher.features(batch)
        adapters = self.adapters[str(place)]
        assert isinstance(adapters, nn.ModuleList)
        losses = [
            FEATURES[type(term)](term, adapter(found[student_layer]), wanted[teacher_layer])
            for (student_layer, teacher_layer), adapter in zip(self._pairs[place], adapters, strict=True)
        ]
        return torch.stack(losses).sum()


def _found(mine: Layers, theirs: Layers, key: str) -> list[tuple[str, str]]:
    if not (names := alike(mine, theirs, _MOST)):
        raise StageError(
            f"{key}: auto finds no layer that student and teacher have under one name, with the same height and width or "
            "number of tokens; name them, student: teacher"
        )
    return [(name, name) for name in names]


def _check_names(pairs: Sequence[tuple[str, str]], mine: Layers, theirs: Layers, key: str) -> None:
    reasons = [mine.why_not(name, "the student") for name, _ in pairs]
    reasons += [theirs.why_not(name, "the teacher") for _, name in pairs]
    told = list(dict.fromkeys(reason for reason in reasons if reason is not None))
    if told:
        raise StageError(f"{key}: {'; '.join(told)}")


def _adapter(term: object, student: Tensor, teacher: Tensor, seed: int) -> nn.Module:
    """What a student's features go through before they are compared: nothing but where hints differ in channels.

    Raises:
        ValueError: where no adapter makes the two alike.
    """
    if not isinstance(term, HintConfig):
        return nn.Identity()
    maps = student.dim() == 4
    channels = 1 if maps else student.dim() - 1
    places, wanted = list(student.shape), list(teacher.shape)
    if student.dim() > 4 or len(places) != len(wanted):
        raise ValueError(_ONE_ADAPTER)
    have, want = places.pop(channels), wanted.pop(channels)
    if places != wanted:
        raise ValueError(_ONE_ADAPTER)
    if have == want:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(have, want, 1) if maps else nn.Linear(have, want)
