"""Latency of models on any backend, measured so that the rows of a table may be compared.

Every model has a process of its own, because the threads of a runtime spin on each other's cores. The processes take
turns in rounds, so that a drift of the machine reaches all of them, and their order changes, so that none always follows
the same one. No sample is thrown away. The reference takes part twice: what the two seem to differ by is noise (A/A).

Processes are not bound to cores: users' are not either, and one that is cannot make way for whatever else runs there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from compress.bench.backends.base import MODULES, Task
from compress.bench.latency_process import NotRunError, WorkerProcess
from compress.config.pipeline import LatencyConfig
from compress.events import Progress
from compress.machine import cores
from compress.measured import Latency, NotMeasured, Ratio, Repeat
from compress.methods.statistics import is_noisy_repeat, median_interval, paired_ratio, quantile, tellable_difference

BACKENDS: Final = tuple(MODULES)
DEVICES: Final = ("cpu", "cuda")
HARNESS: Final = (
    "compress.bench.latency",
    "compress.bench.worker_start",
    "compress.bench.latency_worker",
    "compress.bench.backends.onnx_runtime",
)
"""Modules whose code decides what is measured of ONNX files on ONNX Runtime, each with all that it imports."""

_TORCH = ("torch", "torch-compile")


@dataclass(frozen=True)
class Variant:
    """One model on one backend."""

    name: str
    """What results and messages call it; unique together with backend, device, compute and precision."""
    path: Path
    """Its ONNX file; PyTorch does not read it."""
    precision: str
    """Of the file, as `compress.bench.size.precision_of` tells it."""
    checkpoint: Path | None = None
    """Its folder, which PyTorch needs."""
    trusted: frozenset[str] = frozenset()
    """Factories of the user's code that may be run to build the checkpoint."""
    device: str = "cpu"
    """One of `DEVICES`."""
    backend: str = "onnxruntime"
    """One of `BACKENDS`."""
    compute: str = ""
    """For PyTorch on CUDA: 'fp32', 'fp16' or 'bf16'; '' is what the file holds."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """By name of an input, its sizes without the batch, where the file leaves them open."""


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    latencies: dict[str, tuple[Latency, ...]]
    """By variant name: backend by backend, batch size by batch size, and for each the numbers of threads."""
    repeats: tuple[Repeat, ...]
    """The reference of each group against itself, in the same order."""
    missing: tuple[NotMeasured, ...]
    """What was asked for and has no latency."""


def measure(
    variants: Sequence[Variant], config: LatencyConfig, progress: Progress, reference: str | None = None
) -> Measured:
    """Time every variant at every batch size and number of threads.

    Variants of one backend, device and type are measured together in alternating rounds, and compared with the reference
    among them. Where that cannot run in a setting, or is none of them, the first that can takes its place there, so that
    they are still compared; `Ratio.against` and `Repeat.name` say with which. One that ends in the middle of the rounds is
    not replaced: then there are no ratios.

    Inputs are random but seeded floats, and zeros for integers; on a device they lie there already, and outputs stay there.
    One call at a time, one pool of threads per process.

    A cold start is loading the model plus its first call, by the clock, in a process that has imported its libraries and
    whose file the system has probably cached; with PyTorch it includes checking the checkpoint's digests, and the
    compilation where that is the backend. Peak memory is that of the process's whole life.

    What cannot be measured, for whatever reason, becomes a record in `missing`; nothing that a model or a backend does
    raises here.

    Args:
        variants: The models; equal files under two names are measured twice.
        config: Batch sizes, threads, rounds, and seconds per variant and round.
        progress: Told of every round, of settings in which the machine is too noisy to tell differences of 5 %, and of
            more threads than cores. Not of what is missing: `reasons` puts that into words.
        reference: Name of the variant that the others are compared with, where it can run; the first where it is left out.

    Returns:
        Times in milliseconds, ratios, and what is missing.
    """
    assert len({_identity(variant) for variant in variants}) == len(variants), "variants differ"
    assert all(variant.backend in BACKENDS and variant.device in DEVICES for variant in variants)
    assert reference is None or reference in {variant.name for variant in variants}
    if max(config.threads) > cores():
        progress.warn(
            f"latency with {max(config.threads)} threads on {cores()} core(s): the threads wait for each other, "
            "the numbers say little"
        )
    groups: dict[tuple[str, str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.device, variant.backend, variant.compute), []).append(variant)
    against = reference if reference is not None or not variants else variants[0].name
    found = _Found(config, progress, steps=len(groups) * len(config.batch_sizes) * len(config.threads) * config.rounds)
    for group in groups.values():
        for batch_size in config.batch_sizes:
            for threads in config.threads:
                found.measure(group, against, _Setting(group[0].device, group[0].backend, batch_size, threads))
    progress.work("latency", found.steps, found.steps)
    latencies = {
        variant.name: tuple(latency for name, latency in found.latencies if name == variant.name)
        for variant in variants
    }
    return Measured(latencies, tuple(found.repeats), tuple(found.missing))


def reasons(missing: Sequence[NotMeasured]) -> tuple[str, ...]:
    """What is missing and why, a line for each variant and reason, for people."""
    settings: dict[tuple[str, str, str], list[str]] = {}
    for each in missing:
        where = f"{each.backend} on {each.device}"
        setting = _Setting(each.device, each.backend, each.batch_size, each.threads)
        settings.setdefault((each.name, where, each.reason), []).append(str(setting))
    return tuple(
        f"no latency of '{name}' in {where} ({'; '.join(dict.fromkeys(found))}): {reason}"
        for (name, where, reason), found in settings.items()
    )


def order(runners: int, turn: int) -> list[int]:
    """Positions of the runners in the order in which they run in round `turn`, from 0.

    Two rounds in a row go through them forwards and back, so that of any two each comes first as often and neither gains by
    a machine that gets faster or slower; the next two begin one further on.
    """
    if runners == 0:
        return []
    first = (turn // 2) % runners
    forwards = [*range(first, runners), *range(first)]
    return forwards if turn % 2 == 0 else forwards[::-1]


@dataclass(frozen=True)
class _Setting:
    device: str
    backend: str
    batch_size: int
    threads: int

    def __str__(self) -> str:
        return f"batch size {self.batch_size}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass
class _Found:
    """Collects what is measured, setting by setting."""

    config: LatencyConfig
    progress: Progress
    steps: int
    """Rounds in all settings."""
    done: int = 0
    latencies: list[tuple[str, Latency]] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    missing: list[NotMeasured] = field(default_factory=list)
    unavailable: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why a backend cannot run on a device, once it was tried."""

    def measure(self, group: Sequence[Variant], against: str | None, setting: _Setting) -> None:
        """One setting of the variants of one backend."""
        able: list[Variant] = []
        for variant in group:
            why_not = refusal(variant) or self.unavailable.get((variant.backend, variant.device))
            if why_not is None:
                able.append(variant)
            else:
                self._miss(variant, setting, why_not)
        if not able:
            self._rounds([], setting)
            return
        with ExitStack() as stack:
            runners = [stack.enter_context(_Runner(variant, setting, "measured")) for variant in able]
            base = next((runner for runner in runners if runner.variant.name == against), runners[0])
            twin = stack.enter_context(_Runner(base.variant, setting, "repeat"))
            self.progress.work("latency", self.done, self.steps, f"{setting.backend}, {setting}: loading")
            runners = self._load([*runners, twin], setting)
            if base not in runners:
                twin.stop()
                runners = [runner for runner in runners if runner is not twin]
                if runners:
                    base = runners[0]
                    twin = stack.enter_context(_Runner(base.variant, setting, "repeat"))
                    runners += self._load([twin], setting)
            runners = self._each(runners, _Runner.warm_up, setting)
            runners = self._rounds(runners, setting)
            runners = self._each(runners, _Runner.finish, setting)
            self._keep(runners, base, twin, setting)

    def _load(self, runners: Sequence[_Runner], setting: _Setting) -> list[_Runner]:
        """Those that load. All start before the first answers: their imports overlap. Loading is timed, one by one."""
        for step in (_Runner.start, _Runner.prepared, _Runner.load):
            runners = self._each(runners, step, setting)
        return list(runners)

    def _rounds(self, runners: list[_Runner], setting: _Setting) -> list[_Runner]:
        for turn in range(self.config.rounds):
            self.progress.work("latency", self.done, self.steps, f"{setting.backend}, {setting}")
            in_order = [runners[position] for position in order(len(runners), turn)]
            alive = self._each(in_order, lambda runner: runner.measure(self.config.seconds), setting)
            runners = [runner for runner in runners if runner in alive]
            self.done += 1
        return runners

    def _each(self, runners: Sequence[_Runner], step: Callable[[_Runner], None], setting: _Setting) -> list[_Runner]:
        """Those for which the step succeeds; the others are missing from here on."""
        alive = []
        for runner in runners:
            try:
                step(runner)
            except NotRunError as error:
                runner.stop()  # what hangs must not keep the others from their cores
                if error.is_unavailable:
                    self.unavailable[runner.variant.backend, runner.variant.device] = str(error)
                if runner.role == "measured":
                    self._miss(runner.variant, setting, str(error))
            else:
                alive.append(runner)
        return alive

    def _miss(self, variant: Variant, setting: _Setting, reason: str) -> None:
        self.missing.append(
            NotMeasured(
                name=variant.name,
                device=variant.device,
                backend=variant.backend,
                precision=variant.compute or variant.precision,
                batch_size=setting.batch_size,
                threads=setting.threads,
                reason=reason,
            )
        )

    def _keep(self, runners: Sequence[_Runner], base: _Runner, twin: _Runner, setting: _Setting) -> None:
        reference = base if base in runners else None
        for runner in runners:
            if runner is not twin:
                ratio = None if reference is None or runner is reference else runner.ratio(reference)
                self.latencies.append((runner.variant.name, runner.latency(ratio)))
        if reference is None or twin not in runners:
            return
        ratio = twin.ratio(reference)
        repeat = Repeat(
            name=reference.variant.name,
            device=setting.device,
            backend=setting.backend,
            precision=reference.precision,
            batch_size=setting.batch_size,
            threads=setting.threads,
            ratio=ratio,
            is_noisy=is_noisy_repeat(ratio.low, ratio.high),
        )
        self.repeats.append(repeat)
        if repeat.is_noisy:
            percent = 100 * tellable_difference(ratio.low, ratio.high)
            self.progress.warn(
                f"latency in {setting.backend} on {setting.device}, {setting}: this machine is too noisy now to tell "
                f"differences under {percent:.0f} % apart ('{repeat.name}' against itself: {ratio.value:.3f}× "
                f"[{ratio.low:.3f}, {ratio.high:.3f}])"
            )


