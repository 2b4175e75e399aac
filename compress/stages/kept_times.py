"""Times that a stage decides by: measured by one process, told to all, and kept for a stage that was killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import nn

from compress.distributed import Group
from compress.errors import StageError
from compress.files import readable_json, write_file
from compress.methods.times import Timer

_Rounds = dict[str, tuple[float, ...]]
_ANSWER, _ANSWERS = TypeAdapter(_Rounds), TypeAdapter(list[_Rounds])


def kept_times(timer: Timer, path: Path, group: Group) -> Timer:
    """The same timer, whose answers are kept in a file and given again.

    Times differ each time: a killed stage that measured anew might choose otherwise, and its training would not fit.

    Args:
        timer: what times modules; its names must say all that their times depend on.
        path: of the file, which belongs to one stage with its settings.
        group: the processes that take part; all ask the same, the leader measures.

    Raises (the timer that is given back):
        StageError: where the file cannot be read, or the processes do not ask the same; and whatever `timer` raises.
    """

    def times(asked: Mapping[str, tuple[nn.Module, tuple[int, ...]]]) -> Mapping[str, Sequence[float]]:
        found = _ANSWER.validate_python(
            group.told(_ANSWER.dump_python(_found(asked), mode="json") if group.leads else None)
        )
        if missing := asked.keys() - found.keys():
            raise StageError(f"the leading process times others than this one, which asks for {min(missing)}")
        return {name: found[name] for name in asked}

    def _found(asked: Mapping[str, tuple[nn.Module, tuple[int, ...]]]) -> _Rounds:
        answers = _kept(path)
        # All of one answer: what was not timed side by side must not be compared.
        for answer in answers:
            if asked.keys() <= answer.keys():
                return answer
        answers.append({name: tuple(rounds) for name, rounds in timer(asked).items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, readable_json(_ANSWERS.dump_python(answers, mode="json")))
        return answers[-1]

    return times


def _kept(path: Path) -> list[_Rounds]:
    if not path.is_file():
        return []
    try:
        return _ANSWERS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise StageError(f"{path}: cannot be read; remove it to measure anew") from error
