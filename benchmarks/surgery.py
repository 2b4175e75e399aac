"""What is left of a trained network after surgery alone: every criterion, ranking and truncation, without any training.

A published ResNet for CIFAR-10 is pruned or factorized by the stage's own code to the same fraction of its multiply-accumulates.
Accuracy is measured straight after surgery (validation: 2,000 test images), with new statistics for the batch norms (validation),
and then once on the other 8,000 test images. Which of two ways is better without training need not be better after it.

    python benchmarks/surgery.py --data cifar10 --weights . --json benchmarks/results/surgery.json
    python benchmarks/surgery.py --render                                                           the tables

Each row is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published import (
    Rows,
    answers_of,
    before_training,
    context_of,
    faster,
    macs_left,
    made,
    parent_of,
    parser_of,
    pipeline,
    table,
    tested,
    told,
    told_faster,
)

from compress import checkpoint as checkpoints
from compress.config import Pipeline
from compress.data.base import Dataset
from compress.data.load import load_data
from compress.seeds import derive_seed

_USUAL = {"protect": [], "multiple": 4, "splits": ["channel"], "faster_by": 0.0}
EACH_OF_TWO = 1 / 2**0.5
"""Fraction of the multiply-accumulates that each of two stages leaves: together they leave half."""
OF_TWO: Mapping[str, Mapping[str, Any]] = {"prune": {"protect": ["conv1*", "*.conv2*"]}, "factorize": {}}
"""Settings of the two: the residual stream stays whole, whether its layers are split already or not."""
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
    """All of them: 2.1 times less work by pruning ResNet-56, 1.5 times less by factorizing, half by both, one after the other."""
    for ranking in ("local", "global", "isomorphic", "sensitivity"):
        for criterion in CRITERIA:
            yield Case("resnet56", "prune", 1 / 2.1, {"criterion": criterion, "ranking": ranking})
    stream_whole = {"criterion": "l1", "ranking": "local", "protect": ["conv1", "*.conv2"]}
    for other in ({}, {"ranking": "sensitivity"}, *({"multiple": multiple} for multiple in (1, 2, 8))):
        yield Case("resnet56", "prune", 1 / 2.1, {**stream_whole, **other})
    for network in ("resnet20", "resnet56"):
        for order in (["prune", "factorize"], ["factorize", "prune"]):
            yield Case(network, "both", EACH_OF_TWO**2, {"order": order})
        for truncation in ("weights", "outputs"):
            for allocation in ("same_energy", "least_error"):
                yield Case(network, "factorize", 1 / 1.5, {"truncation": truncation, "allocation": allocation})
            forms = {"truncation": truncation, "allocation": "least_error", "splits": ["channel", "spatial", "tucker"]}
            yield Case(network, "factorize", 1 / 1.5, forms)
        yield Case(network, "factorize", 1 / 1.5, {**forms, "faster_by": 0.02})  # only what is faster here


def settings_of(stage: str, target: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stage without training."""
    usual = {"target": {"macs": target}, "recovery": None, "batchnorm_samples": 512}
    # Accuracy at equal work: nothing is decided by the clock.
    own = {"splits": ["channel"], "faster_by": 0.0} if stage == "factorize" else {}
    return {**usual, **own, **settings}


def record(case: Case, described: Pipeline, data: Dataset, folder: Path, arguments: Namespace) -> dict[str, Any]:
    """One operation."""
    parent = parent_of(described, data, folder)
    context = context_of(parent, data, folder / "work", arguments, derive_seed(0, case.stage))
    started = time.perf_counter()
    if case.stage == "both":
        first, second = case.settings["order"]
        draft = made(first, settings_of(first, EACH_OF_TWO, OF_TWO[first]), parent, context)
        between = folder / case.name
        checkpoints.save(between, draft, inputs=data.inputs, classes=data.classes, history=(), key={})
        target = case.target / macs_left(
            draft.model, parent.build(), data
        )  # what the first left too much, the second takes
        draft = made(second, settings_of(second, target, OF_TWO[second]), checkpoints.load(between), context)
    else:
        draft = made(case.stage, settings_of(case.stage, case.target, case.settings), parent, context)
    model, seconds = draft.model, time.perf_counter() - started
    whole = parent.build()
    return {
        "case": case.name,
        "network": case.network,
        "stage": case.stage,
        **case.settings,
        "seconds": seconds,
        **before_training(context.notes),
        **tested(model, data, arguments.device),
        "macs_left": macs_left(model, whole, data),
        **faster(model, whole, data),
        "warnings": context.warnings,
    }


def _words(value: Any) -> str:
    return ", ".join(value) or "nothing" if isinstance(value, list) else str(value)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each stage."""
    tables = []
    heads_of = {
        "prune": ("criterion", "ranking", "protect", "multiple"),
        "factorize": ("truncation", "allocation", "splits", "faster_by"),
        "both": ("order",),
    }
    numbers = ("MACs left", "faster, fp32", "int8", "validation %, straight after", "with new statistics", "test %")
    for stage, heads in heads_of.items():
        rows = [
            [
                one["network"],
                *(f"`{_words(one.get(head, _USUAL.get(head)))}`" for head in heads),
                f"{100 * one['macs_left']:.1f} %",
                *told_faster(one),
                *(f"{one[f'{name}_validation_percent']:.2f}" for name in ("straight", "mended")),
                f"{one['test_percent']:.2f}",
            ]
            for one in records
            if one["stage"] == stage
        ]
        if rows:
            tables.append(table(("network", *heads, *numbers), rows, 1 + len(heads)))
    return "\n\n".join(tables)


def main() -> None:
    parser = parser_of(__doc__, "surgery.json")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--stage", choices=("prune", "factorize", "both"), help="only these")
    arguments = answers_of(parser)
    rows = Rows("surgery.py", arguments, ("threads", "device"))
    if not arguments.render:
        done = rows.known("case")
        with tempfile.TemporaryDirectory() as folder:
            for case in cases():
                if (case.name,) in done or arguments.stage not in (None, case.stage) or arguments.only not in case.name:
                    continue
                described = pipeline(case.network, arguments)
                rows.add(record(case, described, load_data(described.data, 0), Path(folder), arguments))
    print(markdown(rows.found["records"]))


if __name__ == "__main__":
    told(main)
