"""Measures one ONNX model in a process of its own; `compress.bench.latency` starts it and asks it.

It reads one JSON object a line from standard input and answers each with one line on standard output; it ends with its
input. An answer is an object, {"error": "..."} where a request failed.

    {"do": "load", "path": str, "threads": int, "batch_size": int} -> {"fixed_batch": int | null}
    {"do": "warm_up"}                                              -> {}
    {"do": "measure", "seconds": float}                            -> {"nanoseconds": [int, ...]}
    {"do": "quit"}                                                 -> no answer, the process ends

`fixed_batch` tells that the model only takes that other batch size; it cannot be measured then.
Only the standard library, numpy and onnxruntime are imported, so that it starts fast and nothing else competes.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

LEAST_CALLS = 5
WINDOW_SECONDS = 0.02
STEADY_GAIN = 0.02
WARM_UP_SECONDS = 2.0
WAKE_UP_CALLS = 2
IDLE_SLICE_SECONDS = 0.005
SETTLE_SECONDS = 2.0

Call = Callable[[], object]


def load(path: str, threads: int, batch_size: int) -> tuple[Call | None, int | None]:
    """Make a session and its inputs: random ones for float32, zeros for int64.

    Zero is an index that every table has, and how long a lookup takes hardly depends on the row.

    Args:
        path: The ONNX file.
        threads: Threads of a call.
        batch_size: Fills the open first dimension of every input.

    Returns:
        What runs the model once and None; or None and the model's own batch size, where that is another.

    Raises:
        ValueError: where an input is neither float32 nor int64, or has an open dimension besides the batch.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.type not in ("tensor(float)", "tensor(int64)"):
            raise ValueError(f"input '{value.name}' must be float32 or int64, it is {value.type}")
        if not value.shape or not all(isinstance(size, int) for size in value.shape[1:]):
            raise ValueError(
                f"input '{value.name}' may leave only its first dimension open, its shape is {value.shape}"
            )
        batch, *rest = value.shape
        if isinstance(batch, int) and batch != batch_size:
            return None, batch
        shape = (batch_size, *rest)
        is_float = value.type == "tensor(float)"
        feed[value.name] = random.standard_normal(shape, np.float32) if is_float else np.zeros(shape, np.int64)
    return lambda: session.run(None, feed), None


def sample(call: Call, seconds: float) -> list[int]:
    """Nanoseconds of each call, of as many calls as last `seconds` together, and of at least `LEAST_CALLS`."""
    samples: list[int] = []
    left = int(seconds * 1e9)
    while left > 0 or len(samples) < LEAST_CALLS:
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
        left -= samples[-1]
    return samples


def warm_up(call: Call) -> None:
    """Call until the median of two windows in a row is no more than 2 % better than the best, or time is up."""
    best, steady, end = math.inf, 0, time.monotonic() + WARM_UP_SECONDS
    while steady < 2 and time.monotonic() < end:
        median = statistics.median(sample(call, WINDOW_SECONDS))
        steady = steady + 1 if median > best * (1 - STEADY_GAIN) else 0
        best = min(best, median)


def measure(call: Call, seconds: float) -> list[int]:
    """Samples as a caller in a loop sees them: the threads are woken and the caches filled again before the first."""
    for _ in range(WAKE_UP_CALLS):
        call()
    return sample(call, seconds)


def settle() -> None:
    """Wait until the session's threads sleep.

    After a call they spin for work about a million times (20 to 45 ms on this code's first machine, up to 0.5 s
    elsewhere: ONNX Runtime pull request 27916), then block until the next call and cost nothing. Spinning is left on,
    as users have it; what must not be is that it reaches into another worker's turn. How long it takes differs by CPU
    and version, hence the CPU time of the process tells.
    """
    idle, end = 0, time.monotonic() + SETTLE_SECONDS
    # Twice in a row: a spinning thread that had to wait for a core looks idle for a moment.
    while idle < 2 and time.monotonic() < end:
        before = time.process_time()
        time.sleep(IDLE_SLICE_SECONDS)
        idle = idle + 1 if time.process_time() - before < IDLE_SLICE_SECONDS / 5 else 0


class Worker:
    """Answers requests, one after the other."""

    def __init__(self) -> None:
        self._call: Call | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; the session's threads sleep when it returns."""
        result = self._do(request)
        settle()
        return result

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "load":
            self._call, fixed_batch = load(request["path"], request["threads"], request["batch_size"])
            return {"fixed_batch": fixed_batch}
        if self._call is None:
            raise ValueError("no model is loaded")
        if request["do"] == "warm_up":
            warm_up(self._call)
            return {}
        if request["do"] == "measure":
            return {"nanoseconds": measure(self._call, request["seconds"])}
        raise ValueError(f"unknown request '{request['do']}'")


def main() -> None:
    """Serve standard input until it ends."""
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries that print must not break the protocol: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    onnxruntime.set_default_logger_severity(3)
    gc.disable()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            result = worker.answer(request)
        except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors share no other base)
            text = str(error) or type(error).__name__
            path = request.get("path", "")
            result = {"error": text.replace(path, Path(path).name) if path else text}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
