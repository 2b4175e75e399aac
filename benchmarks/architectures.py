"""What the pipeline does to architectures that people bring: prune, factorize, quantize and export each, and time it.

Every network has random numbers in every parameter and every BatchNorm statistic, so that no zero and no one hides a
mistake, and is compressed without any training: what is measured is structure (what can be cut, bytes, MACs, time, and
whether the ONNX file does what the network does), never accuracy. Each architecture has a process of its own; one
that fails becomes a row with the reason. Rows that are in the JSON file already, made by the same code and settings,
are not made again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress import CompressError, load_pipeline, machine
from compress.events import Silent
from compress.files import canonical_json, readable_json, write_file
from compress.manifest import MODEL_ONNX
from compress.provenance import code_digest, versions
from compress.results import Results

Stage = Mapping[str, Mapping[str, Any]]
"""A stage as in a pipeline file: its name and its settings."""

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "architectures.json"
ARCHITECTURES: Mapping[str, int] = {
    "cifar:resnet20": 32,
    "torchvision:resnet18": 224,
    "torchvision:mobilenet_v2": 224,
    "torchvision:mobilenet_v3_small": 224,
    "torchvision:efficientnet_b0": 224,
    "torchvision:squeezenet1_1": 224,
    "torchvision:vgg11_bn": 224,
    "torchvision:densenet121": 224,
    "torchvision:convnext_tiny": 224,
    "torchvision:vit_b_16": 224,
    "timm:mobilenetv3_small_050": 224,
    "timm:vit_tiny_patch16_224": 224,
}
"""Factory, and height and width of its input in pixels."""
SAMPLES = {"train": 16, "validation": 32, "test": 8}
PRUNE: dict[str, Any] = {"target": {"macs": 0.5}, "recovery": None}
FACTORIZE: dict[str, Any] = {"target": {"macs": 0.8}, "recovery": None}
QUANTIZE: dict[str, Any] = {"calibration": {"samples": 8, "chunk": 8}}
# Logits of a random network lie so close together that 8 bits change many answers: that says nothing about the file.
EXPORT: dict[str, Any] = {"agreement": 0.0}
PIPELINES: Mapping[str, Sequence[Stage]] = {
    "unpruned": ({"quantize": QUANTIZE}, {"export": EXPORT}),
    "compressed": ({"prune": PRUNE}, {"factorize": FACTORIZE}, {"quantize": QUANTIZE}, {"export": EXPORT}),
}
LATENCY = {"batch_sizes": (1,), "threads": (2,), "rounds": 10, "seconds": 0.05}
WEIGHTS = "random.safetensors"


@dataclass(frozen=True)
class Compressed:
    """What became of a pipeline."""

    results: Results | None
    """None where not even the source could be measured."""
    failed: dict[str, str]
    """Reasons, by stage."""


class Watch(Silent):
    """Remembers which stage a run was in."""

    stage = "source"

    def stage_started(self, name: str, position: int, total: int, reason: str) -> None:  # noqa: ARG002
        """Keeps the name."""
        self.stage = name

    def stage_cached(self, name: str, position: int, total: int) -> None:  # noqa: ARG002
        """Keeps the name."""
        self.stage = name


def pictures(size: int, classes: int) -> dict[str, Any]:
    """Random images: what the pipelines of this script name as `data.callable`."""
    random = np.random.default_rng(0)
    splits = {
        # Few classes occur, so that each of them occurs in train.
        split: (random.integers(0, 256, (n, size, size, 3), dtype=np.uint8), np.arange(n) % min(4, classes))
        for split, n in SAMPLES.items()
    }
    return {**splits, "classes": [str(number) for number in range(classes)], "layout": "nhwc"}


def write_random_weights(factory: str, path: Path) -> None:
    """A state dict in which every parameter and every BatchNorm statistic is a random number of ordinary size."""
    from safetensors.torch import save_file

    from compress.methods.silence import randomise
    from compress.models.factory import Arch, create

    model = randomise(create(Arch(factory), seed=0))
    # Tied weights share memory, which safetensors refuses.
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)


def compressed(name: str, factory: str, size: int, stages: Sequence[Stage], folder: Path) -> Compressed:
    """Run a pipeline; a stage that fails is left out, with the reason, and the others are tried again.

    Args:
        name: of the pipeline file.
        factory: makes the network.
        size: height and width of its input, pixels.
        stages: as in a pipeline file.
        folder: holds its weights, and gets everything that is made.
    """
    from compress import run

    failed: dict[str, str] = {}
    left = list(stages)
    while True:
        document = {
            # One name for all pipelines of an architecture: they share the source's checkpoint.
            "name": "runs",
            "device": "cpu",
            "data": {
                "kind": "python",
                "callable": f"{Path(__file__).resolve()}:pictures",
                "kwargs": {"size": size, "classes": classes_of(factory)},
                "validation": {"from": "given"},
            },
            "model": {"factory": factory, "weights": str(folder / WEIGHTS)},
            "stages": left,
            "bench": {"batch_size": 8, "latency": None},  # all files are timed together afterwards
        }
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(document, indent=1))  # YAML takes JSON
        watch = Watch()
        try:
            return Compressed(run(load_pipeline(path), runs=folder, progress=watch), failed)
        except Exception as error:  # noqa: BLE001  # a table of what works must hold what does not, whatever it raises
            failed[watch.stage] = reason_of(error)
            remaining = [stage for stage in left if watch.stage not in stage]
            if len(remaining) == len(left):  # the source itself
                return Compressed(None, failed)
            left = remaining


def classes_of(factory: str) -> int:
    """How many classes a factory's network answers unless told otherwise."""
    return 10 if factory.startswith("cifar:") else 1000


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[0] if isinstance(error, CompressError) else f"{type(error).__name__}: {lines[0]}"


