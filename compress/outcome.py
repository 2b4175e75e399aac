"""What a run ends in: a row per stage, the difference to the reference, the budget, latencies, the report and `dist/`."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import machine
from compress.bench import latency
from compress.bench.accuracy import unpack
from compress.checkpoint import Checkpoint
from compress.config import Pipeline
from compress.errors import CompressError
from compress.events import Progress
from compress.files import new_folder, readable_json, write_file
from compress.manifest import METADATA, WEIGHTS
from compress.methods.statistics import paired_difference
from compress.plan import Planned, reference_position
from compress.provenance import code_digest, identity, versions
from compress.report import write_report
from compress.results import (
    Artifact,
    Budget,
    Latency,
    Machine,
    Measurement,
    PairedDifference,
    Results,
    Row,
    load_results,
)
from compress.stages import STAGES

RESULTS = "results.json"


@dataclass(frozen=True)
class Done:
    """A stage that is on disk and measured."""

    planned: Planned
    checkpoint: Checkpoint
    measurement: Measurement


@dataclass(frozen=True)
class Outcome:
    """Where a run's results go, and what they say besides the rows."""

    pipeline: Pipeline
    classes: tuple[str, ...]
    root: Path
    """Folder of the run."""
    progress: Progress
    command: str
    warnings: list[str]
    """Of the run so far; a failing latency measurement adds one."""

    def write(self, done: Sequence[Done], *, reuse_latencies: bool) -> Results:
        """Write `results.json`, the report and `dist/`; measure latency last.

        Args:
            done: the stages that ran, from the source on.
            reuse_latencies: take those of the last run where nothing that decides them has changed.
        """
        here = _machine()
        known = self._known_latencies(done, here) if reuse_latencies else None
        reference = done[min(len(done) - 1, reference_position(self.pipeline))]
        artifact = self._publish(done[-1])
        difference = _difference(reference.measurement, done[-1].measurement) if done[-1] is not reference else None
        budget = None
        whole = len(done) == len(self.pipeline.stages) + 1
        if self.pipeline.budget is not None and difference is not None and whole:
            allowed = self.pipeline.budget.accuracy_drop
            budget = Budget(accuracy_drop=allowed, difference=difference, met=-difference.points <= allowed)
        results = Results(
            name=self.pipeline.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seed=self.pipeline.seed,
            command=self.command,
            settings=identity(self.pipeline),
            machine=here,
            reference=reference.planned.label,
            classes=self.classes,
            rows=tuple(_row(one, (known or {}).get(one.planned.label, ())) for one in done),
            difference=difference,
            budget=budget,
            artifact=artifact,
            warnings=tuple(self.warnings),
        )
        self._write(results)
        if known is None and self.pipeline.bench.latency is not None:
            # Everything else is safe on disk by now: a model too slow to time costs its latency only.
            results = self._with_latencies(results, done)
            self._write(results)
        return results

    def _write(self, results: Results) -> None:
        write_file(self.root / RESULTS, readable_json(results.model_dump(mode="json")))
        write_report(results, self.root)

    def _known_latencies(self, done: Sequence[Done], here: Machine) -> dict[str, tuple[Latency, ...]] | None:
        """Latencies of the last run, where all rows, the settings and the machine are still the same."""
        path = self.root / RESULTS
        if not path.is_file():
            return None
        try:
            known = load_results(path)
        except CompressError:
            return None
        same_rows = [(row.stage, row.sha256) for row in known.rows] == [
            (one.planned.label, one.measurement.sha256) for one in done
        ]
        same_settings = known.settings.get("bench") == identity(self.pipeline).get("bench")
        measured = any(row.latency for row in known.rows) or self.pipeline.bench.latency is None
        if not (same_rows and same_settings and measured and known.machine == here):
            return None
        return {row.stage: row.latency for row in known.rows}

    def _with_latencies(self, results: Results, done: Sequence[Done]) -> Results:
        assert self.pipeline.bench.latency is not None
        self.progress.note("latency of all rows, in alternating rounds, a process each")
        variants = [
            latency.Variant(one.planned.label, one.checkpoint.path / one.measurement.model, one.measurement.precision)
            for one in done
        ]
        try:
            found = latency.measure(variants, self.pipeline.bench.latency, self.progress)
        except CompressError as error:
            self.warnings.append(f"no latency: {error}")
            self.progress.warn(self.warnings[-1])
            return results.model_copy(update={"warnings": tuple(self.warnings)})
        rows = tuple(row.model_copy(update={"latency": found.get(row.stage, ())}) for row in results.rows)
        return results.model_copy(update={"rows": rows, "warnings": tuple(self.warnings)})

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


def _row(done: Done, latencies: tuple[Latency, ...]) -> Row:
    entry = done.checkpoint.history[-1]
    return Row(
        stage=done.planned.label,
        accuracy=done.measurement.accuracy,
        parameters=done.measurement.parameters,
        macs=done.measurement.macs,
        size_bytes=done.measurement.size_bytes,
        sha256=done.measurement.sha256,
        seconds=entry.seconds,
        latency=latencies,
        checkpoint=done.checkpoint.path.name,
        digest=done.checkpoint.digest,
        precision=done.measurement.precision,
        notes=entry.notes,
        warnings=entry.warnings,
    )


def _difference(reference: Measurement, other: Measurement) -> PairedDifference:
    """Validation accuracy of `other` minus the reference's, on the same samples."""
    n = reference.accuracy.validation.n
    first, second = unpack(reference.correct["validation"], n), unpack(other.correct["validation"], n)
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    _, low, high = paired_difference(first, second)
    return PairedDifference(
        points=100.0 * (gained - lost) / n,  # in this order: 7 of 1,000 are 0.7 points, not a rounding error more
        low=100.0 * low,
        high=100.0 * high,
        n=n,
        only_reference_correct=lost,
        only_artifact_correct=gained,
    )


def _machine() -> Machine:
    modules = ("compress.pipeline", *(stage.module for stage in STAGES.values()))
    known = {name: number for module in modules for name, number in versions(module).items()}
    # Figures of another harness are not reused.
    harness = code_digest("compress.bench.latency") + code_digest("compress.bench.latency_worker")
    known["compress latency harness"] = hashlib.sha256(harness.encode()).hexdigest()[:12]
    return Machine(
        cpu=machine.cpu_model(),
        cores=machine.cores(),
        architecture=platform.machine(),
        instruction_sets=tuple(sorted(machine.cpu_flags() & machine.INTERESTING_FLAGS)),
        cuda_device=machine.cuda_device_name(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=dict(sorted(known.items())),
    )
