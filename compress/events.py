"""What a run tells whoever watches it. Plain data and one protocol: no terminal, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch: losses are means over its samples, accuracies are percentages (0 to 100)."""

    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    validation_loss: float
    validation_percent: float
    seconds: float
    samples_per_second: float


class Progress(Protocol):
    """Receives what happens during a run. Every call returns at once and never raises."""

    def stage_started(self, name: str, position: int, total: int, reason: str) -> None:
        """Stage `position` (from 1) of `total` starts, for the stated reason."""

    def stage_cached(self, name: str, position: int, total: int) -> None:
        """Stage `position` is already on disk."""

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """A stage ended and was measured."""

    def work(self, what: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` steps of some work inside a stage; `total` 0 means unknown."""

    def epoch(self, result: EpochResult) -> None:
        """A training epoch ended."""

    def note(self, text: str) -> None:
        """Something worth a line in the log."""

    def warn(self, text: str) -> None:
        """Something the user should act on or know before trusting the result."""


class Silent:
    """A `Progress` that shows nothing; what the Python API uses unless told otherwise."""

    def stage_started(self, name: str, position: int, total: int, reason: str) -> None:
        """Shows nothing."""

    def stage_cached(self, name: str, position: int, total: int) -> None:
        """Shows nothing."""

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """Shows nothing."""

    def work(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Shows nothing."""

    def epoch(self, result: EpochResult) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def warn(self, text: str) -> None:
        """Shows nothing."""


class Forwarding:
    """A `Progress` that passes everything on; what else is to happen, a subclass adds."""

    def __init__(self, progress: Progress) -> None:
        """Pass on to `progress`."""
        self._progress = progress

    def stage_started(self, name: str, position: int, total: int, reason: str) -> None:
        """Passes it on; so do the next ones."""
        self._progress.stage_started(name, position, total, reason)

    def stage_cached(self, name: str, position: int, total: int) -> None:
        """Passes it on."""
        self._progress.stage_cached(name, position, total)

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """Passes it on."""
        self._progress.stage_finished(name, seconds, summary)

    def work(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Passes it on."""
        self._progress.work(what, done, total, detail)

    def epoch(self, result: EpochResult) -> None:
        """Passes it on."""
        self._progress.epoch(result)

    def note(self, text: str) -> None:
        """Passes it on."""
        self._progress.note(text)

    def warn(self, text: str) -> None:
        """Passes it on."""
        self._progress.warn(text)
