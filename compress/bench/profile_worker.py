"""Profiles one ONNX model in a process of its own; `compress.bench.profile` starts it.

It reads one JSON object from standard input and answers it with one on standard output, {"error": "..."} where it failed.

    {"path": str, "batch_size": int, "shapes": {name: [int, ...], ...}, "threads": int, "seconds": float, "folder": str}
    -> {"provider": str, "calls": int, "call_ms": float, "nodes": [{"name": str, "operator": str, "kind": str,
        "milliseconds": float}, ...]}

`shapes` are sizes without the batch of inputs that leave them open; `folder` takes ONNX Runtime's profile, and whoever asked
removes it. Only the standard library, numpy and onnxruntime are imported, so that it starts fast and nothing else competes.
"""

from __future__ import annotations

import bisect
import gc
import json
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from compress.bench.backends.base import random_feed
from compress.bench.backends.onnx_runtime import inputs_of
from compress.methods.statistics import middle_half_mean

LEAST_CALLS = 5
MOST_CALLS = 200
"""ONNX Runtime stops to record after a million events, and writes a third of a kilobyte for each."""
WARM_UP_SECONDS = 0.2
LEAST_WARM_UP_CALLS = 2
PROVIDER = "CPUExecutionProvider"

_SUFFIX = "_kernel_time"
_CONVERSIONS = {"Cast", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear", "ReorderInput", "ReorderOutput"}
_FLOAT_WITH_PACKED_WEIGHTS = {"MatMulNBits", "GatherBlockQuantized"}

Event = Mapping[str, Any]


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is asked.

    Raises:
        ValueError: as `random_feed`, and where the profile lacks what is read from it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(request["folder"]) / "profile")
    session = onnxruntime.InferenceSession(request["path"], options, providers=[PROVIDER])
    shapes = {name: tuple(sizes) for name, sizes in request["shapes"].items()}
    feed = random_feed(inputs_of(session), request["batch_size"], shapes)
    warm_up = _timed(lambda: session.run(None, feed), WARM_UP_SECONDS, LEAST_WARM_UP_CALLS)
    calls = _timed(lambda: session.run(None, feed), request["seconds"], LEAST_CALLS)
    text = Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace")
    try:
        events = json.loads(text, strict=False)
    except ValueError as error:  # names of nodes are written as they are
        raise ValueError(f"ONNX Runtime's profile cannot be read: {error}") from error
    return {
        "provider": PROVIDER,
        "calls": len(calls),
        "call_ms": statistics.median(calls) / 1e6,
        "nodes": node_times(events, len(warm_up), len(calls)),
    }


def _timed(call: Callable[[], object], seconds: float, least: int) -> list[int]:
    """Nanoseconds of each call, of as many as last `seconds` together, at least `least` and at most `MOST_CALLS`."""
    samples: list[int] = []
    left = int(seconds * 1e9)
    while len(samples) < least or (left > 0 and len(samples) < MOST_CALLS):
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
        left -= samples[-1]
    return samples


def node_times(events: Sequence[Event], warm_up_calls: int, calls: int) -> list[dict[str, Any]]:
    """Time of each node in milliseconds, nodes in the order in which they first ran.

    It is the mean of the middle half of the calls that count: outliers stay out of it, and it is finer than the microseconds
    in which ONNX Runtime records, which a short node's median would be stuck in.

    A node that runs several times in a call, in a loop, counts with the sum; one that does not run in a call, in a branch,
    with 0. What runs inside a node, of a branch or a loop, is not counted twice.

    Args:
        events: ONNX Runtime's profile, times in microseconds.
        warm_up_calls: How many calls at its beginning do not count.
        calls: How many follow, which do.

    Raises:
        ValueError: where the profile holds other calls than those, or none of their nodes.
    """
    runs = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "model_run")
    if len(runs) != warm_up_calls + calls:
        raise ValueError(f"ONNX Runtime's profile holds {len(runs)} calls instead of {warm_up_calls + calls}")
    starts = [start for start, _ in runs]
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
    kernels.sort(key=lambda event: (event["ts"], -event["dur"]))
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * calls)
    around: list[tuple[int, tuple[str, str]]] = []
    for event in kernels:
        call = bisect.bisect_right(starts, event["ts"]) - 1 - warm_up_calls
        if call < 0:
            continue
        name, args = event["name"].removesuffix(_SUFFIX), event["args"]
        key = (str(args.get("node_index", "")), name)
        nodes.setdefault(key, {"name": name, "operator": args["op_name"], "kind": kind_of(args)})
        times[key][call] += event["dur"]
        while around and event["ts"] + event["dur"] > around[-1][0]:
            around.pop()
        if around:
            times[around[-1][1]][call] -= event["dur"]
        around.append((event["ts"] + event["dur"], key))
    if not nodes:
        raise ValueError("ONNX Runtime's profile holds no nodes")
    return [{**node, "milliseconds": middle_half_mean(times[key]) / 1e3} for key, node in nodes.items()]


def kind_of(args: Mapping[str, Any]) -> str:
    """What a node computes in, told by its operator and the types of what it read and wrote.

    'convert' quantizes, dequantizes, casts or reorders; 'int8' reads or writes tensors of 8-bit integers, also where the
    operator has no name of its own for that, such as MaxPool; everything else is 'float'.
    """
    if args["op_name"] in _CONVERSIONS:
        return "convert"
    types = {kind for each in (*args["input_type_shape"], *args["output_type_shape"]) for kind in each}
    return "int8" if types & {"int8", "uint8"} and args["op_name"] not in _FLOAT_WITH_PACKED_WEIGHTS else "float"


def main() -> None:
    """Answer the request on standard input."""
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries that print must not break the protocol: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    onnxruntime.set_default_logger_severity(3)
    gc.disable()
    request = json.load(sys.stdin)
    try:
        result = profile(request)
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors share no other base)
        text = str(error) or type(error).__name__
        result = {"error": text.replace(request["path"], Path(request["path"]).name)}
    print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
