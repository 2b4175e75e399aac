"""Times several small ONNX files against each other in a process of its own; `compress.bench.trial_latency` starts it.

It reads one JSON object from standard input and answers it with one on standard output, {"error": "..."} where it failed.

    {"files": [{"path": str, "batch_size": int}, ...], "rounds": int, "seconds": float} -> {"milliseconds": [[float, ...], ...]}

One session each, one thread each and so no pool of threads that could spin into another's turn. In each round every file is
called for `seconds`, and every other round goes through them backwards, so that a drift of the machine reaches all alike. What
is told of a file is the median call of each round. Only the standard library, numpy and onnxruntime are imported.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.bench.backends import onnx_runtime
from compress.bench.backends.base import Call, Task, random_feed
from compress.bench.latency_worker import one_line, sample

ROUNDS = 8
"""Even: as many forwards as backwards."""
SECONDS = 0.01
"""Of calls of each file in a round, of which there are never less than five."""
WARM_UP_CALLS = 3
"""Before the samples of each round: another file has filled the caches since."""


def measure(files: Sequence[Mapping[str, Any]], rounds: int, seconds: float) -> list[list[float]]:
    """Median milliseconds of a call of each file, in every round.

    Args:
        files: as the request has them.
        rounds: at least 1.
        seconds: of each file in each round.
    """
    calls = [_call(file["path"], file["batch_size"]) for file in files]
    medians: list[list[float]] = [[] for _ in calls]
    positions = list(range(len(calls)))
    for turn in range(rounds):
        for position in positions if turn % 2 == 0 else reversed(positions):
            for _ in range(WARM_UP_CALLS):
                calls[position]()
            medians[position].append(statistics.median(sample(calls[position], seconds)) / 1e6)
    return medians


def _call(path: str, batch_size: int) -> Call:
    task = Task("onnxruntime", "cpu", "", "", path, None, (), batch_size, threads=1)
    model = onnx_runtime.load(task)
    return model.bind(random_feed(model.inputs, batch_size))


def main() -> None:
    """Answer the request on standard input."""
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries that print must not break the protocol: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    gc.disable()
    try:
        result: dict[str, Any] = {"milliseconds": measure(request["files"], request["rounds"], request["seconds"])}
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors share no other base)
        text = one_line(error)
        for file in request["files"]:
            text = text.replace(file["path"], Path(file["path"]).name)
        result = {"error": text}
    print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
