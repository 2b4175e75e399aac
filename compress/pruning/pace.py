"""How long models take that differ in their channels: side by side, in ONNX Runtime."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from compress.data.base import Inputs
from compress.edits import EDITS, Edit
from compress.errors import CompressError, StageError
from compress.files import canonical_json
from compress.methods.times import Timer, Times
from compress.models.answers import logits_of
from compress.pruning.surgeon import cut

_WHOLE = "whole"


class Pace:
    """Times models after cuts of the same one."""

    def __init__(self, timer: Timer, example: Inputs, setting: str, instead: str) -> None:
        """Take what is needed to time a model.

        Args:
            timer: what times modules.
            example: a batch of each input.
            setting: key of the setting that times are needed for; so errors begin.
            instead: what needs none.

        Raises:
            StageError: where the model is not one that can be timed.
        """
        if len(example) != 1 or not example[0].is_floating_point():
            raise StageError(f"{setting}: only models with one input, of floats, can be timed here; {instead}")
        self._timer, self._shape = timer, (1, *example[0].shape[1:])
        self._setting, self._instead = setting, instead

    def times(self, model: nn.Module, edits: Sequence[Edit]) -> Times:
        """Of the model as it is and after these edits.

        Raises:
            StageError: where one of them cannot be exported or run.
        """
        name = _name(edits)
        found = self._found({_WHOLE: model, name: cut(copy.deepcopy(model), edits)})
        return Times.of(found[_WHOLE], found[name])

    def rounds(self, model: nn.Module, cuts: Sequence[Sequence[Edit]]) -> list[tuple[float, ...]]:
        """Milliseconds in each round after each of these cuts of the same model; equal ones are timed once.

        Raises:
            StageError: where one of them cannot be exported or run.
        """
        names = [_name(edits) for edits in cuts]
        distinct = dict(zip(names, cuts, strict=True))
        found = self._found({name: cut(copy.deepcopy(model), edits) for name, edits in distinct.items()})
        return [tuple(found[name]) for name in names]

    def _found(self, models: Mapping[str, nn.Module]) -> Mapping[str, Sequence[float]]:
        try:
            return self._timer({name: (_Logits(model), self._shape) for name, model in models.items()})
        except CompressError as error:
            raise StageError(f"{self._setting}: the model cannot be timed: {error}; {self._instead}") from error


def _name(edits: Sequence[Edit]) -> str:
    """The same for the same cut of a model, in every process and every run."""
    return hashlib.sha256(canonical_json(EDITS.dump_python(tuple(edits), mode="json"))).hexdigest()


class _Logits(nn.Module):
    """A model without what it answers besides its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        return logits_of(self.model(given))