class _Runner:
    """One variant in one setting: its process, and what that measured."""

    def __init__(self, variant: Variant, setting: _Setting, role: Literal["measured", "repeat"]) -> None:
        self.variant = variant
        self.role = role
        self.precision = variant.precision
        self._setting = setting
        self._process = WorkerProcess(_task(variant, setting))
        self._loaded: dict[str, Any] = {}
        self._peak_bytes: int | None = None
        self._nanoseconds: list[int] = []
        self._round_medians: list[float] = []

    def __enter__(self) -> _Runner:
        self._process.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.__exit__(*error)

    def start(self) -> None:
        """Let the process begin to import."""
        self._process.start()

    def prepared(self) -> None:
        """Wait until it has."""
        self._process.prepared()

    def load(self) -> None:
        """Load the model and call it once, which is timed."""
        self._loaded = self._process.ask("load")
        self.precision = self._loaded["precision"]

    def warm_up(self) -> None:
        """Call the model until its latency is steady."""
        self._process.ask("warm_up")

    def measure(self, seconds: float) -> None:
        """Add the samples of one round."""
        found = self._process.ask("measure", seconds)["nanoseconds"]
        self._nanoseconds += found
        self._round_medians.append(float(np.median(found)) / 1e6)

    def finish(self) -> None:
        """Ask for what is known at the end only."""
        self._peak_bytes = self._process.ask("memory")["peak_bytes"]

    def stop(self) -> None:
        """End the process."""
        self._process.stop()

    def ratio(self, reference: _Runner) -> Ratio:
        """How many times faster than the reference, round by round."""
        value, low, high = paired_ratio(reference._round_medians, self._round_medians)
        return Ratio(against=reference.variant.name, value=value, low=low, high=high)

    def latency(self, ratio: Ratio | None) -> Latency:
        """What all rounds together say."""
        milliseconds = np.asarray(self._nanoseconds, dtype=np.float64) / 1e6
        # Calls of one round share whatever the machine was doing then: the rounds are the independent samples.
        median, low, high = median_interval(np.asarray(self._round_medians))
        return Latency(
            device=self.variant.device,
            backend=self.variant.backend,
            provider=self._loaded["provider"],
            precision=self.precision,
            batch_size=self._setting.batch_size,
            threads=self._setting.threads,
            median_ms=median,
            low_ms=low,
            high_ms=high,
            p90_ms=quantile(milliseconds, 0.9),
            p99_ms=quantile(milliseconds, 0.99),
            runs=len(milliseconds),
            samples_per_second=1e3 * self._setting.batch_size / median,
            cold_start_ms=self._loaded["cold_start_ns"] / 1e6,
            peak_memory_bytes=self._peak_bytes,
            ratio=ratio,
        )


