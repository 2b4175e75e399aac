"""How much of its time a model takes once channels are gone; measured, and asked only once for the same channels."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor, nn

from compress.data.base import Inputs
from compress.edits import EDITS, Edit
from compress.errors import CompressError, StageError
from compress.files import canonical_json, readable_json, write_file
from compress.measured import Record
from compress.models.answers import logits_of
from compress.pruning.surgeon import cut

Timer = Callable[[Mapping[str, tuple[nn.Module, tuple[int, ...]]]], Mapping[str, float]]
"""Milliseconds of each of these modules on an input of that shape, the batch first; by name."""
_FILE = "latency.json"


class Times(Record):
    """Of one sample, in milliseconds."""

    whole_ms: float
    cut_ms: float

    @property
    def share(self) -> float:
        """The fraction of its time that remains."""
        return self.cut_ms / self.whole_ms if self.whole_ms > 0 else 1.0

    def __str__(self) -> str:
        return f"{self.whole_ms:.3g} → {self.cut_ms:.3g} ms"


class Pace:
    """Times models before and after a cut, side by side."""

    def __init__(
        self, timer: Timer, example: Inputs, scratch: Path, agree: Callable[[Callable[[], JsonValue]], JsonValue]
    ) -> None:
        """Take what is needed to time a model.

        Args:
            timer: what times modules.
            example: a batch of each input.
            scratch: what was measured is kept there: a killed stage must choose as it did, and times differ each time.
            agree: gives all processes what the first one found.

        Raises:
            StageError: where the model is not one that can be timed.
        """
        if len(example) != 1 or not example[0].is_floating_point():
            raise StageError(
                "prune.target.latency: only models with one input, of floats, can be timed here; take a target of macs"
            )
        self._timer, self._shape = timer, (1, *example[0].shape[1:])
        self._path, self._agree = scratch / _FILE, agree

    def times(self, model: nn.Module, edits: Sequence[Edit]) -> Times:
        """Of the model as it is and after these edits.

        Raises:
            StageError: where one of them cannot be exported or run.
        """
        try:
            return Times.model_validate(self._agree(lambda: self._known(model, edits).model_dump()))
        except CompressError as error:
            raise StageError(
                f"prune.target.latency: the model cannot be timed: {error}; take a target of macs"
            ) from error

    def _known(self, model: nn.Module, edits: Sequence[Edit]) -> Times:
        key = hashlib.sha256(canonical_json(EDITS.dump_python(tuple(edits), mode="json"))).hexdigest()
        known = json.loads(self._path.read_bytes()) if self._path.is_file() else {}
        if key not in known:
            after = cut(copy.deepcopy(model), edits)
            found = self._timer({"whole": (_Logits(model), self._shape), "cut": (_Logits(after), self._shape)})
            known[key] = Times(whole_ms=found["whole"], cut_ms=found["cut"]).model_dump()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, readable_json(known))
        return Times.model_validate(known[key])


class _Logits(nn.Module):
    """A model without what it answers besides its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        return logits_of(self.model(given))
