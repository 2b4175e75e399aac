"""What benchmarks of surgery share: the published ResNets for CIFAR-10, as a stage gets them, and rows kept one by one."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import CompressError, machine
from compress import checkpoint as checkpoints
from compress.bench.trial_latency import layer_times
from compress.checkpoint import Checkpoint, Draft
from compress.config import Pipeline, StageEntry
from compress.data.base import Dataset
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.methods.statistics import paired_ratio
from compress.models.cost import macs
from compress.stages import STAGES, source
from compress.stages.base import Context
from compress.surroundings import git_revision, machine_record
from compress.training import evaluate

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PRECISIONS = ("fp32", "int8")
SECONDS = 0.05
"""Of calls of each model in each round of timing."""


def parser_of(description: str | None, results: str) -> argparse.ArgumentParser:
    """What all of these scripts are asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as arrays")
    parser.add_argument("--weights", type=Path, help="folder with cifar10_resnet20.safetensors and …resnet56…")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS / results)
    parser.add_argument("--render", action="store_true", help="measure nothing, print the tables")
    return parser


def answers_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked, where it can be done; threads are set."""
    arguments = parser.parse_args()
    if not arguments.render and (arguments.data is None or arguments.weights is None):
        parser.error("--data and --weights are needed, or --render")
    torch.set_num_threads(arguments.threads)
    return arguments


def told(main: Callable[[], None]) -> None:
    """Run a script; what a user can cause is one line."""
    try:
        main()
    except CompressError as error:
        sys.exit(str(error))


class Rows:
    """Measured rows in a file, each written at once, so that the same command goes on where it was stopped."""

    def __init__(self, script: str, arguments: argparse.Namespace, shared: Sequence[str]) -> None:
        """Take up what the file of results holds.

        Args:
            script: name of the benchmark.
            arguments: what was asked.
            shared: options that all rows share; where something is to be measured, a file of others is refused.
        """
        path = self._path = arguments.json
        budget = {name: getattr(arguments, name) for name in shared}
        self.found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {"records": []}
        if not self.found["records"]:
            self.found["budget"] = budget
        if self.found.get("budget") != budget and not arguments.render:
            sys.exit(f"{path} was measured with {self.found.get('budget')}, this is {budget}")
        options: list[str] = []
        for name, value in budget.items():
            if value is not None:
                options += [f"--{name.replace('_', '-')}", str(value)]
        self._head = {
            "machine": machine_record().model_dump(mode="json"),
            "git_revision": git_revision(REPOSITORY),
            "command": shlex.join(
                ["python", f"benchmarks/{script}", "--data", "DATA", "--weights", "WEIGHTS", *options]
            ),
        }

    def known(self, *keys: str) -> Collection[tuple[Any, ...]]:
        """What the rows hold under these keys."""
        return {tuple(row[key] for key in keys) for row in self.found["records"]}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row, with the code that it was measured with; the file names the machine of the last one."""
        self.found |= self._head
        self.found["records"].append({**row, "git_revision": self._head["git_revision"]})
        write_file(self._path, readable_json(self.found))
        print(json.dumps(row), flush=True)


def pipeline(network: str, arguments: argparse.Namespace, **data: Any) -> Pipeline:
    """Data and model, as a pipeline says them; further keys of the data are those given, where they are not None."""
    document = {
        "name": "surgery",
        "data": {
            "kind": "arrays",
            "root": str(arguments.data.resolve()),
            # What the published weights were trained with.
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "validation": {"from": "test", "size": 2000},
            **{key: value for key, value in data.items() if value is not None},
        },
        "model": {
            "factory": f"cifar:{network}",
            "weights": str((arguments.weights / f"cifar10_{network}.safetensors").resolve()),
        },
    }
    return Pipeline.model_validate_json(json.dumps(document))


def parent_of(described: Pipeline, data: Dataset, folder: Path) -> Checkpoint:
    """The network as a stage gets it."""
    path = folder / described.model.factory.replace(":", "_")
    if not path.exists():
        draft = source.make(described.model, 0)
        checkpoints.save(path, draft, inputs=data.inputs, classes=data.classes, history=(), key={})
    return checkpoints.load(path)


def context_of(parent: Checkpoint, data: Dataset, scratch: Path, arguments: argparse.Namespace, seed: int) -> Context:
    """What a stage works in."""
    return Context(
        data.for_decisions(), parent, arguments.device, arguments.threads, seed, scratch, Silent(), frozenset()
    )


def made(stage: str, settings: Mapping[str, Any], parent: Checkpoint, context: Context) -> Draft:
    """What a stage makes of the network."""
    entry = StageEntry.model_validate_json(json.dumps({stage: dict(settings)}))
    return STAGES[stage].load()(parent, entry.settings, context)


def tested(model: nn.Module, data: Dataset, device: str) -> dict[str, Any]:
    """Accuracy on the test split, which nothing is decided by."""
    _, correct = evaluate(model.to(device), data.test, device)
    model.cpu()
    return {"test_percent": 100.0 * correct / len(data.test), "test_samples": len(data.test)}


_STRAIGHT = re.compile(r"([\d.]+) % on validation straight after surgery, ([\d.]+) % once batch norms")


def before_training(notes: Sequence[str]) -> dict[str, float]:
    """Accuracy on validation straight after the last cut, and with new statistics of batch norms where they are better."""
    found = [match for note in notes if (match := _STRAIGHT.search(note))]
    straight, mended = map(float, found[-1].groups())
    return {"straight_validation_percent": straight, "mended_validation_percent": max(straight, mended)}


def macs_left(model: nn.Module, whole: nn.Module, data: Dataset) -> float:
    """The fraction of multiply-accumulates that remains."""
    example = tuple(tensor[:1] for tensor in data.example())
    return macs(model, example) / macs(whole, example)


def faster(model: nn.Module, whole: nn.Module, data: Dataset) -> dict[str, list[float]]:
    """How many times faster a model is than the whole one in ONNX Runtime, with the 95 % interval over rounds.

    In both precisions; one sample, one thread.
    """
    shape = (1, *data.example()[0].shape[1:])
    found = {}
    for precision in PRECISIONS:
        copies = {"whole": (copy.deepcopy(whole).eval(), shape), "cut": (copy.deepcopy(model).eval(), shape)}
        times = layer_times(copies, int8=precision == "int8", seconds=SECONDS)
        found[f"faster_{precision}"] = list(paired_ratio(times["whole"], times["cut"]))
    return found


def told_faster(row: Mapping[str, Any]) -> list[str]:
    """What `faster` found, for a table."""
    ratios = (row[f"faster_{precision}"] for precision in PRECISIONS)
    return [f"{value:.2f}× [{low:.2f}, {high:.2f}]" for value, low, high in ratios]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """Markdown, whose first columns are text and the others numbers."""
    rule = ["---"] * texts + ["--:"] * (len(heads) - texts)
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
