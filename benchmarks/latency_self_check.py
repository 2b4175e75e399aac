"""Check the latency harness against itself and against what is known.

    quiet    a 5 ms model against itself (A/A), and against one with 10 % more of the same layers; beside it what a loop in
             fresh processes, one after the other, makes of the two
    loaded   the same while another process keeps one core busy
    double   a model of twice the layers; what a loop in fresh processes measures of the same files, without the harness
    delay    a PyTorch model whose forward pass waits half a millisecond more: the difference is known exactly

In `quiet` and `loaded` an A/A ratio should lie within 1.00 ± 0.03 and the interval of the slower model's ratio should
exclude 1, each in at least 18 of 20 repeats; a setting in which the harness says itself that the machine is too noisy is
counted apart. A fresh session of processes is made for each repeat. Parts add to the same JSON file, which begins anew on
another machine; it is written after each repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import checkpoint, machine
from compress.bench.latency import Variant, measure
from compress.config import LatencyConfig
from compress.data.base import Input
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.manifest import HistoryEntry
from compress.models.factory import Arch, create
from compress.onnx_io.convert import serialized, to_onnx

SHAPE = (3, 56, 80)
BLOCKS = 10
"""About 5 ms with one thread of a server CPU; `milliseconds` in the results says what it was."""
SLOWER_BLOCKS = 11
WITHIN = 0.03
PARTS = ("quiet", "loaded", "double", "delay")
DELAY_MS = 0.5

LOOP = """
import sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[2]), 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = [1, *session.get_inputs()[0].shape[1:]]
inputs = {session.get_inputs()[0].name: numpy.random.default_rng(0).standard_normal(shape, numpy.float32)}
times = []
for _ in range(50): session.run(None, inputs)
for _ in range(200):
    start = time.perf_counter(); session.run(None, inputs); times.append(time.perf_counter() - start)
print(1e3 * sorted(times)[len(times) // 2])
"""


WAITING = """
import time
import torch
from torch import nn

class Waiting(nn.Module):
    def __init__(self, milliseconds):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(10)))
        self.head = nn.Linear(32, 10)
        self.seconds = milliseconds / 1e3

    def forward(self, x):
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return self.head(self.layers(x).mean((2, 3)))
"""


def network(blocks: int) -> nn.Module:
    """A stack of equal convolutions: the work is that of the blocks, the first layer and the last are next to nothing."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(blocks):
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def write_network(folder: Path, blocks: int) -> Path:
    """Its ONNX file, made once."""
    path = folder / f"{blocks}.onnx"
    if not path.is_file():
        path.write_bytes(serialized(to_onnx(network(blocks), [Input("input", SHAPE)])))
    return path


