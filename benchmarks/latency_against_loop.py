"""Check the latency harness against a loop that anybody would write, and against ONNX Runtime's own tool where it is there.

ResNet-18, ResNet-50 and MobileNetV2 of torchvision with random weights, 3×224×224, batch 1, fp32 and int8. In each repeat
the harness measures a file and a minimal loop in a fresh process does, first the one, next time the other; the ratio of a
repeat is the harness's median over the loop's, so that a drift of the machine leaves it alone. 1.00 ± 0.05 is expected of
the median ratio. `onnxruntime_perf_test` takes part where it is on PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import machine
from compress.bench.latency import Variant, measure, reasons
from compress.config import LatencyConfig
from compress.data.base import Input
from compress.errors import CompressError
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.methods.silence import randomise
from compress.methods.statistics import paired_ratio
from compress.models.factory import Arch, create
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import beyond_int8, collect_ranges, nodes_at, quantize, resolved_target

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
PRECISIONS = ("fp32", "int8")
SHAPE = (3, 224, 224)
WITHIN = 0.05
PERF_TEST = "onnxruntime_perf_test"

LOOP = """
import sys, time, numpy, onnxruntime
path, threads, runs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
inputs = {"input": numpy.random.default_rng(0).standard_normal((1, 3, 224, 224), numpy.float32)}
for _ in range(20):
    session.run(None, inputs)
times = []
for _ in range(runs):
    start = time.perf_counter()
    session.run(None, inputs)
    times.append(time.perf_counter() - start)
print(1e3 * sorted(times)[runs // 2])
"""


def write_files(name: str, folder: Path) -> dict[str, Path]:
    """The fp32 and the int8 file of a network, by precision."""
    model = randomise(create(Arch(f"torchvision:{name}"), seed=0))
    graph = to_onnx(model, [Input("input", SHAPE)])
    random = np.random.default_rng(0)
    measured = collect_ranges(graph, ([random.standard_normal((4, *SHAPE), np.float32)] for _ in range(2)))
    beyond = beyond_int8(graph, measured)
    ranges = {tensor: pair for tensor, pair in measured.items() if tensor not in beyond}
    quantized = quantize(graph, ranges, resolved_target("auto"), list(nodes_at(graph, beyond)))
    found = {"fp32": folder / f"{name}.fp32.onnx", "int8": folder / f"{name}.int8.onnx"}
    found["fp32"].write_bytes(serialized(graph))
    found["int8"].write_bytes(serialized(quantized))
    return found


def by_harness(path: Path, precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds, and what the harness says of the machine."""
    found = measure([Variant(path.name, path, precision)], LatencyConfig(threads=(threads,), rounds=rounds), Silent())
    if found.missing:
        raise CompressError(reasons(found.missing)[0])
    (latency,), (repeat,) = found.latencies[path.name], found.repeats
    return {"milliseconds": latency.median_ms, "a_a": repeat.ratio.value, "is_noisy": repeat.is_noisy}


def by_loop(path: Path, threads: int, runs: int) -> float:
    """Median milliseconds of the loop in a fresh process."""
    command = [sys.executable, "-c", LOOP, str(path), str(threads), str(runs)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def by_perf_test(path: Path, threads: int, runs: int) -> float:
    """Median milliseconds of ONNX Runtime's tool, which makes its own inputs."""
    command = [
        PERF_TEST,
        "-e",
        "cpu",
        "-m",
        "times",
        "-r",
        str(runs),
        "-x",
        str(threads),
        "-y",
        "1",
        "-f",
        "batch:1",
        "-I",
    ]
    told = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"P50 Latency:\s*([0-9.e+-]+)\s*s", told)
    if found is None:
        raise CompressError(f"{PERF_TEST} tells no 'P50 Latency': {told.strip()[-200:]}")
    return 1e3 * float(found[1])


def one_repeat(number: int, path: Path, precision: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement by each, in an order that changes."""
    row: dict[str, Any] = {}
    ways: list[Callable[[], None]] = [
        lambda: row.update({"harness": by_harness(path, precision, threads, arguments.rounds)}),
        lambda: row.update({"loop_ms": by_loop(path, threads, arguments.runs)}),
    ]
    if shutil.which(PERF_TEST):
        ways.append(lambda: row.update({"perf_test_ms": by_perf_test(path, threads, arguments.runs)}))
    for way in ways if number % 2 == 0 else ways[::-1]:
        way()
    return row


def summary(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the repeats of one file and number of threads say together."""
    harness = [each["harness"]["milliseconds"] for each in repeats]
    found: dict[str, Any] = {
        "repeats": len(repeats),
        "harness_ms": statistics.median(harness),
        "said_too_noisy": sum(each["harness"]["is_noisy"] for each in repeats),
    }
    for other in ("loop", "perf_test"):
        if f"{other}_ms" not in repeats[0]:
            continue
        times = [each[f"{other}_ms"] for each in repeats]
        value, low, high = paired_ratio(harness, times)
        found |= {
            f"{other}_ms": statistics.median(times),
            f"harness_over_{other}": value,
            f"harness_over_{other}_interval": [low, high],
            f"within_5_percent_of_{other}": abs(value - 1) <= WITHIN,
        }
    return found


def where() -> dict[str, Any]:
    """The machine."""
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "instruction_sets": sorted(machine.cpu_flags() & machine.INTERESTING_FLAGS),
        "versions": {name: machine.version(name) for name in ("onnxruntime", "torch", "torchvision", "numpy")},
        PERF_TEST: shutil.which(PERF_TEST) is not None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=LatencyConfig().rounds, help="of the harness")
    parser.add_argument("--runs", type=int, default=100, help="timed calls of the loop")
    parser.add_argument("--json", type=Path, help="rows are added to this file, which begins anew on another machine")
    arguments = parser.parse_args()
    here, command = where(), shlex.join(["python", "benchmarks/latency_against_loop.py", *sys.argv[1:]])
    print(f"{command}\n{json.dumps(here)}", flush=True)
    rows: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        known = json.loads(arguments.json.read_bytes())
        rows = known["rows"] if known.get("machine") == here else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            files = write_files(name, Path(folder))
            for precision in arguments.precisions:
                for threads in arguments.threads:
                    repeats = [
                        one_repeat(number, files[precision], precision, threads, arguments)
                        for number in range(arguments.repeats)
                    ]
                    found = summary(repeats)
                    key = f"{name} {precision}, {threads} thread{'s' if threads > 1 else ''}"
                    rows[key] = {"command": command, **found, "measured": repeats}
                    print(json.dumps({key: found}), flush=True)
                    if arguments.json:
                        write_file(arguments.json, readable_json({"machine": here, "rows": rows}))


if __name__ == "__main__":
    main()