def refusal(variant: Variant) -> str | None:
    """Why this backend never runs such a variant, None where it may."""
    if variant.backend in _TORCH:
        if variant.checkpoint is None:
            return "PyTorch runs checkpoints, not ONNX files"
        if variant.precision == "int8":
            return "the int8 model is an ONNX file; PyTorch has its float weights only"
        if variant.device == "cpu" and variant.compute not in ("", "fp32"):
            return f"{variant.compute} is measured on CUDA only"
        return None
    if variant.backend == "openvino" and variant.device != "cpu":
        return "OpenVINO is measured on the CPU only"
    if variant.backend == "tensorrt" and variant.device != "cuda":
        return "TensorRT runs on CUDA devices only"
    if variant.compute not in ("", variant.precision):
        return f"{variant.backend} computes in what the file holds, {variant.precision}"
    return None


def _identity(variant: Variant) -> tuple[str, ...]:
    return variant.name, variant.backend, variant.device, variant.compute, variant.precision


def _task(variant: Variant, setting: _Setting) -> Task:
    return Task(
        backend=variant.backend,
        device=variant.device,
        compute=variant.compute,
        precision=variant.precision,
        path=str(variant.path.resolve()),
        checkpoint=None if variant.checkpoint is None else str(variant.checkpoint.resolve()),
        trusted=tuple(sorted(variant.trusted)),
        batch_size=setting.batch_size,
        threads=setting.threads,
        shapes=dict(variant.shapes),
        import_paths=tuple(str(Path(place).resolve()) for place in sys.path) if variant.backend in _TORCH else (),
    )
