"""A stage run with other values of its target, each result kept on disk until one of them is chosen."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from compress import checkpoint as checkpoints
from compress.checkpoint import Checkpoint, Draft
from compress.config import SurgeryConfig
from compress.data.base import Split
from compress.errors import CheckpointError
from compress.manifest import HistoryEntry
from compress.provenance import identity
from compress.stages.base import Context, Run

_RESULT, _WORK = "result", "work"


class Trials:
    """The trials of one stage, by the value of its target.

    All processes of a group make the same ones, and read back what the leader wrote. A search that was killed makes only those
    that were not finished, and ends as one that was not killed.
    """

    def __init__(
        self, run: Run, parent: Checkpoint, config: SurgeryConfig, context: Context, validation: Split
    ) -> None:
        """Take what all trials share; `validation` is all of that split that they see."""
        self._run, self._parent, self._config, self._context = run, parent, config, context
        self._validation = validation

    def make(self, value: float) -> None:
        """Run the stage with its target at a value, unless that was done before this process began."""
        context, group = self._context, self._context.group
        if group.told(group.leads and self._is_made(value)):
            context.progress.note(f"{self.name(value)} was tried before this run was stopped")
            return
        context.progress.note(f"trial: {self.name(value)}")
        data = replace(context.data, validation=self._validation)
        trial = replace(context, data=data, scratch=self._folder(value) / _WORK, notes=[], warnings=[])
        started = time.perf_counter()
        draft = self._run(self._parent, self._at(value), trial)
        if group.leads:
            self._keep(value, draft, trial, time.perf_counter() - started)
        group.told()  # nobody reads it before it is written

    def result(self, value: float) -> Checkpoint:
        """What a trial made.

        Raises:
            CheckpointError: where it is not there, or not whole.
        """
        return checkpoints.load(self._folder(value) / _RESULT, self._context.trusted)

    def chosen(self, value: float) -> Draft:
        """What a trial made, as the result of the stage; notes and warnings of the trial become those of the stage."""
        checkpoint = self.result(value)
        (entry,) = checkpoint.history
        self._context.notes.extend(entry.notes)  # shown when they were written
        self._context.warnings.extend(entry.warnings)
        model = checkpoint.build(self._context.trusted)
        return Draft(checkpoint.arch, checkpoint.edits, model, training=entry.training, sensitivity=entry.sensitivity)

    def name(self, value: float) -> str:
        """Such as 'macs 0.35'."""
        return f"{self._config.target.kind} {value:g}"

    def _keep(self, value: float, draft: Draft, trial: Context, seconds: float) -> None:
        entry = HistoryEntry(
            stage="trial",
            parent=self._parent.digest,
            settings=identity(self._at(value)),
            seconds=seconds,
            notes=tuple(trial.notes),
            warnings=tuple(trial.warnings),
            training=draft.training,
            sensitivity=draft.sensitivity,
        )
        data, path = self._context.data, self._folder(value) / _RESULT
        key = self._key(value)
        checkpoints.save(path, draft, inputs=data.inputs, classes=data.classes, history=(entry,), key=key)
        shutil.rmtree(trial.scratch, ignore_errors=True)

    def _is_made(self, value: float) -> bool:
        try:
            return self.result(value).manifest.key == self._key(value)
        except CheckpointError:
            return False

    def _key(self, value: float) -> dict[str, JsonValue]:
        # The folder belongs to one key of the cache already: data, machine, code and all else that decides.
        return {"settings": identity(self._at(value)), "parent": self._parent.digest}

    def _folder(self, value: float) -> Path:
        return self._context.scratch / "trials" / f"{self._config.target.kind}-{value}"

    def _at(self, value: float) -> SurgeryConfig:
        return self._config.model_copy(update={"target": self._config.target.at(value), "budget": None})
