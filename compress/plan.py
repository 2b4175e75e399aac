"""What a run will do and why: cache keys, what is on disk, what changed. No torch, so that planning takes no time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from compress import machine, manifest
from compress.config import Config, ModelConfig, Pipeline, StageConfig
from compress.data.files import no_such
from compress.data.fingerprint import fingerprint, missing
from compress.errors import CheckpointError, CompressError, ConfigError, Problem, nearest
from compress.files import TEMPORARY, sha256_of
from compress.manifest import Manifest
from compress.measured import METRICS, Measurement
from compress.names import WEIGHTS_ENDINGS, WITH_PUBLISHED_WEIGHTS, is_weights_file
from compress.provenance import code_digest, differences, identity, key_digest, versions
from compress.requirements import unmet
from compress.seeds import derive_seed
from compress.stages import GUARD_MODULE, SOURCE_MODULE, STAGES

SOURCE = "source"
_BENCH_MODULE = "compress.bench.measure"
_DATA_MODULE = "compress.data.load"
_TEACHER_MODULES = ("compress.checkpoint", "compress.training.teachers")
_SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Planned:
    """One stage of a pipeline, in its place."""

    position: int
    """0 for the source."""
    name: str
    """Name of the stage."""
    label: str
    """Unique in the run: a second `prune` is `prune-2`."""
    settings: Config
    seed: int
    module: str


@dataclass(frozen=True)
class Step:
    """What will happen to a stage."""

    planned: Planned
    status: Literal["cached", "run", "follows"]
    reason: str
    folder: str | None
    """Name of the checkpoint's folder where it is cached."""


def planned_stages(pipeline: Pipeline) -> tuple[Planned, ...]:
    """Source and stages with unique labels and a seed each."""
    stages = [Planned(0, SOURCE, SOURCE, pipeline.model, derive_seed(pipeline.seed, SOURCE), SOURCE_MODULE)]
    counts: dict[str, int] = {}
    for position, entry in enumerate(pipeline.stages, 1):
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
        label = entry.kind if counts[entry.kind] == 1 else f"{entry.kind}-{counts[entry.kind]}"
        seed = derive_seed(pipeline.seed, label)
        stages.append(Planned(position, entry.kind, label, entry.settings, seed, STAGES[entry.kind].module))
    return tuple(stages)


def reference_position(pipeline: Pipeline) -> int:
    """Which stage makes the reference, the model all others are compared with: the last `train` at the head, else the source."""
    position = 0
    for entry in pipeline.stages:
        if entry.kind != "train":
            break
        position += 1
    return position


def selected(stages: Sequence[Planned], until: str | None) -> tuple[Planned, ...]:
    """The stages up to and including the one labelled `until`.

    Raises:
        CompressError: where there is no such stage.
    """
    if until is None:
        return tuple(stages)
    labels = [stage.label for stage in stages]
    if until not in labels:
        raise CompressError(
            f"--until: there is no stage '{until}' (there are {', '.join(labels)}){nearest(until, labels)}"
        )
    return tuple(stages[: labels.index(until) + 1])


