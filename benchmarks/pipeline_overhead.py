"""What the pipeline costs over a loop that anybody would write.

In each repeat `compress run` with the one stage `train` and a plain PyTorch loop (`plain_loop` below, which imports nothing
of this project but the network) train the same network on the same data, each in a fresh process, in an order that changes.
The loop does the same steps: it gets the first weights, the order of the samples, batch size, precision, memory layout and
learning rates of the pipeline, measures validation after every epoch and keeps the best weights. `same_losses` tells whether
the two had the same losses to the last bit. The loop's data lies ready as tensors, while the pipeline resizes and normalises
batch by batch; and the pipeline saves after every epoch what a killed run needs to go on, which counts in `stage`, not in
`epoch`.

    epoch     seconds per epoch, validation included: the median of a process's epochs
    stage     seconds per epoch of the whole training until the best weights are there; the pipeline's begins with reading the
              checkpoint before it, the loop's once its network and optimizer are made
    outside   seconds of the process of `compress run` outside its epochs, and where they go by the times of the files that
              it writes; nothing is measured of latency, which takes as long as it is told to
    cached    seconds of the same command once more, when everything is there already
"""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress import load_pipeline, machine
from compress.config import Pipeline
from compress.data.base import Split
from compress.data.load import load_data
from compress.errors import CompressError
from compress.files import readable_json, write_file
from compress.measured import METRICS
from compress.methods.statistics import paired_ratio
from compress.models.factory import Arch, create
from compress.plan import planned_stages
from compress.results import Results, load_results
from compress.seeds import derive_seed
from compress.surroundings import git_revision, machine_record
from compress.training import resolved_precision

REPOSITORY = Path(__file__).resolve().parent.parent
NAME = "overhead"
RESULTS, MANIFEST = "results.json", "checkpoint.json"


def plain_loop(folder: str) -> None:
    """Train as `job.pt` in a folder says and write what came of it to `answer.json`; its source is run on its own."""
    import copy
    import json
    import math
    import time
    from pathlib import Path

    import torch
    import torch.nn.functional as F

    from compress.models.cifar import MODELS

    job = torch.load(Path(folder) / "job.pt")
    torch.set_num_threads(job["threads"])
    epochs, batch_size = job["epochs"], job["batch_size"]
    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    images, labels = job["train"]
    images = images.contiguous(memory_format=layout)

    model = MODELS[job["network"]]()
    model.load_state_dict(job["weights"])
    model = model.to(memory_format=layout)
    parameters = list(model.parameters())
    decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": job["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=job["learning_rate"], momentum=job["momentum"], nesterov=True)
    steps = len(images) // batch_size
    last = epochs * steps - 1

    def one_cycle(step: int) -> float:
        def between(start: float, end: float, position: float) -> float:
            return end + (start - end) * (1 + math.cos(math.pi * position)) / 2

        position = step / last
        return between(1 / 25, 1.0, position / 0.3) if position < 0.3 else between(1.0, 1e-4, (position - 0.3) / 0.7)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle)
    rows, best, weights = [], (-1, 0.0), None
    started = time.perf_counter()  # making the first optimizer imports for a second, which the pipeline does elsewhere
    for epoch in range(epochs):
        epoch_started = time.perf_counter()
        model.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(job["seeds"][epoch]))
        total = torch.zeros(())
        for chosen in order[: steps * batch_size].split(batch_size):
            x, y = images[chosen].contiguous(memory_format=layout), labels[chosen]
            with torch.autocast("cpu", torch.bfloat16, enabled=job["bfloat16"]):
                loss = F.cross_entropy(model(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        model.eval()
        validation_loss, correct = 0.0, 0
        with torch.no_grad():
            for x, y in zip(*(tensor.split(256) for tensor in job["validation"]), strict=True):
                logits = model(x)
                validation_loss += float(F.cross_entropy(logits, y, reduction="sum"))
                correct += int((logits.argmax(1) == y).sum())
        percent = 100.0 * correct / len(job["validation"][0])
        rows.append(
            {
                "loss": float(total) / steps,
                "validation_percent": percent,
                "seconds": time.perf_counter() - epoch_started,
            }
        )
        if (correct, -validation_loss) > best:
            best, weights = (correct, -validation_loss), copy.deepcopy(model.state_dict())
    seconds = time.perf_counter() - started
    torch.save(weights, Path(folder) / "best.pt")
    (Path(folder) / "answer.json").write_text(json.dumps({"epochs": rows, "seconds": seconds}))


LOOP = f"from __future__ import annotations\nimport sys\n{inspect.getsource(plain_loop)}\nplain_loop(sys.argv[1])\n"


def write_pipeline(folder: Path, arguments: argparse.Namespace) -> Path:
    """The pipeline file."""
    training = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "channels_last": arguments.channels_last,
    }
    document = {
        "name": NAME,
        "device": "cpu",
        "threads": arguments.threads,
        "data": {"kind": "digits"},
        "model": {"factory": f"cifar:{arguments.network}"},
        "stages": [{"train": training}],
        "bench": {"latency": None},
    }
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(document, indent=1))  # YAML takes JSON
    return path


