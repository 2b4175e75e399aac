"""What a step of the training engine costs over a loop that anybody would write.

In each pair the engine (`compress.training.fit`) and a plain PyTorch loop (`by_loop` below) train the same network for an
epoch on the same images, one right after the other, in an order that changes from pair to pair; the ratio of a pair is the
engine's time over the loop's, so that a drift of the machine leaves it alone. Both do the same steps: first weights, order
of the samples, learning rates, decay, precision and memory layout are the same, and `same_losses` tells in how many pairs
the mean losses were equal to the last bit. The loop's images lie ready as normalised tensors, while the engine takes them
from the data set as a pipeline does. The loop keeps its memory from step to step as the engine does (`kept_memory`), so
that what this gains hides no cost of the engine; a third run, of the loop as it stands, tells the gain. Validation and what
is saved for a killed run are outside the steps, and not timed.

    plain      cross-entropy with the labels
    distilled  soft labels of a larger network besides, asked in every step
    average    plain, with a moving average of the weights, which the loop keeps with torch's `AveragedModel`
    parts      plain, each step's samples in two parts
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress import machine
from compress.config import DigitsConfig, KDLossConfig, LabelLossConfig, LossEntry, TrainingConfig
from compress.data.base import DecisionData
from compress.data.load import load_data
from compress.events import EpochResult, Silent
from compress.files import readable_json, write_file
from compress.methods.statistics import paired_ratio
from compress.models.factory import Arch, create
from compress.seeds import derive_seed
from compress.surroundings import git_revision, machine_record
from compress.training import Objective, OneTeacher, Workplace, fit
from compress.training.memory import kept_memory
from compress.training.precision import resolved_precision

REPOSITORY = Path(__file__).resolve().parent.parent
LABELS = (LossEntry(labels=LabelLossConfig(weight=1.0)),)
SOFT = (LossEntry(kd=KDLossConfig(temperature=4.0, weight=0.9)), LossEntry(labels=LabelLossConfig(weight=0.1)))
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "distilled": {},
    "average": {"ema": 0.999},
    "parts": {"accumulate": 2},
}


@dataclass(frozen=True)
class Setup:
    """What a pair trains, on what, and how."""

    case: str
    config: TrainingConfig
    data: DecisionData
    images: Tensor
    labels: Tensor
    network: str
    teacher: nn.Module | None
    device: str


class Kept(Silent):
    """Keeps the epoch."""

    result: EpochResult

    def epoch(self, result: EpochResult) -> None:
        """Keeps it."""
        self.result = result


def by_engine(setup: Setup) -> tuple[float, float]:
    """Seconds per step, and the mean loss."""
    model = create(Arch(f"cifar:{setup.network}"), seed=0)
    losses = SOFT if setup.teacher is not None else LABELS
    teacher = OneTeacher(setup.teacher) if setup.teacher is not None else None
    kept = Kept()
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(setup.device, 0, Path(folder), kept)
        fit(Objective(model, losses, teacher), setup.data, setup.config, place)
    return setup.config.batch_size / kept.result.samples_per_second, kept.result.loss


def by_loop(setup: Setup) -> tuple[float, float]:
    """The same of the plain loop."""
    config, device = setup.config, setup.device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = create(Arch(f"cifar:{setup.network}"), seed=0).to(device=device, memory_format=layout)
    if setup.teacher is not None:
        setup.teacher.to(device=device, memory_format=layout).eval()
    parameters = list(model.parameters())
    decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    )
    order = torch.randperm(len(setup.images), generator=torch.Generator().manual_seed(derive_seed(0, "epoch", 0)))
    steps = len(setup.images) // config.batch_size
    model.train()
    started = time.perf_counter()
    total = torch.zeros((), device=device)
    for chosen in order[: steps * config.batch_size].split(config.batch_size):
        x = setup.images[chosen].to(device, non_blocking=True).contiguous(memory_format=layout)
        y = setup.labels[chosen].to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        for part_x, part_y in zip(x.tensor_split(config.accumulate), y.tensor_split(config.accumulate), strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = plain_loss(model(part_x).float(), part_x, part_y, setup.teacher) / config.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
    mean = float(total) / steps
    return (time.perf_counter() - started) / steps, mean


def plain_loss(logits: Tensor, inputs: Tensor, labels: Tensor, teacher: nn.Module | None) -> Tensor:
    """Cross-entropy, and with a teacher soft labels at temperature 4."""
    if teacher is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        answers = teacher(inputs).float()
    soft, answered = F.log_softmax(answers / 4, 1), F.log_softmax(logits / 4, 1)
    return 0.9 * 16 * F.kl_div(answered, soft, reduction="batchmean", log_target=True) + 0.1 * F.cross_entropy(
        logits, labels
    )


def by_loop_that_keeps(setup: Setup) -> tuple[float, float]:
    """The plain loop in a process that keeps its memory while it trains, as the engine's does."""
    with kept_memory():
        return by_loop(setup)