class Keys:
    """Makes cache keys: everything that can change a checkpoint or a measurement."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Look at the data once.

        Raises:
            DataError: where data is missing.
        """
        self._pipeline = pipeline
        self._data: dict[str, JsonValue] = {
            **fingerprint(pipeline.data),
            "versions": dict(versions(_DATA_MODULE)),
            "code": code_digest(_DATA_MODULE),
        }
        self.device = resolved_device(pipeline)
        self.threads = pipeline.threads or max(1, machine.cores() // machine.processes_here())
        cuda = machine.cuda_device_name() if self.device == "cuda" else None
        self._place: dict[str, JsonValue] = {
            "device": f"cuda: {cuda}" if cuda else "cpu",
            "threads": self.threads,
            "bfloat16": machine.has_fast_bfloat16(),
            "vnni": machine.has_vnni(),
            "architecture": "arm" if machine.is_arm() else "x86",
            **({"processes": machine.processes()} if machine.processes() > 1 else {}),
        }

    def stage(
        self, planned: Planned, parent: Manifest | None, reference: Manifest | None, measured: Measurement | None
    ) -> dict[str, JsonValue]:
        """Key of a stage's checkpoint.

        Args:
            planned: the stage.
            parent: what it gets; None for the source.
            reference: what recovery distils from.
            measured: what bench found of the parent; only `export` writes it into its files.
        """
        written = measured.accuracy.model_dump(mode="json") if measured and planned.name == "export" else None
        return {
            "stage": planned.name,
            "settings": identity(planned.settings),
            "parent": parent.digest if parent else None,
            "reference": reference.digest if reference else None,
            "accuracy": written,
            "data": dict(self._data),  # the source, too, records shape, normalisation and classes
            "seed": planned.seed,
            "machine": None if planned.name == SOURCE else self._place | self._measured_on(planned),
            "versions": dict(versions(planned.module)),
            "code": code_digest(planned.module),
            **_guard_key(planned),
        }

    def _measured_on(self, planned: Planned) -> dict[str, JsonValue]:
        """The CPU, for a stage whose result depends on how fast it is."""
        is_timed = isinstance(planned.settings, StageConfig) and planned.settings.is_timed
        return {"cpu": machine.cpu_model()} if is_timed else {}

    def shared(self) -> dict[str, str]:
        """What processes that train together must all have, by a name for messages."""
        return {
            "the device": self.device,
            "the data": key_digest(self._data),
            "the code, or the versions of libraries": key_digest(self.answers() | {"machine": None}),
        }

    def answers(self) -> dict[str, JsonValue]:
        """Key of what teachers answer to the training split, besides the teacher and how it is asked."""
        return {
            "data": dict(self._data),
            "seed": self._pipeline.seed,  # which samples the split has
            "machine": self._place,
            "versions": {module: dict(versions(module)) for module in _TEACHER_MODULES},
            "code": {module: code_digest(module) for module in _TEACHER_MODULES},
        }

    def measurement(self, record: Manifest) -> dict[str, JsonValue]:
        """Key of what bench measures of a checkpoint."""
        return {
            "checkpoint": record.digest,
            "data": dict(self._data),
            "seed": self._pipeline.seed,
            "batch_size": self._pipeline.bench.batch_size,  # sums round differently
            "sensitivity": self._sensitivity(record),
            # How many samples a second it answers is this CPU's; what a stage makes is not.
            "machine": {**self._place, "cpu": machine.cpu_model()},
            "versions": dict(versions(_BENCH_MODULE)),
            "code": code_digest(_BENCH_MODULE),
        }

    def _sensitivity(self, record: Manifest) -> JsonValue:
        """What `measure` is to find out of a checkpoint's int8 layers; None where it has none, or nobody asks."""
        config = self._pipeline.bench.sensitivity
        if config is None or record.form != "int8":
            return None
        return {**identity(config), "seed": derive_seed(self._pipeline.seed, "sensitivity")}


class Cache:
    """The checkpoints of a run's folder."""

    def __init__(self, root: Path) -> None:
        """Look at `runs/<name>`, which need not exist.

        Raises:
            CompressError: where it could not be made or written, before anything is computed for it.
        """
        _check_writable(root)
        self.root = root

    def find(self, planned: Planned, key: Mapping[str, JsonValue]) -> tuple[Path, Manifest] | None:
        """The checkpoint with exactly this key, wherever in the order it was made."""
        for folder in self._made_with(planned, key):
            record = _readable(folder)
            if record is not None and record.key == dict(key):
                return folder, record
        return None

    def _made_with(self, planned: Planned, key: Mapping[str, JsonValue]) -> Iterator[Path]:
        return self.root.glob(f"*-{planned.label}-{key_digest(key)[:8]}*")

    def folder_for(self, planned: Planned, key: Mapping[str, JsonValue]) -> Path:
        """Where a checkpoint with this key belongs."""
        digest = key_digest(key)
        short = self.root / f"{planned.position:02d}-{planned.label}-{digest[:8]}"
        record = _readable(short) if short.is_dir() else None
        taken = record is not None and record.key != dict(key)
        return self.root / f"{planned.position:02d}-{planned.label}-{digest[:16]}" if taken else short

    def scratch_for(self, planned: Planned, key: Mapping[str, JsonValue]) -> Path:
        """Where a stage that is not finished keeps what it needs to go on."""
        return self.root / ".work" / f"{planned.label}-{key_digest(key)[:16]}"

    def measurement(self, folder: Path, key: Mapping[str, JsonValue]) -> Measurement | None:
        """What bench measured of a checkpoint, where that still holds."""
        try:
            found = Measurement.model_validate_json((folder / METRICS).read_bytes())
        except (OSError, ValidationError):
            return None
        model = folder / Path(found.model).name
        holds = found.key == dict(key) and model.is_file() and sha256_of(model) == found.sha256
        return found if holds else None

    def why_missing(self, planned: Planned, key: Mapping[str, JsonValue]) -> str:
        """Which fields changed against the most similar checkpoint of the same stage."""
        for folder in self._made_with(planned, key):
            if (folder / manifest.FILE_NAME).exists() and _readable(folder) is None:
                return f"the checkpoint {folder.name} is damaged"
        name = re.compile(rf"\d+-{re.escape(planned.label)}-[0-9a-f]+")
        siblings = [
            record
            for folder in self.root.glob(f"*-{planned.label}-*")
            if name.fullmatch(folder.name) and (record := _readable(folder)) is not None
        ]
        if not siblings:
            return "it has not run yet"
        changes = min((_by_interest(differences(record.key, dict(key))) for record in siblings), key=len)
        more = f" and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
        return f"changed: {', '.join(changes[:_SHOWN_CHANGES])}{more}"

    def sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for left in [*self.root.glob(f"{TEMPORARY}*"), *self.root.glob(f"*/{TEMPORARY}*")]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def make_plan(pipeline: Pipeline, runs: Path, *, fresh: bool = False, until: str | None = None) -> tuple[Step, ...]:
    """What a run would do, without doing it.

    Raises:
        ConfigError: where files that the pipeline names are missing.
        CompressError: where `until` names no stage.
    """
    check_files(pipeline)
    keys, cache = Keys(pipeline), Cache(runs / pipeline.name)
    stages = selected(planned_stages(pipeline), until)
    return tuple(_steps(stages, reference_position(pipeline), keys, cache, fresh=fresh))


def _steps(stages: Sequence[Planned], reference_at: int, keys: Keys, cache: Cache, *, fresh: bool) -> Iterator[Step]:
    parent: Manifest | None = None
    reference: Manifest | None = None
    measured: Measurement | None = None
    waits_for: str | None = None
    for planned in stages:
        if waits_for is not None:
            yield Step(planned, "follows", f"takes what '{waits_for}' makes", None)
            waits_for = planned.label
            continue
        key = keys.stage(planned, parent, reference, measured)
        found = None if fresh else cache.find(planned, key)
        if found is None:
            yield Step(planned, "run", "--fresh" if fresh else cache.why_missing(planned, key), None)
            waits_for = planned.label
            continue
        folder, parent = found
        if planned.position <= reference_at:
            reference = parent
        measured = cache.measurement(folder, keys.measurement(parent))
        yield Step(planned, "cached", "nothing changed", folder.name)


def _by_interest(changes: list[str]) -> list[str]:
    """What the user changed first; then what follows from that."""
    order = ("settings", "data", "seed", "machine", "versions", "code", "guard", "parent", "reference", "accuracy")
    fields = {change: re.split(r"[.:]", change)[0] for change in changes}
    if "parent" in fields.values():  # another model has another accuracy: nothing that the user did
        fields = {change: field for change, field in fields.items() if field != "accuracy"}
    if "settings" in fields.values():  # a budget that comes or goes brings its code along
        fields = {change: field for change, field in fields.items() if field != "guard"}
    return sorted(fields, key=lambda change: order.index(fields[change]))


def _guard_key(planned: Planned) -> dict[str, JsonValue]:
    """What decides besides the stage where it is held to a budget of its own; of others it is no part."""
    if getattr(planned.settings, "budget", None) is None:
        return {}
    return {"guard": {"versions": dict(versions(GUARD_MODULE)), "code": code_digest(GUARD_MODULE)}}


def resolved_device(pipeline: Pipeline) -> str:
    """'cpu' or 'cuda'."""
    if pipeline.device != "auto":
        return pipeline.device
    return "cuda" if machine.cuda_device_name() else "cpu"


def check_files(pipeline: Pipeline) -> None:
    """Check that every file, folder and package a pipeline names is there, and that the device can do what it asks for.

    Raises:
        ConfigError: with all that are missing.
    """
    problems = [*missing(pipeline.data)]
    for key, model in pipeline.models():
        problems += _missing_model(model, key)
    problems += unmet(pipeline, resolved_device(pipeline))
    if problems:
        raise ConfigError(replace(problem, where=pipeline.where(problem.key)) for problem in problems)


def _missing_model(model: ModelConfig, at: str) -> Iterator[Problem]:
    weights = model.weights
    place, _, _ = model.factory.rpartition(":")
    if weights and is_weights_file(weights):
        if not os.path.isfile(weights):  # noqa: PTH113  # Path's raises
            yield Problem("", f"{at}.weights", no_such("file", Path(weights)))
    elif weights and place not in WITH_PUBLISHED_WEIGHTS:
        endings = f"{', '.join(WEIGHTS_ENDINGS[:-1])} or {WEIGHTS_ENDINGS[-1]}"
        yield Problem("", f"{at}.weights", f"must be a file that ends in {endings}, got '{weights}'")
    if place.endswith(".py") and not os.path.isfile(place):  # noqa: PTH113
        yield Problem("", f"{at}.factory", no_such("file", Path(place)))


def _check_writable(root: Path) -> None:
    there = root
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):  # noqa: PTH112  # Path's raises on names too long
        raise CompressError(
            f"{root}: the run cannot be written there: {there} is not a folder; name another with --runs"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise CompressError(
            f"{root}: the run cannot be written there: no permission to write in {there}; name another with --runs"
        )


def _readable(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where it is no whole checkpoint, which then counts as not there."""
    try:
        return manifest.read(folder)
    except CheckpointError:
        return None