def write_job(pipeline: Pipeline, network: str, folder: Path) -> None:
    """What the loop needs to do the pipeline's steps: tensors, first weights, seeds and settings."""
    source, train = planned_stages(pipeline)
    config = pipeline.stages[0].settings
    if (config.optimizer, config.schedule, config.gradient_clip) != ("sgd", "one_cycle", None):
        raise CompressError(
            "the plain loop does SGD with one cycle and clips nothing; the stage's defaults are others now"
        )
    data = load_data(pipeline.data, pipeline.seed)
    job = {
        "network": network,
        "threads": pipeline.threads,
        "epochs": config.epochs,
        "batch_size": min(config.batch_size, len(data.train)),
        "learning_rate": config.learning_rate,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "channels_last": config.channels_last,
        "bfloat16": resolved_precision(config.precision, "cpu") == "bf16",
        "weights": create(Arch(f"cifar:{network}"), seed=source.seed).state_dict(),
        "seeds": [derive_seed(train.seed, "epoch", epoch) for epoch in range(config.epochs)],
        "train": whole(data.train),
        "validation": whole(data.validation),
    }
    torch.save(job, folder / "job.pt")


def whole(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a split."""
    (images,), labels = next(split.batches(len(split)))
    return images, labels


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Run a command: when it started (seconds since 1970), and how many seconds it took.

    Raises:
        CompressError: where it fails, with the last lines of what it said.
    """
    began, started = time.time(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise CompressError(
            f"{shlex.join(command)[:100]} ended with code {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}"
        )
    return began, seconds


def by_pipeline(file: Path, runs: Path) -> dict[str, Any]:
    """`compress run`, and once more from the cache."""
    command = [sys.executable, "-m", "compress", "run", str(file), "--runs", str(runs)]
    began, seconds = timed(command)
    results = load_results(runs / NAME / RESULTS)
    train = results.rows[-1]
    parts = parts_of(results, runs / NAME, began, seconds)
    manifests = times_of(results, runs / NAME, MANIFEST)
    _, cached = timed(command)
    assert manifests == times_of(load_results(runs / NAME / RESULTS), runs / NAME, MANIFEST), "the second run is cached"
    epochs = [row.model_dump(include={"loss", "validation_percent", "seconds"}) for row in train.training]
    return {
        "epochs": epochs,
        "stage_seconds": train.seconds,
        "process_seconds": seconds,
        "outside_seconds": seconds - sum(row["seconds"] for row in epochs),
        "outside_parts_seconds": parts,
        "cached_seconds": cached,
    }


def parts_of(results: Results, root: Path, began: float, seconds: float) -> dict[str, float]:
    """Where a run's seconds outside its epochs went; they add up to all of them."""
    source, train = results.rows
    (made_source, made_train), (measured_source, measured_train) = (
        times_of(results, root, name) for name in (MANIFEST, METRICS)
    )
    written = max(path.stat().st_mtime for path in root.iterdir() if path.is_file())
    return {
        "imports and data": made_source - began - source.seconds,
        "source": source.seconds,
        "train, outside epochs": train.seconds - sum(row.seconds for row in train.training),
        "checkpoint": made_train - measured_source - train.seconds,
        "ONNX and accuracy of source": measured_source - made_source,
        "ONNX and accuracy of train": measured_train - made_train,
        "results and report": written - measured_train,
        "end": began + seconds - written,
    }


def times_of(results: Results, root: Path, name: str) -> list[float]:
    """When the file of that name was written beside each row's checkpoint, seconds since 1970."""
    return [(root / row.checkpoint / name).stat().st_mtime for row in results.rows]


def by_loop(folder: Path) -> dict[str, Any]:
    """The hand-written loop."""
    _, seconds = timed([sys.executable, "-c", LOOP, str(folder)])
    answer = json.loads((folder / "answer.json").read_bytes())
    return {
        "epochs": answer["epochs"],
        "stage_seconds": answer["seconds"],
        "process_seconds": seconds,
        "outside_seconds": seconds - sum(row["seconds"] for row in answer["epochs"]),
    }


def one_repeat(number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in an order that changes, in a folder of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_pipeline(folder, arguments)
        write_job(load_pipeline(file), arguments.network, folder)
        ways = {"pipeline": lambda: by_pipeline(file, folder / "runs"), "loop": lambda: by_loop(folder)}
        found = {way: ways[way]() for way in (ways if number % 2 == 0 else reversed(ways))}
    losses = [[row["loss"] for row in one["epochs"]] for one in found.values()]
    for one in found.values():
        one["epoch_seconds"] = statistics.median(row["seconds"] for row in one["epochs"])
        one["best_validation_percent"] = max(row["validation_percent"] for row in one["epochs"])
    return {"repeat": number, "same_losses": losses[0] == losses[1], **found}


def summary(repeats: Sequence[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """What the repeats say together: medians, and ratios of pipeline to loop, repeat by repeat."""

    def each(way: str, name: str) -> list[float]:
        return [repeat[way][name] for repeat in repeats]

    def ratio(name: str) -> dict[str, float]:
        value, low, high = paired_ratio(each("pipeline", name), each("loop", name))
        return {"value": value, "low": low, "high": high}

    parts = repeats[0]["pipeline"]["outside_parts_seconds"]
    return {
        "repeats": len(repeats),
        "same_losses": sum(repeat["same_losses"] for repeat in repeats),
        "epoch_seconds": {way: statistics.median(each(way, "epoch_seconds")) for way in ("pipeline", "loop")},
        "epoch_pipeline_over_loop": ratio("epoch_seconds"),
        "stage_seconds_per_epoch": {
            way: statistics.median(each(way, "stage_seconds")) / epochs for way in ("pipeline", "loop")
        },
        "stage_pipeline_over_loop": ratio("stage_seconds"),
        "best_validation_percent": {way: each(way, "best_validation_percent") for way in ("pipeline", "loop")},
        "outside_seconds": {way: statistics.median(each(way, "outside_seconds")) for way in ("pipeline", "loop")},
        "outside_parts_seconds": {
            part: statistics.median(repeat["pipeline"]["outside_parts_seconds"][part] for repeat in repeats)
            for part in parts
        },
        "cached_seconds": statistics.median(each("pipeline", "cached_seconds")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--network", default="resnet20", help="one of the cifar: networks")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--json", type=Path, help="what was found is written to this file after each repeat")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/pipeline_overhead.py", *sys.argv[1:]])
    found: dict[str, Any] = {
        "machine": machine_record().model_dump(mode="json"),
        "git_revision": git_revision(REPOSITORY),
        "command": command,
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "precision_ran": resolved_precision(arguments.precision, "cpu"),
    }
    print(f"{command}\n{json.dumps(found['machine'])}", flush=True)
    repeats: list[dict[str, Any]] = []
    for number in range(arguments.repeats):
        repeats.append(one_repeat(number, arguments))
        print(json.dumps(repeats[-1]), flush=True)
        told = summary(repeats, arguments.epochs)
        if arguments.json:
            write_file(arguments.json, readable_json({**found, "summary": told, "measured": repeats}))
    print(json.dumps(told, indent=1), flush=True)


if __name__ == "__main__":
    main()
