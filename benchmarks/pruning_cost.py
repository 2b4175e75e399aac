"""What pruning itself costs in time and memory: finding the groups, proving them, choosing and cutting, without any training.

Beside it torch-pruning's own pruner, which traces, chooses and cuts, and proves nothing: the same network with random weights,
the same images, L1 norms, half the channels of every group, the classifier left alone. Each run is a process of its own;
memory is its largest resident size above what it had before the network was made, so the network itself counts once in both.
Before that each tool prunes another network, so that pages of libraries are read, and freed memory goes back to the system: else
what loading leaves behind would hide a part of the peak, and what libraries touch for the first time would count as one.

    python benchmarks/pruning_cost.py --json benchmarks/results/pruning_cost.json
    python benchmarks/pruning_cost.py --render                                                      the table
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

from compress import checkpoint as checkpoints
from compress import machine
from compress.config import ArraysConfig, ModelConfig, StageEntry
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.models.cost import macs, parameters
from compress.models.factory import Arch, create
from compress.pruning.memory import give_back
from compress.stages import STAGES, source
from compress.stages.base import Context
from compress.surroundings import git_revision, machine_record

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "pruning_cost.json"
NETWORKS = ("torchvision:resnet50", "torchvision:vit_b_16")
WARM_UP = "torchvision:resnet18"
PIXELS, CLASSES, RATIO = 224, 2, 0.5


def images(folder: Path) -> Dataset:
    """A few images of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (2 * CLASSES, PIXELS, PIXELS, 3), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(2 * CLASSES) % CLASSES)
    settings = {"kind": "arrays", "root": str(folder), "validation": {"from": "given"}}
    return load_data(ArraysConfig.model_validate(settings, strict=False), 0)


def by_compress(network: str, data: Dataset, folder: Path) -> Callable[[], nn.Module]:
    """The stage `prune` without recovery; it reads the network from a checkpoint and leaves the classifier alone itself."""
    draft = source.make(ModelConfig(factory=network, kwargs={"num_classes": CLASSES}), 0)
    path = folder / "network"
    checkpoints.save(path, draft, inputs=data.inputs, classes=data.classes, history=(), key={})
    parent = checkpoints.load(path)
    settings = {"target": {"ratio": RATIO}, "multiple": 1, "recovery": None, "batchnorm_samples": 0}
    entry = StageEntry.model_validate_json(json.dumps({"prune": settings}))
    threads = torch.get_num_threads()
    context = Context(data.for_decisions(), parent, "cpu", threads, 0, folder / "work", Silent(), frozenset())

    def run() -> nn.Module:
        model: nn.Module = STAGES["prune"].load()(parent, entry.settings, context).model
        return model

    return run


def by_torch_pruning(network: str, data: Dataset, _: Path) -> Callable[[], nn.Module]:
    """torch-pruning's high-level pruner."""
    example = data.example()[0]

    def run() -> nn.Module:
        model = create(Arch(network, {"num_classes": CLASSES}), seed=0).eval()
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        heads = {module: module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            global_pruning=False,
            pruning_ratio=RATIO,
            ignored_layers=[classifier],
            num_heads=heads,
        )
        pruner.step()
        return model

    return run


TOOLS: Mapping[str, Callable[[str, Dataset, Path], Callable[[], nn.Module]]] = {
    "compress": by_compress,
    "torch-pruning": by_torch_pruning,
}


def resident(key: str) -> int:
    """Resident memory of this process, bytes: `VmRSS` now, `VmHWM` the largest so far. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measured(network: str, tool: str, threads: int) -> dict[str, Any]:
    """One run in this process, which should do nothing else."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder))
        TOOLS[tool](WARM_UP, data, Path(folder) / "warm-up")()
        prepared = TOOLS[tool](network, data, Path(folder))
        gc.collect()
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far begins anew
        before = resident("VmRSS")
        started, worked = time.perf_counter(), time.process_time()
        model = prepared()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
        peak = resident("VmHWM") - before
        model.eval()
        # Only now: memory that was used and freed before would hide what pruning takes.
        whole = create(Arch(network, {"num_classes": CLASSES}), seed=0).eval()
        size, cost = parameters(whole), macs(whole, data.example())
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "model_bytes": 4 * size}
        try:
            left = macs(model, data.example()) / cost
        except RuntimeError as error:  # what torch-pruning made does not run
            return {**found, "error": str(error).splitlines()[0], "parameters_left": parameters(model) / size}
        return {**found, "macs_left": left, "parameters_left": parameters(model) / size}


def markdown(found: Mapping[str, Any]) -> str:
    """A row per network and tool: medians, with the least and the most."""
    lines = [
        "| network | tool | seconds | peak memory, times the weights | MACs left | parameters left |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["records"]:
        runs = row["runs"]
        seconds = sorted(run["seconds"] for run in runs)
        memory = statistics.median(run["peak_bytes"] / run["model_bytes"] for run in runs)
        macs_left = f"{100 * runs[0]['macs_left']:.1f} %" if "macs_left" in runs[0] else "does not run"
        lines.append(
            f"| {row['network']} | {row['tool']} | {statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f}) | "
            f"{memory:.1f} | {macs_left} | {100 * runs[0]['parameters_left']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "TOOL"), help="one run in this process, as JSON")
    parser.add_argument("--render", action="store_true", help="measure nothing, print the table")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(*arguments.one, arguments.threads)))
        return
    if arguments.render:
        print(markdown(json.loads(arguments.json.read_bytes())))
        return
    found: dict[str, Any] = {
        "machine": machine_record().model_dump(mode="json"),
        "git_revision": git_revision(REPOSITORY),
        "command": shlex.join(["python", "benchmarks/pruning_cost.py", "--threads", str(arguments.threads)]),
        "records": [{"network": network, "tool": tool, "runs": []} for network in NETWORKS for tool in TOOLS],
    }
    for _ in range(arguments.repeats):
        for row in found["records"]:
            command = [
                sys.executable,
                __file__,
                "--one",
                row["network"],
                row["tool"],
                "--threads",
                str(arguments.threads),
            ]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row["runs"].append(json.loads(answer.splitlines()[-1]))
            write_file(arguments.json, readable_json(found))
            print(row["network"], row["tool"], row["runs"][-1], file=sys.stderr, flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
