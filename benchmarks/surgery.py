"""What is left of a trained network after surgery alone: every criterion, ranking and truncation, without any training.

A published ResNet for CIFAR-10 is pruned or factorized by the stage's own code to the same fraction of its multiply-accumulates.
Accuracy is measured straight after surgery (validation: 2,000 test images), with new statistics for the batch norms (validation),
and then once on the other 8,000 test images. Which of two ways is better without training need not be better after it.

    python benchmarks/surgery.py --data cifar10 --weights . --json benchmarks/results/surgery.json
    python benchmarks/surgery.py --render                                                           the tables

Each row is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress import CompressError, machine
from compress import checkpoint as checkpoints
from compress.checkpoint import Checkpoint
from compress.config import Pipeline, StageEntry
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.models.cost import macs
from compress.seeds import derive_seed
from compress.stages import STAGES, source
from compress.stages.base import Context
from compress.surroundings import git_revision, machine_record
from compress.training import evaluate

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "surgery.json"
_USUAL = {"protect": [], "splits": ["channel"]}
CRITERIA = ("l1", "l2", "fpgm", "lamp", "bn_scale", "taylor", "hessian", "activation", "random")


@dataclass(frozen=True)
class Case:
    """One way to operate on one network."""

    network: str
    stage: str
    target: float
    """Fraction of the multiply-accumulates that may remain."""
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.network} {self.stage} {' '.join(f'{key}={value}' for key, value in self.settings.items())}"


def cases() -> Iterator[Case]:
    """All of them: 2.1 times less work by pruning ResNet-56, 1.5 times less by factorizing."""
    for ranking in ("local", "global", "isomorphic", "sensitivity"):
        for criterion in CRITERIA:
            yield Case("resnet56", "prune", 1 / 2.1, {"criterion": criterion, "ranking": ranking})
    for ranking in ("local", "sensitivity"):
        stream_whole = {"criterion": "l1", "ranking": ranking, "protect": ["conv1", "*.conv2"]}
        yield Case("resnet56", "prune", 1 / 2.1, stream_whole)
    for network in ("resnet20", "resnet56"):
        for truncation in ("weights", "outputs"):
            for allocation in ("same_energy", "least_error"):
                yield Case(network, "factorize", 1 / 1.5, {"truncation": truncation, "allocation": allocation})
            forms = {"truncation": truncation, "allocation": "least_error", "splits": ["channel", "spatial", "tucker"]}
            yield Case(network, "factorize", 1 / 1.5, forms)


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
    draft = source.make(described.model, 0)
    path = folder / described.model.factory.replace(":", "_")
    if not path.exists():
        checkpoints.save(path, draft, inputs=data.inputs, classes=data.classes, history=(), key={})
    return checkpoints.load(path)


def record(case: Case, described: Pipeline, data: Dataset, folder: Path) -> dict[str, Any]:
    """One operation, with the old statistics and with new ones."""
    parent = parent_of(described, data, folder)
    found: dict[str, Any] = {"case": case.name, "network": case.network, "stage": case.stage, **case.settings}
    for name, samples in (("straight", 0), ("mended", 512)):
        settings = {**case.settings, "target": {"macs": case.target}, "recovery": None, "batchnorm_samples": samples}
        if case.stage == "factorize":  # accuracy at equal work: nothing is decided by the clock
            settings = {"splits": ["channel"], **settings, "faster_by": 0.0}
        entry = StageEntry.model_validate_json(json.dumps({case.stage: settings}))
        seed = derive_seed(0, case.stage)
        context = Context(
            data.for_decisions(), parent, "cpu", torch.get_num_threads(), seed, folder / "work", Silent(), frozenset()
        )
        started = time.perf_counter()
        draft = STAGES[case.stage].load()(parent, entry.settings, context)
        found["seconds"] = time.perf_counter() - started
        found[f"{name}_validation_percent"] = context.validation_percent(draft.model)
    _, correct = evaluate(draft.model, data.test, "cpu")
    left = macs(draft.model, tuple(tensor[:1] for tensor in data.example()))
    whole = macs(parent.build(), tuple(tensor[:1] for tensor in data.example()))
    return {
        **found,
        "test_percent": 100.0 * correct / len(data.test),
        "test_samples": len(data.test),
        "macs_left": left / whole,
        "warnings": context.warnings,
    }


def _words(value: Any) -> str:
    return ", ".join(value) or "nothing" if isinstance(value, list) else str(value)


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each stage."""
    lines = []
    heads_of = {"prune": ("criterion", "ranking", "protect"), "factorize": ("truncation", "allocation", "splits")}
    for stage, heads in heads_of.items():
        rows = [one for one in found["records"] if one["stage"] == stage]
        if not rows:
            continue
        lines += [
            f"| network | {' | '.join(heads)} | MACs left | validation %, straight after | with new statistics | test % |",
            f"|---|{'---|' * len(heads)}--:|--:|--:|--:|",
        ]
        for one in rows:
            cells = [
                one["network"],
                *(f"`{_words(one.get(head, _USUAL.get(head)))}`" for head in heads),
                f"{100 * one['macs_left']:.1f} %",
            ]
            cells += [f"{one[f'{name}_validation_percent']:.2f}" for name in ("straight", "mended")]
            cells.append(f"{one['test_percent']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as arrays")
    parser.add_argument("--weights", type=Path, help="folder with cifar10_resnet20.safetensors and …resnet56…")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--stage", choices=("prune", "factorize"), help="only one of them")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="measure nothing, print the tables")
    arguments = parser.parse_args()
    if not arguments.render and (arguments.data is None or arguments.weights is None):
        parser.error("--data and --weights are needed, or --render")
    found: dict[str, Any] = json.loads(arguments.json.read_bytes()) if arguments.json.is_file() else {"records": []}
    if not arguments.render:
        torch.set_num_threads(arguments.threads)
        found |= {
            "machine": machine_record().model_dump(mode="json"),
            "git_revision": git_revision(REPOSITORY),
            "command": shlex.join(["python", "benchmarks/surgery.py", "--threads", str(arguments.threads)]),
        }
        done = {one["case"] for one in found["records"]}
        with tempfile.TemporaryDirectory() as folder:
            for case in cases():
                if case.name in done or arguments.stage not in (None, case.stage) or arguments.only not in case.name:
                    continue
                described = pipeline(case.network, arguments)
                found["records"].append(record(case, described, load_data(described.data, 0), Path(folder)))
                write_file(arguments.json, readable_json(found))
                print(json.dumps(found["records"][-1]), flush=True)
    print(markdown(found))


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(str(error))