def plain_loop(path: Path, threads: int) -> float:
    """Median milliseconds of a hand-written loop in a fresh process."""
    command = [sys.executable, "-c", LOOP, str(path), str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def one_core_busy() -> Iterator[None]:
    """Another process that computes all the time, bound to no core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def told_apart(folder: Path, threads: Sequence[int], config: LatencyConfig) -> list[dict[str, Any]]:
    """One repeat of `quiet` or `loaded`: a row for each number of threads."""
    variants = [
        Variant(name, write_network(folder, blocks), "fp32")
        for name, blocks in (("base", BLOCKS), ("slower", SLOWER_BLOCKS))
    ]
    found = measure(variants, config, Silent())
    rows = []
    for index, count in enumerate(threads):
        repeat, slower = found.repeats[index], found.latencies["slower"][index]
        assert slower.ratio is not None
        rows.append(
            {
                "threads": count,
                "milliseconds": found.latencies["base"][index].median_ms,
                "a_a": repeat.ratio.value,
                "a_a_interval": [repeat.ratio.low, repeat.ratio.high],
                "is_noisy": repeat.is_noisy,
                "slower": slower.ratio.value,
                "slower_interval": [slower.ratio.low, slower.ratio.high],
                "loop": plain_loop(variants[0].path, count) / plain_loop(variants[1].path, count),
            }
        )
    return rows


def against_loop(folder: Path, threads: Sequence[int], config: LatencyConfig) -> list[dict[str, Any]]:
    """One repeat of `double`: how many times longer twice the layers take, by the harness and by a loop."""
    one, two = write_network(folder, BLOCKS), write_network(folder, 2 * BLOCKS)
    found = measure([Variant("base", one, "fp32"), Variant("double", two, "fp32")], config, Silent())
    rows = []
    for index, count in enumerate(threads):
        double = found.latencies["double"][index]
        assert double.ratio is not None
        rows.append(
            {
                "threads": count,
                "milliseconds": found.latencies["base"][index].median_ms,
                "a_a": found.repeats[index].ratio.value,
                "double": 1 / double.ratio.value,
                "loop": plain_loop(two, count) / plain_loop(one, count),
            }
        )
    return rows


def write_waiting(folder: Path, name: str, milliseconds: float) -> Variant:
    """A checkpoint of a model that waits, by this script's own code."""
    code = folder / "waiting.py"
    code.write_text(WAITING)
    arch = Arch(f"{code}:Waiting", {"milliseconds": milliseconds})
    entry = HistoryEntry(stage="source", parent=None, settings={}, seconds=0.0)
    saved = checkpoint.save(
        folder / name,
        checkpoint.Draft(arch, (), create(arch, seed=0)),
        inputs=[Input("input", SHAPE)],
        classes=tuple(str(number) for number in range(10)),
        history=(entry,),
        key={},
    )
    return Variant(name, folder / "none.onnx", "fp32", saved.path, frozenset({arch.factory}), backend="torch")


def delayed(folder: Path, threads: Sequence[int], config: LatencyConfig) -> list[dict[str, Any]]:
    """One repeat of `delay`: by how many milliseconds the waiting model is slower, which is known to be `DELAY_MS`."""
    variants = [write_waiting(folder, "base", 0.0), write_waiting(folder, "delayed", DELAY_MS)]
    found = measure(variants, config, Silent())
    rows = []
    for index, count in enumerate(threads):
        base, slower = found.latencies["base"][index], found.latencies["delayed"][index]
        assert slower.ratio is not None
        rows.append(
            {
                "threads": count,
                "milliseconds": base.median_ms,
                "a_a": found.repeats[index].ratio.value,
                "delay_ms": base.median_ms * (1 / slower.ratio.value - 1),
                "known_ms": DELAY_MS,
            }
        )
    return rows


def summary_of_delay(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of one number of threads."""
    names = ("milliseconds", "a_a", "delay_ms", "known_ms")
    return {"repeats": len(rows), **{name: statistics.median(row[name] for row in rows) for name in names}}


def summary_of_told_apart(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the repeats of one number of threads."""
    return {
        "repeats": len(rows),
        "milliseconds": statistics.median(row["milliseconds"] for row in rows),
        "a_a": statistics.median(row["a_a"] for row in rows),
        "a_a_within_3_percent": sum(abs(row["a_a"] - 1) <= WITHIN for row in rows),
        "a_a_interval_holds_1": sum(row["a_a_interval"][0] <= 1 <= row["a_a_interval"][1] for row in rows),
        "said_too_noisy": sum(row["is_noisy"] for row in rows),
        "slower": statistics.median(row["slower"] for row in rows),
        "slower_by_layers": BLOCKS / SLOWER_BLOCKS,
        "slower_by_loop": statistics.median(row["loop"] for row in rows),
        "slower_by_loop_range": [min(row["loop"] for row in rows), max(row["loop"] for row in rows)],
        "slower_detected": sum(row["slower_interval"][1] < 1 for row in rows),
        "slower_missed_and_not_said_too_noisy": sum(
            row["slower_interval"][1] >= 1 and not row["is_noisy"] for row in rows
        ),
    }


def summary_of_double(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of one number of threads."""
    names = ("milliseconds", "a_a", "double", "loop")
    return {"repeats": len(rows), **{name: statistics.median(row[name] for row in rows) for name in names}}


def run_part(
    part: str, repeats: int, threads: Sequence[int], config: LatencyConfig, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All repeats of a part; what is known so far is kept after each."""
    one_repeat, summarise = {
        "quiet": (told_apart, summary_of_told_apart),
        "loaded": (told_apart, summary_of_told_apart),
        "double": (against_loop, summary_of_double),
        "delay": (delayed, summary_of_delay),
    }[part]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, one_core_busy() if part == "loaded" else contextlib.nullcontext():
        for number in range(repeats):
            found = one_repeat(Path(folder), threads, config)
            rows += [{"repeat": number, **row} for row in found]
            for row in found:
                print(json.dumps({"part": part, "repeat": number, **row}), flush=True)
            told = {str(count): summarise([row for row in rows if row["threads"] == count]) for count in threads}
            keep({"summary_by_threads": told, "rows": rows})
    print(json.dumps({part: told}, indent=1), flush=True)


def where() -> dict[str, Any]:
    """The machine."""
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "instruction_sets": sorted(machine.cpu_flags() & machine.INTERESTING_FLAGS),
        "versions": {name: machine.version(name) for name in ("onnxruntime", "torch", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=LatencyConfig().rounds)
    parser.add_argument("--seconds", type=float, default=LatencyConfig().seconds, help="per variant and round")
    parser.add_argument("--json", type=Path, help="parts are added to this file")
    arguments = parser.parse_args()
    here, command = where(), shlex.join(["python", "benchmarks/latency_self_check.py", *sys.argv[1:]])
    print(f"{command}\n{json.dumps(here)}", flush=True)
    config = LatencyConfig(threads=tuple(arguments.threads), rounds=arguments.rounds, seconds=arguments.seconds)
    parts: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        known = json.loads(arguments.json.read_bytes())
        parts = known["parts"] if known.get("machine") == here and "parts" in known else {}

    for part in arguments.part:

        def keep(found: dict[str, Any], part: str = part) -> None:
            parts[part] = {"command": command, "rounds": config.rounds, "seconds": config.seconds, **found}
            if arguments.json:
                write_file(arguments.json, readable_json({"machine": here, "parts": parts}))

        run_part(part, arguments.repeats, arguments.threads, config, keep)


if __name__ == "__main__":
    main()
