"""Which multiple of channels pays on this machine: the same target met in each of them, and the models timed side by side."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from compress.data.base import Inputs
from compress.edits import Edit
from compress.errors import StageError
from compress.files import readable_json, write_file
from compress.measured import Record
from compress.methods.statistics import paired_ratio
from compress.models.cost import macs
from compress.pruning.choice import OutOfReachError
from compress.pruning.pace import Pace
from compress.pruning.surgeon import cut

MULTIPLES = (1, 2, 4, 8, 16)
"""Those that kernels of CPUs are made for, and 1, which leaves the choice to the scores alone."""
_IDLE = "no group can lose channels"
_LEAST_MS = 1e-6
"""What a round counts at least: a clock may show none, of which there is no ratio."""

_ROUNDING = 1e-9
"""9.8 / 10 by logarithms is a little more than 0.98."""


class Taken(Record):
    """The multiple that was taken."""

    multiple: int
    note: str
    """Why."""

    def save(self, path: Path) -> None:
        """Write it, for a stage that is killed: times differ each time, and with another multiple its training would not fit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, readable_json(self.model_dump()))

    @classmethod
    def load(cls, path: Path) -> Taken | None:
        """What was written; None where nothing was.

        Raises:
            StageError: where the file cannot be read.
        """
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise StageError(f"{path}: cannot be read; remove it to measure anew") from error


@dataclass(frozen=True)
class Ratio:
    """Time with a larger multiple over that with a smaller one, and its 95 % interval."""

    larger: int
    smaller: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Mapping[int, Sequence[float]], larger: int, smaller: int) -> Ratio:
        """From the times in each round, by multiple."""
        above, below = ([max(_LEAST_MS, time) for time in rounds[each]] for each in (larger, smaller))
        return cls(larger, smaller, *paired_ratio(above, below))

    def is_faster_by(self, fraction: float) -> bool:
        """Whether the larger one saves this fraction of the time, at the worse end of the interval."""
        return self.high <= 1 - fraction + _ROUNDING

    def __str__(self) -> str:
        return f"{self.larger} takes {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] of the time of {self.smaller}"


def smallest_unbeaten(rounds: Mapping[int, Sequence[float]], faster_by: float) -> tuple[int, list[Ratio]]:
    """The smallest multiple that no larger one beats; a larger one makes the choice coarser, so it has to pay.

    Args:
        rounds: milliseconds in each round, by multiple.
        faster_by: the fraction of its time by which one beats another, with all of the interval.

    Returns:
        The multiple, and why: of each smaller one by what it is beaten, then what comes nearest to beating this one.
    """
    why = []
    for multiple in sorted(rounds):
        ratios = [Ratio.of(rounds, larger, multiple) for larger in sorted(rounds) if larger > multiple]
        if best := min(ratios, key=lambda ratio: ratio.high, default=None):
            why.append(best)
        if best is None or not best.is_faster_by(faster_by):
            break
    return multiple, why


def take(
    edits_in: Callable[[int], tuple[Edit, ...]],
    model: nn.Module,
    example: Inputs,
    pace: Pace,
    faster_by: float,
    done: Callable[[int, int], None],
) -> Taken:
    """Cut the model in each multiple, time the results, and take one.

    Args:
        edits_in: the cut that meets the target in a multiple, none where nothing can go; it begins anew each time.
        model: whole; stays as it is.
        example: a batch of each input.
        pace: times models.
        faster_by: see `smallest_unbeaten`.
        done: told how many multiples were cut, and of how many.

    Raises:
        OutOfReachError: where the target cannot be met in any of them, as the finest one says it.
        StageError: where the models cannot be timed.
    """
    cuts: dict[int, tuple[Edit, ...]] = {}
    without: dict[int, OutOfReachError | None] = {}
    for number, multiple in enumerate(MULTIPLES, 1):
        try:
            edits = edits_in(multiple)
        except OutOfReachError as error:
            without[multiple] = error
        else:
            if edits:
                cuts[multiple] = edits
            else:
                without[multiple] = None
        done(number, len(MULTIPLES))
    if not cuts:
        if None not in without.values():
            raise next(error for error in without.values() if error is not None)
        idle = min(multiple for multiple, error in without.items() if error is None)
        return Taken(multiple=idle, note=_told(idle, [f"{_IDLE} in any"]))
    left_out = [f"{multiple} is left out: {_why(error)}" for multiple, error in without.items()]
    one = tuple(tensor[:1] for tensor in example)
    whole = macs(model, one)
    left = {multiple: macs(cut(copy.deepcopy(model), edits), one) / whole for multiple, edits in cuts.items()}
    if len(set(cuts.values())) == 1:
        # Times of one model with itself decide nothing.
        same = [f"{multiple} leaves {_percent(left[multiple])} of the MACs" for multiple in cuts]
        said = "all of them make the same cut" if len(cuts) > 1 else "there is no other"
        return Taken(multiple=min(cuts), note=_told(min(cuts), [*same, *left_out, f"{said}: nothing to time"]))
    rounds = dict(zip(cuts, pace.rounds(model, list(cuts.values())), strict=True))
    multiple, why = smallest_unbeaten(rounds, faster_by)
    timed = [
        f"{each} takes {statistics.median(rounds[each]):.3g} ms and leaves {_percent(left[each])} of the MACs"
        for each in cuts
    ]
    return Taken(multiple=multiple, note=_told(multiple, [*timed, *left_out, _decided(multiple, why, faster_by)]))


def _told(multiple: int, parts: Sequence[str]) -> str:
    return f"multiple: auto takes {multiple}: {'; '.join(parts)}"


def _decided(multiple: int, why: Sequence[Ratio], faster_by: float) -> str:
    """Why smaller ones were not taken, and why no larger one was."""
    beaten, kept = ([str(ratio) for ratio in why if (ratio.smaller == multiple) is last] for last in (False, True))
    last = f"none larger saves {100 * faster_by:g} % of the time of {multiple} for sure" if kept else "none is larger"
    return ", ".join([*beaten, last]) + "".join(f" ({ratio})" for ratio in kept)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _why(error: OutOfReachError | None) -> str:
    return _IDLE if error is None else str(error).partition("; ")[0]
