"""Profiles one ONNX model in a process of its own; `compress.bench.profile` starts it.

It reads one JSON object from standard input and answers it with one on standard output, {"error": "..."} where it failed.

    {"path": str, "batch_size": int, "threads": int, "seconds": float, "folder": str}
    -> {"provider": str, "calls": int, "call_ms": float, "nodes": [{"name": str, "operator": str, "kind": str,
        "milliseconds": float}, ...]}

`folder` takes ONNX Runtime's profile; whoever asked removes it. Only the standard library, numpy and onnxruntime are
imported, so that it starts fast and nothing else competes.
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

import numpy as np
import onnxruntime

LEAST_CALLS = 5
MOST_CALLS = 200
"""ONNX Runtime stops to record after a million events, and writes a third of a kilobyte for each."""
WARM_UP_SECONDS = 0.2
LEAST_WARM_UP_CALLS = 2
PROVIDER = "CPUExecutionProvider"

_SUFFIX = "_kernel_time"
_CONVERSIONS = {"Cast", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear", "ReorderInput", "ReorderOutput"}
_FLOAT_WITH_PACKED_WEIGHTS = {"MatMulNBits", "GatherBlockQuantized"}
_NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

Event = Mapping[str, Any]


def make_feed(session: onnxruntime.InferenceSession, batch_size: int) -> dict[str, Any]:
    """Inputs for a session: seeded random floats, zeros of every other type.

    Raises:
        ValueError: where an input takes no numbers, has an open size besides the batch, or a fixed batch size that is not
            the one asked for.
    """
    random = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.type not in _NUMBERS:
            raise ValueError(f"input '{value.name}' must hold numbers, it is {value.type}")
        if not all(isinstance(size, int) for size in value.shape[1:]):
            raise ValueError(
                f"input '{value.name}' may leave only its first dimension open, its shape is {value.shape}"
            )
        batch, shape = value.shape[:1], list(value.shape)
        if batch and not isinstance(batch[0], int):
            shape[0] = batch_size
        elif batch and batch[0] != batch_size:
            raise ValueError(f"the file only takes batch size {batch[0]}, not {batch_size}")
        kind = np.dtype(_NUMBERS[value.type])
        feed[value.name] = random.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return feed


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is asked.

    Raises:
        ValueError: as `make_feed`, and where the profile lacks what is read from it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(request["folder"]) / "profile")
    session = onnxruntime.InferenceSession(request["path"], options, providers=[PROVIDER])
    feed = make_feed(session, request["batch_size"])
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
    """Median time of each node over the calls that count, nodes in the order in which they first ran.

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
    return [{**node, "milliseconds": statistics.median(times[key]) / 1e3} for key, node in nodes.items()]


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