def measured(setup: Setup, pairs: int) -> dict[str, Any]:
    """Rounds in an order that changes, after one that does not count."""
    ways: dict[str, Callable[[Setup], tuple[float, float]]] = {
        "engine": by_engine,
        "loop": by_loop_that_keeps,
        "loop that gives memory back": by_loop,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    same = 0
    for number in range(-1, pairs):
        found = {way: ways[way](setup) for way in (ways if number % 2 == 0 else reversed(ways))}
        if number < 0:
            continue
        same += found["engine"][1] == found["loop"][1]
        for way, (per_step, _) in found.items():
            seconds[way].append(per_step)
    ratios = {}
    for way in list(ways)[1:]:
        value, low, high = paired_ratio(seconds["engine"], seconds[way])
        ratios[way] = {"value": value, "low": low, "high": high}
    return {
        "case": setup.case,
        "pairs": pairs,
        "steps_per_epoch": len(setup.images) // setup.config.batch_size,
        "same_losses": same,
        "step_ms": {way: 1000 * statistics.median(found) for way, found in seconds.items()},
        "engine_over_loop": ratios["loop"],
        "engine_over_loop_that_gives_memory_back": ratios["loop that gives memory back"],
        "seconds_per_step": seconds,
    }


def setup_of(case: str, arguments: argparse.Namespace) -> Setup:
    """What the pairs of a case do."""
    data = load_data(DigitsConfig(kind="digits"), 0).for_decisions()
    (images,), labels, *_ = next(data.train.batches(len(data.train)))
    config = TrainingConfig(
        epochs=1,
        batch_size=arguments.batch_size,
        precision=resolved_precision(arguments.precision, arguments.device),
        channels_last=arguments.channels_last,
        schedule="constant",
        **CASES[case],
    )
    teacher = create(Arch(f"cifar:{arguments.teacher}"), seed=1) if case == "distilled" else None
    return Setup(case, config, data, images, labels, arguments.network, teacher, arguments.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--network", default="resnet20", help="one of the cifar: networks")
    parser.add_argument("--teacher", default="resnet56", help="another one")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="what was found is written to this file after each case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    command = shlex.join(["python", "benchmarks/engine_overhead.py", *sys.argv[1:]])
    found: dict[str, Any] = {
        "machine": machine_record().model_dump(mode="json"),
        "git_revision": git_revision(REPOSITORY),
        "command": command,
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "precision_ran": resolved_precision(arguments.precision, arguments.device),
        "cases": [],
    }
    print(f"{command}\n{json.dumps(found['machine'])}", flush=True)
    for case in arguments.cases:
        result = measured(setup_of(case, arguments), arguments.pairs)
        found["cases"].append(result)
        print(json.dumps({name: value for name, value in result.items() if name != "seconds_per_step"}), flush=True)
        if arguments.json:
            write_file(arguments.json, readable_json(found))


if __name__ == "__main__":
    main()
