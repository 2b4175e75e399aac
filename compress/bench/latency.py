"""Latency of ONNX models on the CPU, measured so that the rows of a table may be compared.

Every model has a process of its own, because ONNX Runtime's threads spin on each other's cores. The processes take
turns in rounds, so that a drift of the machine reaches all of them, and the first of a round changes, so that no model
always follows the same rest. No sample is thrown away.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from compress.config.pipeline import LatencyConfig
from compress.errors import CompressError
from compress.events import Progress
from compress.machine import cores
from compress.methods.statistics import median_interval, quantile
from compress.results import Latency

PATIENCE_SECONDS = 120.0
"""How long a worker may stay silent beyond the time it was asked to measure."""

_WORKER = Path(__file__).with_name("latency_worker.py")


@dataclass(frozen=True)
class Variant:
    """One ONNX file to measure."""

    name: str
    """What results and messages call it; unique among those measured together."""
    path: Path
    precision: str
    """'fp32' or 'int8'; only passed on to the records."""


def measure(variants: Sequence[Variant], config: LatencyConfig, progress: Progress) -> dict[str, tuple[Latency, ...]]:
    """Time every variant at every batch size and number of threads.

    Random but seeded float32 inputs, zeros for int64 ones; ONNX Runtime's CPU provider, sequential execution, one thread
    pool per process. Equal files under two names are measured twice, which shows how far the numbers can be trusted.

    Args:
        variants: The models; their names differ.
        config: Batch sizes, threads, rounds, and seconds per variant and round.
        progress: Told of every round, of models whose own batch size rules out a setting (they get no record for
            it), and of more threads than cores.

    Returns:
        For each name one record per batch size and number of threads, in the order of `config`, in milliseconds.

    Raises:
        CompressError: where a model cannot be loaded or run, or its process dies or stays silent; it names the variant.
    """
    assert len({variant.name for variant in variants}) == len(variants), "names of variants differ"
    if max(config.threads) > cores():
        progress.warn(
            f"latency with {max(config.threads)} threads on {cores()} core(s): the threads wait for each other, "
            "the numbers say little"
        )
    records: dict[str, list[Latency]] = {variant.name: [] for variant in variants}
    settings = [(batch_size, threads) for batch_size in config.batch_sizes for threads in config.threads]
    unfit: set[tuple[str, int]] = set()
    for index, (batch_size, threads) in enumerate(settings):
        with ExitStack() as stack:
            # All start before the first answers: their imports overlap, nothing is measured meanwhile.
            workers = [
                stack.enter_context(_Worker(variant, threads))
                for variant in variants
                if (variant.name, batch_size) not in unfit
            ]
            ready: list[_Worker] = []
            for worker in workers:
                fixed_batch = worker.load(batch_size)
                if fixed_batch is None:
                    ready.append(worker)
                    continue
                unfit.add((worker.variant.name, batch_size))
                progress.warn(
                    f"latency of '{worker.variant.name}' at batch size {batch_size} left out: "
                    f"the file only takes {fixed_batch}"
                )
            for worker in ready:
                worker.warm_up()
            for turn in range(config.rounds):
                progress.work(
                    "latency",
                    index * config.rounds + turn,
                    len(settings) * config.rounds,
                    f"batch size {batch_size}, {threads} thread{'s' if threads > 1 else ''}",
                )
                first = turn % max(1, len(ready))
                for worker in ready[first:] + ready[:first]:
                    worker.measure(config.seconds)
            for worker in ready:
                records[worker.variant.name].append(worker.latency(batch_size))
    progress.work("latency", len(settings) * config.rounds, len(settings) * config.rounds)
    return {name: tuple(found) for name, found in records.items()}


class _Worker:
    """The process of one variant; ended, whatever happens, with the `with` block."""

    def __init__(self, variant: Variant, threads: int) -> None:
        self.variant = variant
        self._threads = threads
        self._nanoseconds: list[int] = []
        self._round_medians: list[float] = []
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # A file, not a pipe: a pipe that nobody reads fills up and blocks the worker.
        self._log: IO[bytes] = tempfile.TemporaryFile()
        # Run as a file with -P: a module of the user's folder named like a standard one must not be picked up.
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter and file)
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
        )
        # Only a thread can wait for a line with a time limit on every system.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # It holds nothing worth saving, and after an error it may never listen again.
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # A request that the process no longer took is still in the buffer.
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def load(self, batch_size: int) -> int | None:
        """Make the session; returns the model's own batch size where that rules out `batch_size`."""
        path = str(self.variant.path.resolve())
        answer = self._ask({"do": "load", "path": path, "threads": self._threads, "batch_size": batch_size})
        fixed_batch: int | None = answer["fixed_batch"]
        return fixed_batch

    def warm_up(self) -> None:
        """Call the model until its latency is steady."""
        self._ask({"do": "warm_up"})

    def measure(self, seconds: float) -> None:
        """Add the samples of one round."""
        found = self._ask({"do": "measure", "seconds": seconds}, seconds)["nanoseconds"]
        self._nanoseconds += found
        self._round_medians.append(float(np.median(found)) / 1e6)

    def latency(self, batch_size: int) -> Latency:
        """What all rounds together say."""
        milliseconds = np.asarray(self._nanoseconds, dtype=np.float64) / 1e6
        # Calls of one round share whatever the machine was doing then: the rounds are the independent samples.
        median, low, high = median_interval(np.asarray(self._round_medians))
        return Latency(
            device="cpu",
            backend="onnxruntime",
            provider="CPUExecutionProvider",
            precision=self.variant.precision,
            batch_size=batch_size,
            threads=self._threads,
            median_ms=median,
            low_ms=low,
            high_ms=high,
            p90_ms=quantile(milliseconds, 0.9),
            p99_ms=quantile(milliseconds, 0.99),
            runs=len(milliseconds),
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _ask(self, request: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        try:
            line = self._answers.get(timeout=PATIENCE_SECONDS + seconds)
        except queue.Empty:
            raise self._failure(f"no answer for {PATIENCE_SECONDS + seconds:.0f} s") from None
        if line is None:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CompressError(f"latency of '{self.variant.name}': {answer['error']}")
        return answer

    def _ended(self) -> CompressError:
        return self._failure(f"its process ended with code {self._process.wait()}")

    def _failure(self, what: str) -> CompressError:
        """The error to raise, with the last line that the process wrote to standard error."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        return CompressError(f"latency of '{self.variant.name}': {what}" + (f": {lines[-1]}" if lines else ""))
