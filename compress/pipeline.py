"""Run a pipeline: stages in order, each from the cache or anew, each measured."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from compress import checkpoint as checkpoints
from compress.bench.measure import Bench, measure
from compress.checkpoint import Checkpoint
from compress.config import ModelConfig, Pipeline
from compress.config.located import located
from compress.data.load import load_data
from compress.distributed import ALONE, Group
from compress.errors import CheckpointError, TrainingError
from compress.events import Progress, Silent
from compress.making import ANSWERS, COSTS, Maker, announce, reproducible
from compress.manifest import HistoryEntry
from compress.measured import Measurement
from compress.outcome import Outcome
from compress.plan import Cache, Keys, Planned, check_files, planned_stages, reference_position, selected
from compress.preflight import check_models, check_reference
from compress.provenance import identity
from compress.results import Results
from compress.rows import Done
from compress.stages import source
from compress.training.failures import out_of_memory_as

_OUT_OF_MEMORY = "out of memory in stage '{}': try a smaller batch_size of the stage, or a smaller bench.batch_size"


def run(
    pipeline: Pipeline,
    *,
    runs: str | Path = "runs",
    fresh: bool = False,
    until: str | None = None,
    progress: Progress | None = None,
    command: str = "",
    group: Group = ALONE,
) -> Results:
    """Run a pipeline and write everything under `runs/<name>`.

    Args:
        pipeline: from `load_pipeline`.
        runs: folder of all runs.
        fresh: do every stage anew instead of taking it from the cache.
        until: label of the last stage to run, 'source' for none.
        progress: told of everything that happens.
        command: what to write into the results as the way to repeat them.
        group: of several processes this is the leader, and the others call `compress.making.assist`.

    Returns:
        What is in `runs/<name>/results.json`.

    Raises:
        CompressError: whatever the user can mend; what was finished before stays.
        ValueError: in a process that does not lead its group.
    """
    if not group.leads:
        raise ValueError("the leader of a group runs the pipeline, the others call compress.making.assist")
    with located(pipeline):
        return _Run(pipeline, Path(runs), progress or Silent(), group, fresh=fresh, command=command).run(until)


class _Run:
    """One run of one pipeline."""

    def __init__(
        self, pipeline: Pipeline, runs: Path, progress: Progress, group: Group, *, fresh: bool, command: str
    ) -> None:
        check_files(pipeline)
        self.group = group
        self.pipeline, self.progress, self.fresh, self.command = pipeline, progress, fresh, command
        self.root = runs / pipeline.name
        self.cache = Cache(self.root)
        self.warnings: list[str] = []

    def run(self, until: str | None) -> Results:
        stages = selected(planned_stages(self.pipeline), until)
        self.data = load_data(self.pipeline.data, self.pipeline.seed)
        # After loading: with `download: true` the files are there only now.
        self.keys = Keys(self.pipeline)
        announce(self.pipeline, self.root, self.group)
        self.maker = Maker(self.pipeline, self.data.for_decisions(), self.keys, self.root, self.group)
        self.cache.sweep()
        if self.fresh:
            for folder in (ANSWERS, COSTS):
                shutil.rmtree(self.root / folder, ignore_errors=True)
        with reproducible(self.keys.threads):
            self.bench = Bench(
                self.data,
                self.keys.device,
                self.keys.threads,
                self.pipeline.bench.batch_size,
                self.maker.trusted,
                self.progress,
            )
            done = self._stages(stages)
        outcome = Outcome(self.pipeline, self.data, self.root, self.progress, self.command, self.warnings)
        results = outcome.write(done, reuse_times=not self.fresh)
        self.maker.finish()  # not before: a launcher ends what is left where some machines are done long before others
        return results

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    def _stages(self, stages: Sequence[Planned]) -> list[Done]:
        done: list[Done] = []
        reference_at = reference_position(self.pipeline)
        for planned in stages:
            parent = done[-1] if done else None
            reference = done[min(len(done) - 1, reference_at)] if done else None
            with out_of_memory_as(TrainingError(_OUT_OF_MEMORY.format(planned.label))):
                done.append(self._stage(planned, parent, reference, stages))
            if planned.position == reference_at:
                check_reference(done[-1], self._warn)
        return done

    def _stage(self, planned: Planned, parent: Done | None, reference: Done | None, stages: Sequence[Planned]) -> Done:
        total = len(stages)
        key = self.keys.stage(
            planned,
            parent.checkpoint.manifest if parent else None,
            reference.checkpoint.manifest if reference else None,
            parent.measurement if parent else None,
        )
        found = None if self.fresh else self.cache.find(planned, key)
        if found is not None:
            self.progress.stage_cached(planned.label, planned.position + 1, total)
            checkpoint = self._load(found[0])
            if parent is None:
                self._check_models(checkpoint.build(self.maker.trusted), stages)
            return Done(planned, checkpoint, self._measured(checkpoint))
        reason = "--fresh" if self.fresh else self.cache.why_missing(planned, key)
        self.progress.stage_started(planned.label, planned.position + 1, total, reason)
        scratch = self.cache.scratch_for(planned, key)
        if self.fresh:
            shutil.rmtree(scratch, ignore_errors=True)
        started = time.perf_counter()
        if parent is None or reference is None:
            assert isinstance(planned.settings, ModelConfig)
            draft = source.make(planned.settings, planned.seed)
            for note in draft.notes:
                self.progress.note(note)
            self._check_models(draft.model, stages)
        else:
            accuracy = parent.measurement.accuracy.model_dump(mode="json")
            draft = self.maker.make(planned, parent.checkpoint, reference.checkpoint, scratch, self.progress, accuracy)
        trained = sum(float(row["seconds"]) for row in draft.training)
        seconds = max(time.perf_counter() - started, trained)  # epochs before a restart count too
        entry = HistoryEntry(
            stage=planned.name,
            parent=parent.checkpoint.digest if parent else None,
            settings=identity(planned.settings),
            seconds=seconds,
            notes=draft.notes,
            warnings=draft.warnings,
            training=draft.training,
            sensitivity=draft.sensitivity,
        )
        checkpoint = checkpoints.save(
            self.cache.folder_for(planned, key),
            draft,
            inputs=self.data.inputs,
            classes=self.data.classes,
            history=(*(parent.checkpoint.history if parent else ()), entry),
            key=key,
        )
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may still need it
            scratch.parent.rmdir()
        measurement = self._measured(checkpoint)
        self.progress.stage_finished(planned.label, seconds, _summary(measurement))
        return Done(planned, checkpoint, measurement)

    def _check_models(self, model: nn.Module, stages: Sequence[Planned]) -> None:
        check_models(self.pipeline, self.data, model, stages, self._warn)

    def _load(self, folder: Path) -> Checkpoint:
        try:
            return checkpoints.load(folder, self.maker.trusted)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove the folder, or run with --fresh, to make it anew") from None

    def _measured(self, checkpoint: Checkpoint) -> Measurement:
        key = self.keys.measurement(checkpoint.manifest)
        return self.cache.measurement(checkpoint.path, key) or measure(checkpoint, key, self.bench)


def _summary(measurement: Measurement) -> str:
    validation, test = measurement.accuracy.validation, measurement.accuracy.test
    return (
        f"validation {validation.percent:.2f} %, test {test.percent:.2f} %, {measurement.parameters:,} parameters, "
        f"{measurement.macs / 1e6:.2f} M MACs, {measurement.size.size_bytes:,} bytes"
    )
