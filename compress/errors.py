"""Errors that a user can cause. Each ends in one clear message and exit code 2, never a traceback.

Anything that is not a `CompressError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class CompressError(Exception):
    """Base of everything a user can cause; the message is shown as it is."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a pipeline file: where it stands, which key, what is wrong with it."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(CompressError):
    """All problems of a pipeline file at once, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(CompressError):
    """The data is missing, unreadable or not what the pipeline says it is."""


class ModelError(CompressError):
    """A factory, its weights or its forward pass does not fit the pipeline."""


class CheckpointError(CompressError):
    """A checkpoint is missing, damaged, of another format, or not to be trusted."""


class StageError(CompressError):
    """A stage cannot do what its settings ask of it."""


class TrainingError(CompressError):
    """Training diverged or ran out of memory; the message names the epoch and what to try."""


class DivergedError(TrainingError):
    """A training that went astray: other settings, or a weaker target, may not."""


class ExportError(CompressError):
    """The exported file does not do what the checkpoint does; nothing was written."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option closest to `word`, None where none is close."""
    lowered = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def nearest(word: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `word`, or `""` where none is close."""
    found = closest(word, options)
    return f"; did you mean '{found}'?" if found is not None else ""


def listed(options: Iterable[str], limit: int = 12) -> str:
    """Options as one readable line, cut after `limit` names."""
    names = list(options)
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
