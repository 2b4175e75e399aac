"""What a run ends in: a row per stage, the difference to the reference, the budget, times, the report and `dist/`."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from compress.bench import latency, profile
from compress.bench.changed import changed_samples
from compress.checkpoint import Checkpoint
from compress.config import Pipeline
from compress.config.pipeline import LatencyConfig
from compress.data.base import Dataset
from compress.errors import CompressError
from compress.events import Progress
from compress.files import new_folder, readable_json, write_file
from compress.manifest import METADATA, WEIGHTS
from compress.plan import reference_position
from compress.provenance import identity
from compress.report import write_report
from compress.results import RESULTS, Artifact, Budget, ChangedSample, Machine, Results, Row, load_results
from compress.rows import Done, rows_of
from compress.surroundings import git_revision, machine_record
from compress.timed import crowding, main_setting
from compress.told import without_folders


@dataclass(frozen=True)
class Outcome:
    """Where a run's results go, and what they say besides the rows."""

    pipeline: Pipeline
    data: Dataset
    root: Path
    """Folder of the run."""
    progress: Progress
    command: str
    warnings: list[str]
    """Of the run so far; what cannot be timed adds to them."""

    def write(self, done: Sequence[Done], *, reuse_times: bool) -> Results:
        """Write `results.json`, the report and `dist/`; take times last.

        Args:
            done: the stages that ran, from the source on.
            reuse_times: take latencies and times per node of the last run where nothing that decides them has changed.
        """
        here = machine_record()
        reference = done[min(len(done) - 1, reference_position(self.pipeline))]
        known = self._known(done, reference, here) if reuse_times else None
        rows = tuple(rows_of(done, reference, self.data))
        artifact = self._publish(done[-1])
        results = Results(
            name=self.pipeline.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seed=self.pipeline.seed,
            command=self.command,
            git_revision=git_revision(_folder_of(self.pipeline)),
            settings=identity(self.pipeline),
            machine=here,
            reference=reference.planned.label,
            classes=self.data.classes,
            rows=rows if known is None else _timed_as(rows, known),
            repeats=() if known is None else known.repeats,
            changed=self._changed(reference, done[-1]),
            budget=self._budget(rows),
            artifact=artifact,
            warnings=tuple(self.warnings),
        )
        self._write(results)
        config = self.pipeline.bench.latency
        if config is None:
            return results
        # Everything else is safe on disk by now: a model too slow to time costs its times only.
        # Measuring tells it too; kept here, it stands beside times that are known already. Noise stands in `repeats`.
        self.warnings.extend(filter(None, [crowding(config)]))
        timed = results if known is not None else self._with_latencies(results, done, config)
        timed = self._with_profiles(timed, done, config)
        timed = timed.model_copy(update={"warnings": tuple(self.warnings)})
        if timed != results:
            self._write(timed)
        return timed

    def _write(self, results: Results) -> None:
        write_file(self.root / RESULTS, readable_json(results.model_dump(mode="json")))
        write_report(results, self.root)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    def _places(self) -> tuple[Path, ...]:
        """Where the files lie that an error may name."""
        root = getattr(self.pipeline.data, "root", None)
        return (self.root, *(() if root is None else (root,)))

    def _budget(self, rows: Sequence[Row]) -> Budget | None:
        """Whether the last row keeps to the budget; None where there is none, or not all stages ran."""
        comparison, budget = rows[-1].comparison, self.pipeline.budget
        if budget is None or comparison is None or len(rows) != len(self.pipeline.stages) + 1:
            return None
        difference = comparison.validation
        met = -difference.points <= budget.accuracy_drop
        return Budget(accuracy_drop=budget.accuracy_drop, difference=difference, met=met)

    def _changed(self, reference: Done, last: Done) -> tuple[ChangedSample, ...]:
        try:
            # Decisions are read off these images: none of them is a test image.
            return changed_samples(reference.measurement, last.measurement, self.data.for_decisions())
        except CompressError as error:
            self._warn(without_folders(f"no images of changed answers: {error}", self._places()))
            return ()

    def _known(self, done: Sequence[Done], reference: Done, here: Machine) -> Results | None:
        """The last run's results where all rows, the settings and the machine are still the same, and no latency lacks."""
        config, path = self.pipeline.bench.latency, self.root / RESULTS
        if config is None or not path.is_file():
            return None
        try:
            known = load_results(path)
        except CompressError:  # of an older version, or damaged
            return None
        same_rows = [(row.stage, row.sha256) for row in known.rows] == [
            (one.planned.label, one.measurement.sha256) for one in done
        ]
        same_settings = _latency_settings(known.settings) == _latency_settings(identity(self.pipeline))
        same_place = known.machine == here and known.reference == reference.planned.label
        settings = len(config.batch_sizes) * len(config.threads)
        complete = all(len(row.latency) == settings for row in known.rows)
        return known if same_rows and same_settings and same_place and complete else None

    def _with_latencies(self, results: Results, done: Sequence[Done], config: LatencyConfig) -> Results:
        self.progress.note("latency of all rows, in alternating rounds, a process each")
        variants = [latency.Variant(one.planned.label, _model_of(one), one.measurement.precision) for one in done]
        found = latency.measure(variants, config, self.progress, results.reference)
        for text in latency.reasons(found.missing):
            self._warn(without_folders(text, self._places()))
        rows = tuple(row.model_copy(update={"latency": found.latencies.get(row.stage, ())}) for row in results.rows)
        return results.model_copy(update={"rows": rows, "repeats": found.repeats})

    def _with_profiles(self, results: Results, done: Sequence[Done], config: LatencyConfig) -> Results:
        """Times per node of the reference and the last row, where the last run has none."""
        wanted = {results.reference, results.rows[-1].stage}
        rows = []
        for row, one in zip(results.rows, done, strict=True):
            rows.append(row)
            if row.stage not in wanted or row.profile is not None:
                continue
            self.progress.note(f"time per node of '{row.stage}'")
            try:
                found = profile.profile(_model_of(one), *main_setting(config))
            except CompressError as error:
                self._warn(without_folders(f"no times per node of '{row.stage}': {error}", self._places()))
                continue
            rows[-1] = row.model_copy(update={"profile": found})
        return results.model_copy(update={"rows": tuple(rows)})

    def _publish(self, last: Done) -> Artifact | None:
        """Put the exported files into `dist/`, all or none; what an earlier run put there would be another model's."""
        if last.checkpoint.form != "exported":
            shutil.rmtree(self.root / "dist", ignore_errors=True)
            return None
        files = {name: r for name, r in last.checkpoint.manifest.files.items() if name != WEIGHTS}
        with new_folder(self.root / "dist") as folder:
            for name in files:
                shutil.copyfile(last.checkpoint.path / name, folder / name)
        verification = _verification(last.checkpoint)
        return Artifact(
            files={name: record.bytes for name, record in files.items()},
            sha256={name: record.sha256 for name, record in files.items()},
            model=last.measurement.model,
            max_error=verification["fp32_max_error"],
            agreement=verification["int8_agreement"],
        )


def _verification(checkpoint: Checkpoint) -> dict[str, float | None]:
    content = json.loads((checkpoint.path / METADATA).read_bytes())
    verification: dict[str, float | None] = content["verification"]
    return verification


def _model_of(done: Done) -> Path:
    return done.checkpoint.path / done.measurement.model


def _timed_as(rows: Sequence[Row], known: Results) -> tuple[Row, ...]:
    """The rows with the times that results of the same rows have."""
    return tuple(
        row.model_copy(update={"latency": same.latency, "profile": same.profile})
        for row, same in zip(rows, known.rows, strict=True)
    )


def _latency_settings(settings: Mapping[str, JsonValue]) -> JsonValue:
    """How times are taken: nothing else under `bench` decides them."""
    bench = settings.get("bench")
    return bench.get("latency") if isinstance(bench, dict) else None


def _folder_of(pipeline: Pipeline) -> Path:
    """Folder of the pipeline file; the working directory where there is none."""
    for key in type(pipeline).model_fields:
        file, colon, _ = pipeline.where(key).rpartition(":")
        if colon:  # '--set' has none
            return Path(file).parent
    return Path()
