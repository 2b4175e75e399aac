"""Which numbers of channels are fast in ONNX Runtime: is a multiple of 4, 8 or 16 worth pruning to?

Convolutions with c channels, c in a window, in fp32 and in int8 (quantized as `compress quantize` does), at batch 1. All files
of a case are in one process and are called in turns: a round goes through all of them, every other one backwards, so that a
drift of the machine meets all alike. What counts is the time per multiply-accumulate, which knows no c: where some c needs less
of it than its neighbours do, kernels suit it.

    1x1     eight equal 1x1 convolutions with ReLU between them
    3x3     four equal 3x3 convolutions with ReLU between them
    stack   a small network: 3x3 convolutions of c and, behind a stride, 2c channels

For each case and precision it writes

    channels   ms per call, ns per thousand MACs, and that over the mean of the next c on both sides ("over_neighbours")
    multiples  for m in 2, 4, 8, 16: time per MAC of all multiples of m over that of all other c, over rounds, with its interval
    pays       c that are slower (in time, not per MAC) than some larger c: there it costs nothing to keep more channels
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data.base import Input
from compress.files import readable_json, write_file
from compress.methods.statistics import paired_ratio
from compress.models.cost import macs
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import collect_ranges, quantize, resolved_target
from compress.onnx_io.session import open_session
from compress.surroundings import git_revision, machine_record

REPOSITORY = Path(__file__).resolve().parent.parent
CASES = ("1x1", "3x3", "stack")
PRECISIONS = ("fp32", "int8")
MULTIPLES = (2, 4, 8, 16)
CALIBRATION = 4


@dataclass
class File:
    """One network as ONNX Runtime runs it, and how long a call took in each round."""

    channels: int
    macs: int
    session: onnxruntime.InferenceSession
    feed: dict[str, NDArray[Any]]
    seconds: list[float] = field(default_factory=list)

    def call(self, times: int) -> float:
        """Mean seconds of so many calls."""
        started = time.perf_counter()
        for _ in range(times):
            self.session.run(None, self.feed)
        return (time.perf_counter() - started) / times

    @property
    def per_mac(self) -> list[float]:
        """Nanoseconds per thousand multiply-accumulates, by round."""
        return [1e12 * each / self.macs for each in self.seconds]


def network(case: str, channels: int) -> tuple[nn.Module, int]:
    """A network and the number of channels of its input."""
    torch.manual_seed(channels)
    if case == "stack":
        c = channels
        layers: list[nn.Module] = []
        for given, made, stride in ((3, c, 1), (c, c, 1), (c, 2 * c, 2), (2 * c, 2 * c, 1)):
            layers += [nn.Conv2d(given, made, 3, stride=stride, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, 10)).eval(), 3
    kernel, count = (1, 8) if case == "1x1" else (3, 4)
    layers = []
    for _ in range(count):
        layers += [nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), channels


def files_of(case: str, channels: int, arguments: argparse.Namespace) -> dict[str, File]:
    """The same network in both precisions."""
    model, given = network(case, channels)
    shape = (given, arguments.size, arguments.size)
    graph = to_onnx(model, [Input("input", shape)])
    random = np.random.default_rng(0)
    chunks = [(random.standard_normal((1, *shape), np.float32),) for _ in range(CALIBRATION)]
    protos = {"fp32": graph, "int8": quantize(graph, collect_ranges(graph, chunks), resolved_target("auto"), [])}
    work = macs(model, (torch.zeros(1, *shape),))
    return {
        name: File(channels, work, open_session(serialized(proto), arguments.threads), {"input": chunks[0][0]})
        for name, proto in protos.items()
        if name in arguments.precisions
    }


def measure(files: Sequence[File], rounds: int, seconds: float) -> None:
    """Rounds through all files, back and forth; each visit lasts about `seconds`, of which the first call does not count."""
    calls = {id(file): max(1, round(seconds / max(1e-6, min(file.call(1) for _ in range(3))))) for file in files}
    for number in range(rounds):
        for file in files if number % 2 == 0 else reversed(files):
            file.call(1)
            file.seconds.append(file.call(calls[id(file)]))


def found(files: Sequence[File]) -> dict[str, Any]:
    """What the times of one case and precision say."""
    median = {file.channels: statistics.median(file.seconds) for file in files}
    per_mac = {file.channels: statistics.median(file.per_mac) for file in files}
    order = sorted(median)
    rows = []
    for place, c in enumerate(order):
        beside = [per_mac[order[at]] for at in (place - 1, place + 1) if 0 <= at < len(order)]
        rows.append(
            {
                "channels": c,
                "ms": 1e3 * median[c],
                "ns_per_thousand_macs": per_mac[c],
                "over_neighbours": per_mac[c] / statistics.mean(beside) if beside else None,
            }
        )
    pays = [
        {"channels": c, "faster": faster, "time": median[faster] / median[c]}
        for c in order
        if (faster := min((d for d in order if d > c), key=lambda d: median[d], default=c))
        and median[faster] < median[c]
    ]
    return {"channels": rows, "multiples": by_multiple(files), "pays": pays}


def by_multiple(files: Sequence[File]) -> dict[str, Any]:
    """Time per MAC of the multiples over that of all other c, from round to round."""
    ratios = {}
    for multiple in MULTIPLES:
        hit = [file.per_mac for file in files if file.channels % multiple == 0]
        missed = [file.per_mac for file in files if file.channels % multiple]
        if hit and missed:
            pair = ([statistics.mean(each) for each in zip(*some, strict=True)] for some in (hit, missed))
            value, low, high = paired_ratio(*pair)
            ratios[str(multiple)] = {"value": value, "low": low, "high": high}
    return ratios


def told(case: str, precision: str, result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{case} {precision}"]
    for multiple, ratio in result["multiples"].items():
        interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        lines.append(f"  multiples of {multiple:>2}: {interval} of the time per MAC of others")
    fast = sorted((row for row in result["channels"] if row["over_neighbours"]), key=lambda row: row["over_neighbours"])
    lines.append(
        "  fastest for their size: " + ", ".join(f"{r['channels']} ({r['over_neighbours']:.2f})" for r in fast[:5])
    )
    if result["pays"]:
        some = ", ".join(f"{one['channels']} (as {one['faster']}: {one['time']:.2f})" for one in result["pays"])
        lines.append(f"  slower than more channels: {some}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--first", type=int, default=40, help="the window of c")
    parser.add_argument("--last", type=int, default=64)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--size", type=int, default=16, help="height and width of the input")
    parser.add_argument("--rounds", type=int, default=21, help="6 or more give intervals")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each visit of a file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="what was found is written to this file after each case")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/channel_multiples.py", *sys.argv[1:]])
    results: dict[str, Any] = {
        "machine": machine_record().model_dump(mode="json"),
        "git_revision": git_revision(REPOSITORY),
        "command": command,
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "onnxruntime": onnxruntime.__version__,
        "int8_target": resolved_target("auto").name,
        "cases": {},
    }
    print(f"{command}\n{json.dumps(results['machine'])}", flush=True)
    for case in arguments.cases:
        window = range(arguments.first, arguments.last + 1, arguments.step)
        files = [files_of(case, channels, arguments) for channels in window]
        measure([file for both in files for file in both.values()], arguments.rounds, arguments.seconds)
        results["cases"][case] = {name: found([both[name] for both in files]) for name in arguments.precisions}
        for name in arguments.precisions:
            print(told(case, name, results["cases"][case][name]), flush=True)
        if arguments.json:
            write_file(arguments.json, readable_json(results))


if __name__ == "__main__":
    main()