def summary(results: Results) -> dict[str, Any]:
    """What a run made of a network: the last float model and the int8 one."""
    floats = [row for row in results.rows if row.precision == "fp32" and row.stage != "export"][-1]
    quantized = next((row for row in results.rows if row.stage == "quantize"), None)
    told = {"macs", "parameters", "seconds", "notes", "warnings"}
    return {
        "macs": floats.macs,
        "parameters": floats.parameters,
        "fp32_bytes": floats.size_bytes,
        "int8_bytes": quantized.size_bytes if quantized else None,
        "fp32_max_error": results.artifact.max_error if results.artifact else None,
        "stages": {
            row.stage: {**row.model_dump(mode="json", include=told), "size_bytes": row.size_bytes}
            for row in results.rows
        },
    }


def files_of(results: Results, folder: Path) -> dict[str, Path]:
    """ONNX files of the last float model and of the int8 one, by precision."""
    from compress.bench.measure import MEASURED_ONNX

    checkpoints = {row.precision: row.checkpoint for row in results.rows if row.stage != "export"}
    names = {"fp32": MEASURED_ONNX, "int8": MODEL_ONNX}
    return {precision: folder / "runs" / checkpoint / names[precision] for precision, checkpoint in checkpoints.items()}


def make_row(factory: str, size: int, folder: Path) -> dict[str, Any]:
    """Everything about one architecture; runs in a process of its own."""
    started = time.perf_counter()
    if not (folder / WEIGHTS).is_file():
        write_random_weights(factory, folder / WEIGHTS)
    row = empty_row(factory, size)
    failed: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name, stages in PIPELINES.items():
        found = compressed(name, factory, size, stages, folder)
        failed |= {f"{name}: {stage}": why for stage, why in found.failed.items()}
        if found.results is None:
            break
        row[name] = summary(found.results)
        files |= {f"{name} {precision}": path for precision, path in files_of(found.results, folder).items()}
    if files:
        row["latency"] = timed(files, failed)
    return {**row, "failed": failed, "seconds": time.perf_counter() - started}


def empty_row(factory: str, size: int) -> dict[str, Any]:
    """What is known before anything has run."""
    return {"architecture": factory, "input_shape": [3, size, size], "classes": classes_of(factory)}


def timed(files: Mapping[str, Path], failed: dict[str, str]) -> dict[str, Any]:
    """Latency of all files of an architecture in alternating rounds, a process each."""
    from compress.bench.latency import Variant, measure
    from compress.config import LatencyConfig

    variants = [Variant(name, path, name.split()[1]) for name, path in files.items()]
    try:
        found = measure(variants, LatencyConfig.model_validate(LATENCY), Silent(), None)
    except CompressError as error:
        failed["latency"] = reason_of(error)
        return {}
    failed |= {f"latency: {one.name}": one.reason for one in found.missing}
    return {name: records[0].model_dump(mode="json") for name, records in found.latencies.items() if records}


def process_row(factory: str, size: int, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """The row of one architecture, made in a fresh process: its memory is given back, and its death is a row as well."""
    folder.mkdir(parents=True, exist_ok=True)
    answer, log = folder / "row.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", factory, str(size), str(folder)]
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, timeout=timeout_seconds, check=False, cwd=REPOSITORY
            ).returncode
            why = f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            why = f"not done after {timeout_seconds:.0f} s"
    if answer.is_file():
        row: dict[str, Any] = json.loads(answer.read_bytes())
        return row
    lines = log.read_text(errors="replace").strip().splitlines()
    return {**empty_row(factory, size), "failed": {"process": why + (f": {lines[-1]}" if lines else "")}}


