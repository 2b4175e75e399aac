"""Check the latency harness against itself: one model under two names (A/A), and the same model doing twice the work.

The A/A ratio should be 1.00; the ratio of the doubled model should be what a loop in a fresh process measures, which
this script also does, without the harness.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from compress import machine
from compress.bench.latency import Variant, measure
from compress.config import LatencyConfig
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.onnx_io.convert import serialized, to_onnx

LOOP = """
import sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = {"input": numpy.random.default_rng(0).standard_normal((1, 3, 48, 64), numpy.float32)}
times = []
for _ in range(50): session.run(None, inputs)
for _ in range(200):
    start = time.perf_counter(); session.run(None, inputs); times.append(time.perf_counter() - start)
print(1e3 * sorted(times)[len(times) // 2])
"""


def network(blocks: int) -> nn.Module:
    """A stack of equal convolutions: twice the blocks are twice the work."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(blocks):
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def plain_loop(path: Path, threads: int) -> float:
    """Median milliseconds of a hand-written loop in a fresh process."""
    command = [sys.executable, "-c", LOOP, str(path), str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.onnx", Path(folder) / "two.onnx"
        one.write_bytes(serialized(to_onnx(network(8), (3, 48, 64))))
        two.write_bytes(serialized(to_onnx(network(16), (3, 48, 64))))
        variants = [Variant("a", one, "fp32"), Variant("same", one, "fp32"), Variant("double", two, "fp32")]
        config = LatencyConfig(threads=(1, 2))
        for repeat in range(arguments.repeats):
            found = measure(variants, config, Silent())
            for index, threads in enumerate(config.threads):
                a, same, double = (found[name][index].median_ms for name in ("a", "same", "double"))
                loop = plain_loop(two, threads) / plain_loop(one, threads)
                row = {
                    "repeat": repeat,
                    "threads": threads,
                    "a_ms": a,
                    "a_a": same / a,
                    "double": double / a,
                    "loop": loop,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    summary = {
        f"{threads} threads": {
            name: statistics.median(row[name] for row in rows if row["threads"] == threads)
            for name in ("a_ms", "a_a", "double", "loop")
        }
        | {"a_a_within_3_percent": sum(abs(r["a_a"] - 1) <= 0.03 for r in rows if r["threads"] == threads)}
        for threads in (1, 2)
    }
    print(json.dumps(summary, indent=1))
    if arguments.json:
        versions = {name: machine.version(name) for name in ("onnxruntime", "torch", "numpy")}
        where = {"cpu": machine.cpu_model(), "cores": machine.cores(), "versions": versions}
        write_file(arguments.json, readable_json({"machine": where, "summary": summary, "rows": rows}))


if __name__ == "__main__":
    main()
