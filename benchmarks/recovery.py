"""What criterion, schedule and recovery are worth on one budget of training: the published ResNet-56 for CIFAR-10, pruned.

All rows have the same target of multiply-accumulates, the same images and the same number of epochs in all, those between cuts
and those of a sparsity training included, so that a schedule pays for what it does. The residual stream stays whole. Accuracy
on validation (2,000 test images) straight after the last cut, with new statistics for the batch norms, and after recovery,
whose best epoch it is; then once on the other 8,000 test images.

    python benchmarks/recovery.py --data cifar10 --weights . --per-class 500 --epochs 4 --seeds 0
    python benchmarks/recovery.py --render                                                              the table

Each row is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from published import (
    Rows,
    answers_of,
    before_training,
    context_of,
    macs_left,
    made,
    parent_of,
    parser_of,
    pipeline,
    table,
    tested,
    told,
)

from compress.checkpoint import Checkpoint
from compress.data.base import Dataset
from compress.data.load import load_data

NETWORK = "resnet56"
CRITERIA = ("l1", "l2", "fpgm", "lamp", "bn_scale", "taylor", "hessian", "activation", "random")
CUTS = 3
"""Of the schedules with several, each but the last followed by an epoch."""
SPARSE_EPOCHS = 1
KD = ({"kd": {"temperature": 4.0, "weight": 0.9}}, {"labels": {"weight": 0.1}})
STAGES = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}
LOSSES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "labels": ({"labels": {"weight": 1.0}},),
    "kd": KD,
    "kd + attention": (*KD, {"attention": {"layers": STAGES, "weight": 1000.0}}),
    "kd + hint": (*KD, {"hint": {"layers": STAGES, "weight": 30.0}}),
}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "one_shot": {},
    "iterative": {"schedule": {"iterative": {"steps": CUTS, "epochs": 1}}},
    "gradual": {"schedule": {"gradual": {"steps": CUTS, "epochs": 1}}},
    "group_lasso": {"sparsity": {"kind": "group_lasso", "weight": 3e-4, "epochs": SPARSE_EPOCHS}},
    "group_growing": {"sparsity": {"kind": "group_growing", "weight": 0.3, "epochs": SPARSE_EPOCHS}},
}
Case = tuple[str, str, str]
"""Criterion, schedule, losses of recovery."""
CASES: Sequence[Case] = list(
    dict.fromkeys(
        [
            *((criterion, "one_shot", "kd") for criterion in CRITERIA),
            *(("l1", "one_shot", losses) for losses in LOSSES),
            *(("l1", schedule, "kd") for schedule in SCHEDULES),
            *(("taylor", schedule, "kd") for schedule in ("iterative", "gradual")),
        ]
    )
)


def settings_of(case: Case, arguments: Namespace) -> dict[str, Any]:
    """Of the stage, with the epochs shared out between the cuts."""
    criterion, schedule, losses = case
    before = {"one_shot": 0, "iterative": CUTS - 1, "gradual": CUTS - 1}.get(schedule, SPARSE_EPOCHS)
    recovery = {
        "epochs": arguments.epochs - before,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "losses": LOSSES[losses],
    }
    return {
        "criterion": criterion,
        "target": {"macs": arguments.target},
        "multiple": 2,
        "protect": ["conv1", "*.conv2"],
        **SCHEDULES[schedule],
        "recovery": recovery,
    }


def record(
    case: Case, seed: int, data: Dataset, parent: Checkpoint, folder: Path, arguments: Namespace
) -> dict[str, Any]:
    """One pruning and one recovery."""
    context = context_of(parent, data, folder / f"{'_'.join(case)}_{seed}", arguments, seed)
    started = time.perf_counter()
    draft = made("prune", settings_of(case, arguments), parent, context)
    seconds = time.perf_counter() - started
    return {
        **dict(zip(("criterion", "schedule", "losses"), case, strict=True)),
        "seed": seed,
        "seconds": seconds,
        "macs_left": macs_left(draft.model, parent.build(), data),
        **before_training(context.notes),
        "validation_percent": context.validation_percent(draft.model),
        **tested(draft.model, data, arguments.device),
        "notes": context.notes,
        "warnings": context.warnings,
    }


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A row per case: means over seeds."""
    heads = (
        *("criterion", "schedule", "losses", "MACs left"),
        *("validation %, straight after", "with new statistics", "after recovery", "test %", "seeds"),
    )
    percents = ("straight_validation", "mended_validation", "validation", "test")
    rows = []
    for case in CASES:
        some = [one for one in records if (one["criterion"], one["schedule"], one["losses"]) == case]
        if some:
            rows.append(
                [
                    *case,
                    f"{100 * mean(one['macs_left'] for one in some):.1f} %",
                    *(f"{mean(one[f'{name}_percent'] for one in some):.2f}" for name in percents),
                    str(len(some)),
                ]
            )
    return table(heads, rows, 3)


def main() -> None:
    parser = parser_of(__doc__, "recovery.json")
    parser.add_argument("--target", type=float, default=0.476, help="fraction of the MACs that remains")
    parser.add_argument("--epochs", type=int, default=4, help="in all")
    parser.add_argument("--per-class", type=int, help="training images of each class; all when left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="cases whose name, as `l1 one_shot kd`, holds this")
    arguments = answers_of(parser)
    if not arguments.render and arguments.epochs < CUTS:
        parser.error(f"--epochs: {CUTS} or more, as schedules train after each cut")
    shared = ("target", "epochs", "per_class", "batch_size", "learning_rate", "threads", "device")
    rows = Rows("recovery.py", arguments, shared)
    if not arguments.render:
        described = pipeline(NETWORK, arguments, per_class=arguments.per_class, augment={"crop": 4, "flip": True})
        done = rows.known("criterion", "schedule", "losses", "seed")
        with tempfile.TemporaryDirectory() as folder:
            for seed in arguments.seeds:
                data = load_data(described.data, seed)
                parent = parent_of(described, data, Path(folder))
                for case in CASES:
                    if (*case, seed) not in done and arguments.only in " ".join(case):
                        rows.add(record(case, seed, data, parent, Path(folder), arguments))
    print(markdown(rows.found["records"]))


if __name__ == "__main__":
    told(main)
