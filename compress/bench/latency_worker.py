"""Measures one model in a process of its own; `compress.bench.latency_process` starts it and asks it.

It reads one JSON object a line from standard input and answers each with one line on standard output; it ends with its
input. An answer is an object, {"error": str, "is_unavailable": bool} where a request failed.

    {"do": "prepare", "task": {...}}      -> {}                                    libraries are imported
    {"do": "load"}                        -> {"provider": str, "precision": str, "cold_start_ns": int}
    {"do": "warm_up"}                     -> {}
    {"do": "measure", "seconds": float}   -> {"nanoseconds": [int, ...]}
    {"do": "memory"}                      -> {"peak_bytes": int | null}
    {"do": "quit"}                        -> no answer, the process ends

The task is a `Task` of `compress.bench.backends.base`. Only the standard library, numpy and what the task's backend needs
are imported, so that it starts fast, nothing else competes, and its memory is that of the backend.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

from compress.bench.backends.base import MODULES, Backend, Call, Task, UnavailableError, random_feed

LEAST_CALLS = 5
WINDOW_SECONDS = 0.02
STEADY_GAIN = 0.02
WARM_UP_SECONDS = 2.0
WAKE_UP_CALLS = 2
WAKE_UP_SECONDS = 0.05
IDLE_SLICE_SECONDS = 0.005
SETTLE_SECONDS = 2.0

_NEEDS = {"openvino": "openvino is not installed: pip install 'compress[openvino]'"}
"""What to say where a library that comes with no plain installation is missing."""


def sample(call: Call, seconds: float) -> list[int]:
    """Nanoseconds of each call, of as many calls as last `seconds` together, and of at least `LEAST_CALLS`."""
    samples: list[int] = []
    left = int(seconds * 1e9)
    while left > 0 or len(samples) < LEAST_CALLS:
        samples.append(max(1, call()))  # a coarse clock may show no time at all
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
    """Samples as a caller in a loop sees them.

    Before the first the threads are woken, the caches filled again, and the cores given time to reach the speed that they
    keep: after a rest an int8 ResNet-18 was 6 % slower than in a loop where two calls were all it got.
    """
    calls, end = 0, time.monotonic() + WAKE_UP_SECONDS
    while calls < WAKE_UP_CALLS or time.monotonic() < end:
        call()
        calls += 1
    return sample(call, seconds)


def settle() -> None:
    """Wait until the process's threads sleep.

    After a call ONNX Runtime's spin for work about a million times (20 to 45 ms on this code's first machine, up to 0.5 s
    elsewhere: ONNX Runtime pull request 27916), then block until the next call and cost nothing; those of other libraries
    do alike. Spinning is left on, as users have it; what must not be is that it reaches into another worker's turn. How
    long it takes differs by CPU and version, hence the CPU time of the process tells.
    """
    idle, end = 0, time.monotonic() + SETTLE_SECONDS
    # Twice in a row: a spinning thread that had to wait for a core looks idle for a moment.
    while idle < 2 and time.monotonic() < end:
        before = time.process_time()
        time.sleep(IDLE_SLICE_SECONDS)
        idle = idle + 1 if time.process_time() - before < IDLE_SLICE_SECONDS / 5 else 0


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell.

    Linux counts into `ru_maxrss` what the parent held when it started this process; the high-water mark of the address
    space, which begins anew with a program, does not have that.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def import_backend(task: Task) -> Backend:
    """The module of a backend.

    Raises:
        UnavailableError: where its library is not installed, or does not work.
    """
    # Last, so that they hide neither the standard library nor an installed package.
    sys.path += [path for path in task.import_paths if path not in sys.path]
    try:
        # By name: a digest of this module's code must not take in all that the backends import.
        return cast("Backend", importlib.import_module(MODULES[task.backend]))
    except ImportError as error:
        raise UnavailableError(_NEEDS.get(error.name or "", f"{task.backend}: {one_line(error)}")) from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line: its first, and the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    announces = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1]}" if announces else lines[0]


class Worker:
    """Answers requests, one after the other."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._backend: Backend | None = None
        self._call: Call | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; the threads of the process sleep when it returns."""
        try:
            result = self._do(request)
        except Exception as error:  # noqa: BLE001 (a backend, and a user's model, may raise anything)
            result = {"error": self._placeless(one_line(error)), "is_unavailable": isinstance(error, UnavailableError)}
        settle()
        return result

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "memory":
            return {"peak_bytes": peak_memory()}
        if request["do"] == "prepare":
            given = request["task"]
            shapes = {name: tuple(sizes) for name, sizes in given["shapes"].items()}
            tuples = {key: tuple(given[key]) for key in ("trusted", "import_paths")}
            task = Task(**given | tuples | {"shapes": shapes})
            self._task, self._backend = task, import_backend(task)
            self._backend.prepare(task)
            return {}
        if request["do"] == "load":
            return self._load()
        if request["do"] not in ("warm_up", "measure"):
            raise ValueError(f"unknown request '{request['do']}'")
        if self._call is None:
            raise ValueError("no model is loaded")
        if request["do"] == "warm_up":
            warm_up(self._call)
            return {}
        return {"nanoseconds": measure(self._call, request["seconds"])}

    def _load(self) -> dict[str, Any]:
        if self._backend is None or self._task is None:
            raise ValueError("no backend is prepared")
        start = time.perf_counter_ns()
        model = self._backend.load(self._task)
        loaded = time.perf_counter_ns()
        call = model.bind(random_feed(model.inputs, self._task.batch_size, self._task.shapes))
        bound = time.perf_counter_ns()
        call()
        # By the clock: what a device's events measure leaves out what the CPU does before, such as compiling.
        cold = loaded - start + time.perf_counter_ns() - bound
        self._call = call
        # Collecting would show as outliers from here on, and cost nothing to do without: a call leaves no cycles.
        gc.collect()
        gc.disable()
        return {"provider": model.provider, "precision": model.precision, "cold_start_ns": cold}

    def _placeless(self, text: str) -> str:
        """Without the folders of this machine."""
        places = [self._task.path, self._task.checkpoint or ""] if self._task else []
        for place in filter(None, places):
            text = text.replace(place, Path(place).name)
        return text


def main() -> None:
    """Serve standard input until it ends."""
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries that print must not break the protocol: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        result = worker.answer(request)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
