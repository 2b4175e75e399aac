"""Run a pipeline: stages in order, each from the cache or anew, each measured."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from compress import checkpoint as checkpoints
from compress.bench.measure import Bench, measure
from compress.checkpoint import Checkpoint, Draft
from compress.config import DistillConfig, ModelConfig, Pipeline, RecoveryConfig, TeacherConfig, TrainConfig
from compress.config.located import located, within
from compress.data.load import load_data
from compress.errors import CheckpointError, CompressError, TrainingError
from compress.events import Progress, Silent
from compress.manifest import HistoryEntry
from compress.measured import Measurement
from compress.methods.statistics import two_proportions_differ
from compress.models.factory import Arch
from compress.models.source import make_model
from compress.outcome import Outcome
from compress.plan import Cache, Keys, Planned, check_files, planned_stages, reference_position, selected
from compress.provenance import identity
from compress.results import Results
from compress.rows import Done
from compress.stages import STAGES, source
from compress.stages.base import Context, check_deterministic, check_forward, check_training_forward
from compress.training.taught import TeacherModel, check
from compress.training.trackers import tracked

_OUT_OF_MEMORY = "out of memory in stage '{}': try a smaller batch_size of the stage, or a smaller bench.batch_size"
_SUSPICIOUS_GAP_POINTS = 2.0
_SUSPICIOUS_P_VALUE = 0.001


def run(
    pipeline: Pipeline,
    *,
    runs: str | Path = "runs",
    fresh: bool = False,
    until: str | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Results:
    """Run a pipeline and write everything under `runs/<name>`.

    Args:
        pipeline: from `load_pipeline`.
        runs: folder of all runs.
        fresh: do every stage anew instead of taking it from the cache.
        until: label of the last stage to run, 'source' for none.
        progress: told of everything that happens.
        command: what to write into the results as the way to repeat them.

    Returns:
        What is in `runs/<name>/results.json`.

    Raises:
        CompressError: whatever the user can mend; what was finished before stays.
    """
    with located(pipeline):
        return _Run(pipeline, Path(runs), progress or Silent(), fresh=fresh, command=command).run(until)


class _Run:
    """One run of one pipeline."""

    def __init__(self, pipeline: Pipeline, runs: Path, progress: Progress, *, fresh: bool, command: str) -> None:
        check_files(pipeline)
        self.pipeline, self.progress, self.fresh, self.command = pipeline, progress, fresh, command
        self.root = runs / pipeline.name
        self.cache = Cache(self.root)
        self.warnings: list[str] = []
        self.trusted = frozenset(model.factory for _, model in pipeline.models())

    def run(self, until: str | None) -> Results:
        stages = selected(planned_stages(self.pipeline), until)
        self.data = load_data(self.pipeline.data, self.pipeline.seed)
        # After loading: with `download: true` the files are there only now.
        self.keys = Keys(self.pipeline)
        self.device = self._device()
        self.cache.sweep()
        with _reproducible(self.keys.threads):
            self.bench = Bench(
                self.data,
                self.device,
                self.keys.threads,
                self.pipeline.bench.batch_size,
                self.trusted,
                self.progress,
            )
            done = self._stages(stages)
        outcome = Outcome(self.pipeline, self.data, self.root, self.progress, self.command, self.warnings)
        return outcome.write(done, reuse_times=not self.fresh)

    def _device(self) -> str:
        if self.keys.device == "cuda" and not torch.cuda.is_available():
            raise CompressError("device: the driver has a CUDA device but this torch cannot use it; set device: cpu")
        return self.keys.device

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    def _stages(self, stages: Sequence[Planned]) -> list[Done]:
        done: list[Done] = []
        reference_at = reference_position(self.pipeline)
        for planned in stages:
            parent = done[-1] if done else None
            reference = done[min(len(done) - 1, reference_at)] if done else None
            with _clear_memory_errors(planned.label):
                done.append(self._stage(planned, parent, reference, stages))
            if planned.position == reference_at:
                self._check_reference(done[-1])
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
                self._check_before_training(checkpoint.build(self.trusted), stages)
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
            self._check_before_training(draft.model, stages)
        else:
            draft = self._run_stage(planned, parent, reference, scratch)
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

    def _run_stage(self, planned: Planned, parent: Done, reference: Done, scratch: Path) -> Draft:
        names, settings, logs = self.pipeline.trackers, identity(planned.settings), self.root / "trackers"
        with tracked(names, self.pipeline.name, scratch.name, logs, settings, self.progress) as progress:
            return self._made(planned, parent, reference, scratch, progress)

    def _made(self, planned: Planned, parent: Done, reference: Done, scratch: Path, progress: Progress) -> Draft:
        context = Context(
            data=self.data.for_decisions(),
            reference=reference.checkpoint,
            device=self.device,
            threads=self.keys.threads,
            seed=planned.seed,
            scratch=scratch,
            progress=progress,
            trusted=self.trusted,
            cache=self.root / "teacher",
            answers_key=self.keys.answers(),
            # Only export writes it down; no other stage gets to see test accuracy.
            parent_accuracy=parent.measurement.accuracy.model_dump(mode="json") if planned.name == "export" else {},
        )
        with within(planned.name, planned.settings):
            draft = STAGES[planned.name].load()(parent.checkpoint, planned.settings, context)
        return replace(draft, notes=tuple(context.notes), warnings=tuple(context.warnings))

    def _load(self, folder: Path) -> Checkpoint:
        try:
            return checkpoints.load(folder, self.trusted)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove the folder, or run with --fresh, to make it anew") from None

    def _measured(self, checkpoint: Checkpoint) -> Measurement:
        key = self.keys.measurement(checkpoint.manifest)
        return self.cache.measurement(checkpoint.path, key) or measure(checkpoint, key, self.bench)

    def _check_before_training(self, model: nn.Module, stages: Sequence[Planned]) -> None:
        """Factories, forward passes and shapes, before hours go into training."""
        inputs = self.data.example()
        classes = len(self.data.classes)
        check_forward(model, inputs, classes, "model")
        check_deterministic(model, inputs, "model")
        if any(planned.name == "train" for planned in stages):
            check_training_forward(model, inputs, "model")
        made = {key: self._checked(key, config) for key, config in self._others(stages)}
        self._check_trainings(model, made, stages)
        trains = any(planned.name == "train" for planned in stages)
        own_code = Arch(self.pipeline.model.factory).is_code()
        if len(stages) > 1 and not (trains or own_code or self.pipeline.model.weights):
            self._warn("the source model has random weights: give model.weights, or begin with the stage 'train'")

    def _others(self, stages: Sequence[Planned]) -> Iterator[tuple[str, ModelConfig]]:
        """The models besides the source that these stages need, by key."""
        needed = tuple(f"stages.{planned.position - 1}." for planned in stages)
        return ((key, config) for key, config in self.pipeline.models() if key.startswith(needed))

    def _checked(self, key: str, config: ModelConfig) -> nn.Module:
        """A model that learns or teaches beside the source, found to be usable."""
        inputs = self.data.example()
        made = make_model(Arch(config.factory, config.kwargs), config.weights, self.pipeline.seed, at=key)
        check_forward(made, inputs, len(self.data.classes), key)
        check_deterministic(made, inputs, key)
        if not isinstance(config, TeacherConfig):
            check_training_forward(made, inputs, key)
        return made

    def _check_trainings(self, source: nn.Module, made: Mapping[str, nn.Module], stages: Sequence[Planned]) -> None:
        """Layers that are compared and inputs that are changed; surgery in between keeps the names of layers."""
        model = source
        for planned in stages:
            key = f"stages.{planned.position - 1}.{planned.name}"
            teacher = TeacherModel(source, {})
            if isinstance(planned.settings, DistillConfig):
                teacher, model = TeacherModel(model, {}), made[f"{key}.student"]
            if isinstance(planned.settings, TrainConfig | DistillConfig):
                check(model, planned.settings, self.data, at=key, teachers=[teacher])
            recovery = getattr(planned.settings, "recovery", None)
            if isinstance(recovery, RecoveryConfig):
                check(model, recovery, self.data, at=f"{key}.recovery", teachers=[teacher])

    def _check_reference(self, reference: Done) -> None:
        """A model that saw the validation images in its training makes every budget meaningless."""
        validation = reference.measurement.accuracy.validation
        test = reference.measurement.accuracy.test
        p_value = two_proportions_differ(validation.correct, validation.n, test.correct, test.n)
        if validation.percent - test.percent > _SUSPICIOUS_GAP_POINTS and p_value < _SUSPICIOUS_P_VALUE:
            self._warn(
                f"'{reference.planned.label}' answers {validation.percent:.2f} % of validation but {test.percent:.2f} % of "
                "test: it was probably trained on the validation images, so no budget means anything; take validation "
                "from elsewhere, such as data.validation: {from: test, size: 2000}"
            )


def _summary(measurement: Measurement) -> str:
    validation, test = measurement.accuracy.validation, measurement.accuracy.test
    return (
        f"validation {validation.percent:.2f} %, test {test.percent:.2f} %, {measurement.parameters:,} parameters, "
        f"{measurement.macs / 1e6:.2f} M MACs, {measurement.size.size_bytes:,} bytes"
    )


@contextlib.contextmanager
def _clear_memory_errors(stage: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(_OUT_OF_MEMORY.format(stage)) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch's CPU allocator says it
            raise
        raise TrainingError(_OUT_OF_MEMORY.format(stage)) from error


@contextlib.contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """The thread count asked for, and on CUDA the same kernels each time, with float32 that is float32 (no TF32)."""
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