def made_by() -> str:
    """Digest of all that may change a row: the package's code, this script's settings, and library versions."""
    modules = ["compress.pipeline", "compress.bench.latency", "compress.bench.latency_worker"]
    modules += [f"compress.stages.{name}" for name in ("prune", "factorize", "quantize", "export")]
    settings = {"pipelines": PIPELINES, "latency": LATENCY, "samples": SAMPLES}
    known = {name: number for module in modules for name, number in versions(module).items()}
    content = {"code": [code_digest(module) for module in modules], "versions": known, "settings": settings}
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def known_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run, by architecture."""
    if not path.is_file():
        return {}
    return {row["architecture"]: row for row in json.loads(path.read_bytes())["rows"]}


def write_results(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The JSON file with the rows in this script's order, and the machine."""
    libraries = ("onnxruntime", "torch", "torchvision", "timm", "torch-pruning", "onnx", "numpy")
    where = {
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "instruction_sets": sorted(machine.cpu_flags() & machine.INTERESTING_FLAGS),
        "versions": {name: machine.version(name) for name in libraries},
    }
    order = [*(name for name in ARCHITECTURES if name in rows), *(name for name in rows if name not in ARCHITECTURES)]
    settings = {"pipelines": PIPELINES, "latency": LATENCY}
    write_file(path, readable_json({"machine": where, "settings": settings, "rows": [rows[name] for name in order]}))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and below it what was left alone and what failed."""
    heads = ["architecture", "input", "parameters, M", "MACs, M", "fp32 file, MB", "int8 file, MB"]
    heads += ["ms before, fp32", "int8", "ms after, fp32", "int8", "faster", "largest error of fp32 file"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    for title, told in (("Cut and left alone", _left_alone), ("Failed", _failures)):
        entries = [f"- `{row['architecture']}`: {text}" for row in rows for text in told(row)]
        if entries:
            lines += ["", f"{title}:", "", *entries]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    before, after = row.get("unpruned") or {}, row.get("compressed") or {}
    latency = row.get("latency") or {}

    def both(key: str, places: int) -> str:
        return " → ".join(_number(part.get(key), places, 1e6) for part in (before, after))

    times = [
        latency.get(f"{which} {precision}", {}).get("median_ms")
        for which in PIPELINES
        for precision in ("fp32", "int8")
    ]
    errors = [part["fp32_max_error"] for part in (before, after) if part.get("fp32_max_error") is not None]
    return [
        f"`{row['architecture']}`{' *' if row['failed'] else ''}",
        "×".join(str(extent) for extent in row["input_shape"]),
        both("parameters", 2),
        both("macs", 1),
        both("fp32_bytes", 2),
        both("int8_bytes", 2),
        *(_number(time, 2) for time in times),
        f"{times[0] / times[-1]:.1f}×" if times[0] and times[-1] else "–",
        f"{max(errors):.0e}" if errors else "–",
    ]


def _number(value: float | None, places: int, unit: float = 1.0) -> str:
    return "–" if value is None else f"{value / unit:,.{places}f}"


def _left_alone(row: Mapping[str, Any]) -> list[str]:
    """What the stages that cut did, and said they could not."""
    stages = (row.get("compressed") or {}).get("stages", {})
    return [
        f"{name}: {text}"
        for name in ("prune", "factorize")
        if name in stages
        for text in (*stages[name]["notes"], *stages[name]["warnings"])
        if "validation" not in text
    ]


def _failures(row: Mapping[str, Any]) -> list[str]:
    return [f"{stage}: {why}" for stage, why in row["failed"].items()]


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="factories, such as timm:resnet18; with @SIZE for other pixels"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="rows are read from and written to this file")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "architectures", help="folder of the runs")
    parser.add_argument("--again", action="store_true", help="make rows anew that are there already")
    parser.add_argument("--timeout-seconds", type=float, default=3600.0, help="for one architecture")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        factory, size, folder = arguments.one
        write_file(Path(folder) / "row.json", readable_json(make_row(factory, int(size), Path(folder))))
        return
    chosen = ARCHITECTURES if arguments.only is None else dict(map(_with_size, arguments.only))
    rows, digest = known_rows(arguments.json), made_by()
    for factory, size in chosen.items():
        there = rows.get(factory, {})
        if there.get("made_by") == digest and not there["failed"] and not arguments.again:
            say(f"{factory}: there already")
            continue
        say(f"{factory} …")
        folder = arguments.work / factory.replace(":", "-")
        row = process_row(factory, size, folder, arguments.timeout_seconds)
        rows[factory] = {**row, "made_by": digest}
        write_results(arguments.json, rows)
        if row["failed"]:
            say(f"{factory}: {'; '.join(_failures(row))} (log and checkpoints: {folder})")
        else:
            shutil.rmtree(folder)
    say(markdown([rows[factory] for factory in chosen]))


def _with_size(name: str) -> tuple[str, int]:
    """'timm:resnet18@160' is (timm:resnet18, 160)."""
    factory, _, size = name.partition("@")
    return factory, int(size) if size else ARCHITECTURES.get(factory, 224)


if __name__ == "__main__":
    main()
