"""Pruning by `compress` beside torch-pruning's own high-level pruner: time, accuracy before and after the same recovery.

The published ResNet-56 for CIFAR-10 loses channels by L1 norm, each group the same fraction, until the same fraction of its
multiply-accumulates is left. Both results then go through the same recovery: distillation from the unpruned network by the
training engine, same settings, same order of samples. Validation is 2,000 test images and decides the epoch; the other
8,000 test images are measured once.

torch-pruning does not see that the shortcuts of these networks pad with a number of channels that code fixes, and makes a
network of its residual stream that fails in its forward pass. So it is told to ignore the layers that make the stream; `compress`
is measured with the stream protected as well (the same groups), and as it is.

    python benchmarks/pruning_peer.py --data cifar10 --weights . --per-class 1000 --epochs 6 --seeds 0 1 2
    python benchmarks/pruning_peer.py --render                                                the table

Each row is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch_pruning
from published import (
    Rows,
    answers_of,
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
from torch import nn

from compress.checkpoint import Checkpoint
from compress.config import RecoveryConfig
from compress.data.base import Dataset, Inputs
from compress.data.load import load_data
from compress.models.cost import macs
from compress.stages.base import Context, recover

NETWORK = "resnet56"
STEPS = 12
"""Bisections of torch-pruning's ratio."""


def by_compress(parent: Checkpoint, target: float, context: Context, protect: Sequence[str] = ()) -> nn.Module:
    """Our stage without batch norms or recovery: trials and proof included."""
    settings = {
        "target": {"macs": target},
        "multiple": 1,
        "recovery": None,
        "batchnorm_samples": 0,
        "protect": list(protect),
    }
    return made("prune", settings, parent, context).model


def by_torch_pruning(parent: Checkpoint, target: float, context: Context) -> nn.Module:
    """Its high-level pruner at the least ratio that meets the target; only its last call is timed (`seconds`)."""
    whole, example = parent.build(), tuple(tensor[:1] for tensor in context.example())
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        left = macs(pruned_at(middle, whole, example), example) / macs(whole, example)
        low, high = (middle, high) if left > target else (low, middle)
    return pruned_at(high, whole, example)


def pruned_at(ratio: float, whole: nn.Module, example: Inputs) -> nn.Module:
    """A copy that torch-pruning has pruned: L1, mean over the tensors of a group, every group the same fraction."""
    model = copy.deepcopy(whole)
    stream = [layer for name, layer in model.named_modules() if name == "conv1" or name.endswith(".conv2")]
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model, example, importance, pruning_ratio=ratio, ignored_layers=[*stream, *heads]
        )
        pruner.step()
    return model


WAYS: Mapping[str, Callable[[Checkpoint, float, Context], nn.Module]] = {
    "compress": by_compress,
    "compress, stream whole": functools.partial(by_compress, protect=["conv1", "*.conv2"]),
    "torch-pruning": by_torch_pruning,
}


def timed(way: str, parent: Checkpoint, target: float, context: Context) -> tuple[nn.Module, float]:
    """The pruned model, and seconds of one pruning; of torch-pruning without the search for the ratio."""
    started = time.perf_counter()
    model = WAYS[way](parent, target, context)
    seconds = time.perf_counter() - started
    return model, seconds / (STEPS + 1) if way == "torch-pruning" else seconds


def record(
    way: str, seed: int, data: Dataset, parent: Checkpoint, folder: Path, arguments: Namespace
) -> dict[str, Any]:
    """One pruning and one recovery."""
    context = context_of(parent, data, folder / f"{list(WAYS).index(way)}_{seed}", arguments, seed)
    model, seconds = timed(way, parent, arguments.target, context)
    straight = context.validation_percent(model)
    config = RecoveryConfig.model_validate_json(
        json.dumps(
            {
                "epochs": arguments.epochs,
                "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate,
            }
        )
    )
    rows = recover(model, config, 512, context)
    whole = parent.build()
    return {
        "way": way,
        "seed": seed,
        "seconds": seconds,
        "macs_left": macs_left(model, whole, data),
        **faster(model, whole, data),
        "straight_validation_percent": straight,
        "notes": context.notes,
        "validation_percent": max(row["validation_percent"] for row in rows),
        **tested(model, data, arguments.device),
        "torch_pruning": torch_pruning.__version__,
    }


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, and the difference seed by seed."""
    heads = ("", "MACs left", "faster, fp32", "int8", "s to prune", "validation %, straight after")
    names = ("seconds", "straight_validation_percent", "validation_percent", "test_percent")
    rows = []
    for way in WAYS:
        some = [one for one in records if one["way"] == way]
        if some:
            left = f"{100 * mean(one['macs_left'] for one in some):.1f} %"
            rows.append(
                [
                    f"`{way}`",
                    left,
                    *told_faster(some[0]),
                    *(f"{mean(one[name] for one in some):.2f}" for name in names),
                    str(len(some)),
                ]
            )
    lines = [table((*heads, "after recovery, validation %", "test %", "seeds"), rows, 1)]
    found = {way: {one["seed"]: one["test_percent"] for one in records if one["way"] == way} for way in WAYS}
    *ours, theirs = WAYS
    for way in ours:
        seeds = sorted(found[way].keys() & found[theirs].keys())
        if seeds:
            each = ", ".join(f"{found[way][seed] - found[theirs][seed]:+.2f}" for seed in seeds)
            lines += ["", f"Test, seed by seed, `{way}` against `{theirs}`: {each} points."]
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, "pruning_peer.json")
    parser.add_argument("--target", type=float, default=0.476, help="fraction of the MACs that remains")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, help="training images of each class; all when left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = answers_of(parser)
    shared = ("target", "epochs", "per_class", "batch_size", "learning_rate", "threads", "device")
    rows = Rows("pruning_peer.py", arguments, shared)
    if not arguments.render:
        described = pipeline(NETWORK, arguments, per_class=arguments.per_class, augment={"crop": 4, "flip": True})
        done = rows.known("way", "seed")
        with tempfile.TemporaryDirectory() as folder:
            for seed in arguments.seeds:
                data = load_data(described.data, seed)
                parent = parent_of(described, data, Path(folder))
                for way in WAYS:
                    if (way, seed) not in done:
                        rows.add(record(way, seed, data, parent, Path(folder), arguments))
    print(markdown(rows.found["records"]))


if __name__ == "__main__":
    told(main)
