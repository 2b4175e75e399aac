"""Post-training int8 by us and by others: the same float ONNX file, the same calibration samples, timed side by side.

A quantizer is a function in `PEERS` that reads a `Task` and writes a file; another one is a line there. All of them begin with
the file that our converter writes, so that what differs is what they do with it. What is not installed, fails, or writes
a file that does not run is a row that says so. Latency is measured in one call for all files of a network: a process each,
in alternating rounds, at batch 1; a ratio above 1 is faster than fp32.

ResNet-18 and MobileNetV2 of torchvision have random weights and are calibrated and compared on random inputs: there, bytes
and times mean something, agreement and the error of the logits only say whether a file still computes the same; a random
network may answer one class whatever it sees, so the number of classes that fp32 answers stands beside. Accuracy is measured
of ResNet-56 with published weights for CIFAR-10, which `--weights` and `--data` bring.

    python benchmarks/peers.py --weights cifar10_resnet56.safetensors --data cifar10 --json peers.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.table import Table

from compress import machine
from compress.bench.accuracy import Evaluation, accuracy, compare, evaluate_in_onnx
from compress.bench.latency import Measured, Variant, measure, reasons
from compress.config import LatencyConfig
from compress.config.data import ArraysConfig, Normalize, Validation
from compress.data.base import Dataset, Input
from compress.data.load import load_data
from compress.data.splits import stratified_sample
from compress.errors import CompressError, first_line
from compress.events import Silent
from compress.files import readable_json, write_file
from compress.methods.silence import randomise
from compress.models.factory import Arch, create
from compress.models.source import make_model
from compress.onnx_io.convert import serialized, to_onnx
from compress.onnx_io.quantize import beyond_int8, collect_ranges, nodes_at, quantize, resolved_target
from compress.onnx_io.session import infer, open_session
from compress.surroundings import git_revision, machine_record
from compress.terminal.console import literal, make_console

REPOSITORY = Path(__file__).resolve().parent.parent
RANDOM = ("torchvision:resnet18", "torchvision:mobilenet_v2")
TRAINED = "cifar:resnet56"
SHAPE = (3, 224, 224)
PUBLISHED = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the published weights for CIFAR-10 were trained with."""
CHUNK = 32
"""Samples that go through a network at a time."""
FLOAT = "fp32"
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Task:
    """What a quantizer is given."""

    source: Path
    """The float ONNX file: one input (n, c, h, w), n dynamic."""
    samples: NDArray[np.float32]
    """For calibration, as the network takes them, (n, c, h, w)."""
    made: Path
    """Where the quantized file goes; its folder is the quantizer's own."""

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """The samples, some at a time."""
        return (self.samples[start : start + CHUNK] for start in range(0, len(self.samples), CHUNK))


class NotInstalledError(Exception):
    """A quantizer that is not here."""


class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base has no types
    """Calibration samples as ONNX Runtime's quantizer asks for them."""

    def __init__(self, task: Task) -> None:
        self._chunks, self._name = task.chunks(), input_name(task.source)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch; None after the last."""
        chunk = next(self._chunks, None)
        return None if chunk is None else {self._name: chunk}


def input_name(path: Path) -> str:
    """What an ONNX file calls its one input."""
    (given,) = onnx.load(path).graph.input
    return str(given.name)


def ours(task: Task) -> None:
    """What the stage `quantize` does."""
    graph = onnx.load(task.source)
    measured = collect_ranges(graph, ([chunk] for chunk in task.chunks()))
    beyond = beyond_int8(graph, measured)
    ranges = {tensor: pair for tensor, pair in measured.items() if tensor not in beyond}
    task.made.write_bytes(serialized(quantize(graph, ranges, resolved_target("auto"), list(nodes_at(graph, beyond)))))


def static_defaults(task: Task) -> None:
    """`quantize_static` as it comes: int8 activations and weights, one scale per tensor."""
    quantize_static(prepared(task), task.made, Reader(task))


def static_uint8_per_channel(task: Task) -> None:
    """`quantize_static` set to what we choose ourselves on x86: uint8 activations, int8 weights with a scale per channel."""
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(prepared(task), task.made, Reader(task), **options)


def prepared(task: Task) -> Path:
    """The file after ONNX Runtime's own preparation: shapes inferred, graph optimised."""
    path = task.made.with_name("prepared.onnx")
    quant_pre_process(task.source, path)
    return path


def dynamic_defaults(task: Task) -> None:
    """`quantize_dynamic` as it comes: int8 weights, ranges of activations found anew in each call."""
    quantize_dynamic(task.source, task.made)


def dynamic_uint8(task: Task) -> None:
    """`quantize_dynamic` with uint8 weights."""
    quantize_dynamic(task.source, task.made, weight_type=QuantType.QUInt8)


def nncf(task: Task) -> None:
    """`nncf.quantize` as it comes; all samples are used, one at a time."""
    need("nncf")
    import nncf

    name = input_name(task.source)
    samples = nncf.Dataset(list(task.samples), lambda sample: {name: sample[None]})
    onnx.save(nncf.quantize(onnx.load(task.source), samples, subset_size=len(task.samples)), task.made)


def neural_compressor(task: Task) -> None:
    """Static quantization by neural-compressor 2, as it comes. Never tried here: version 3 has no part for ONNX."""
    need("neural_compressor")
    need("neural_compressor.quantization", "installed, but its version quantizes no ONNX files")
    from neural_compressor import PostTrainingQuantConfig, quantization

    class Loader:
        batch_size = 1

        def __iter__(self) -> Iterator[tuple[NDArray[np.float32], int]]:
            return ((sample[None], 0) for sample in task.samples)

    config = PostTrainingQuantConfig(approach="static", calibration_sampling_size=[len(task.samples)])
    found = quantization.fit(str(task.source), config, calib_dataloader=Loader())
    if found is None:
        raise CompressError("neural-compressor gives no model")
    found.save(str(task.made))


def need(module: str, reason: str = NOT_INSTALLED) -> None:
    """Check that a module can be imported.

    Raises:
        NotInstalledError: where it is not there.
    """
    if importlib.util.find_spec(module) is None:
        raise NotInstalledError(reason)


PEERS: Mapping[str, Callable[[Task], None]] = {
    "compress": ours,
    "ORT static, defaults": static_defaults,
    "ORT static, uint8, per channel": static_uint8_per_channel,
    "ORT dynamic, defaults": dynamic_defaults,
    "ORT dynamic, uint8": dynamic_uint8,
    "NNCF": nncf,
    "neural-compressor": neural_compressor,
}
"""Quantizers by the name of their row."""


@dataclass(frozen=True)
class Network:
    """A float network, and what its files are calibrated with and judged by."""

    graph: onnx.ModelProto
    calibration: NDArray[np.float32]
    inputs: NDArray[np.float32]
    """What agreement is measured on, (n, c, h, w)."""
    data: Dataset | None = None
    """Real data with labels, whose test split then takes the place of `inputs`."""


def random_network(factory: str, arguments: argparse.Namespace) -> Network:
    """Random weights and statistics, random inputs."""
    model = randomise(create(Arch(factory), seed=0))
    random = np.random.default_rng(0)
    calibration, inputs = (
        random.standard_normal((n, *SHAPE), np.float32) for n in (arguments.samples, arguments.inputs)
    )
    return Network(to_onnx(model, [Input("input", SHAPE)]), calibration, inputs)


def trained_network(arguments: argparse.Namespace) -> Network:
    """Published weights; samples from the training images, stratified by class, as the stage `quantize` takes them."""
    settings = ArraysConfig(
        kind="arrays",
        root=arguments.data,
        normalize=PUBLISHED,
        # Nothing is decided here, so that no test image is given away for it.
        validation=Validation.model_validate({"from": "train", "size": 10}),
    )
    data = load_data(settings, seed=0)
    model = make_model(Arch(TRAINED), str(arguments.weights), seed=0)
    train, test = data.train, data.test
    chosen = train.take(stratified_sample(train.labels, arguments.samples, seed=0))
    calibration = np.concatenate([batch.arrays()[0] for batch in chosen.batches(CHUNK)])
    if arguments.test_samples is not None:
        test = test.take(stratified_sample(test.labels, arguments.test_samples, seed=0))
    data = Dataset(data.classes, data.inputs, train, data.validation, test)
    return Network(to_onnx(model, data.inputs), calibration, np.empty((0, *calibration.shape[1:]), np.float32), data)


def written(network: Network, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """The float file and what each quantizer makes of it; and rows with the seconds it took, or why there is no file."""
    files = {FLOAT: folder / "float.onnx"}
    files[FLOAT].write_bytes(serialized(network.graph))
    rows: dict[str, dict[str, Any]] = {FLOAT: {}}
    for number, (name, peer) in enumerate(PEERS.items()):
        own = folder / str(number)
        own.mkdir()
        task = Task(files[FLOAT], network.calibration, own / "quantized.onnx")
        started = time.perf_counter()
        try:
            peer(task)
            rows[name] = {"quantizing_seconds": time.perf_counter() - started}
            files[name] = task.made
        except NotInstalledError as why:
            rows[name] = {"failed": str(why)}
        except Exception as error:  # noqa: BLE001  # whatever a peer raises is its row
            rows[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return files, rows


def on_random_inputs(files: Mapping[str, Path], inputs: NDArray[np.float32]) -> dict[str, dict[str, Any]]:
    """How often each file answers as the float one, percent, and how far its logits are from its, relative."""
    rows: dict[str, dict[str, Any]] = {}
    expected = np.empty(0)
    for name, path in files.items():
        try:
            session = open_session(path, machine.cores())
            chunks = (inputs[start : start + CHUNK] for start in range(0, len(inputs), CHUNK))
            logits = np.concatenate([infer(session, [chunk]) for chunk in chunks]).astype(np.float64)
        except Exception as error:  # a file that does not run is a row
            if name == FLOAT:
                raise
            rows[name] = {"failed": first_line(error)}
            continue
        if name == FLOAT:
            expected = logits
            rows[name] = {"classes_answered": len(np.unique(logits.argmax(1)))}
            continue
        error_norm = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        rows[name] = {
            "agreement_percent": 100.0 * float((logits.argmax(1) == expected.argmax(1)).mean()),
            "logits_error": error_norm if math.isfinite(error_norm) else None,
        }
    return rows


def on_test(files: Mapping[str, Path], data: Dataset) -> dict[str, dict[str, Any]]:
    """Accuracy of each file on the test split, and the paired difference from the float one."""
    labels = data.test.labels.numpy()
    rows: dict[str, dict[str, Any]] = {}
    reference: Evaluation | None = None
    for name, path in files.items():
        try:
            found = evaluate_in_onnx(path, data.test, len(data.classes), 8 * CHUNK, machine.cores(), Silent())
        except CompressError as error:
            if name == FLOAT:
                raise
            rows[name] = {"failed": first_line(error)}
            continue
        reference = reference or found
        rows[name] = {"accuracy": accuracy(found.answers.classes == labels).model_dump(mode="json")}
        if found is not reference:
            difference = compare(labels, reference.answers.classes, found.answers.classes)
            rows[name] |= {
                "difference": difference.model_dump(mode="json"),
                "agreement_percent": difference.agreement,
            }
    return rows


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network."""
    network = trained_network(arguments) if name == TRAINED else random_network(name, arguments)
    config = LatencyConfig(threads=tuple(arguments.threads), rounds=arguments.rounds, seconds=arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        files, rows = written(network, Path(folder))
        judged = on_random_inputs(files, network.inputs) if network.data is None else on_test(files, network.data)
        for peer, path in files.items():
            rows[peer] |= {"bytes": path.stat().st_size, **judged[peer]}
        able = {peer: path for peer, path in files.items() if "failed" not in rows[peer]}
        variants = [Variant(peer, path, "fp32" if peer == FLOAT else "int8") for peer, path in able.items()]
        found = measure(variants, config, Silent(), FLOAT)
    for peer in able:
        rows[peer]["latency"] = [latency.model_dump(mode="json") for latency in found.latencies[peer]]
    return {
        "calibration_samples": len(network.calibration),
        "judged_on": f"{len(network.inputs)} random inputs"
        if network.data is None
        else f"{len(network.data.test)} test",
        "target": resolved_target("auto").name,
        "latency": config.model_dump(mode="json"),
        "repeats": [repeat.model_dump(mode="json") for repeat in found.repeats],
        "missing": not_measured(found),
        "rows": rows,
    }


def not_measured(found: Measured) -> list[str]:
    """What has no latency and why, in words."""
    return list(reasons(found.missing))


def table_of(name: str, found: Mapping[str, Any]) -> Table:
    """The rows for people."""
    title = f"{name}: calibrated with {found['calibration_samples']} samples, judged on {found['judged_on']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    threads = found["latency"]["threads"]
    judged = "test %" if any("accuracy" in row for row in found["rows"].values()) else "logits' error"
    headings = ["quantizer", "bytes", *(f"ms, {count} thr." for count in threads)]
    for heading in (*headings, *(f"faster, {count} thr." for count in threads), "agreement %", judged, ""):
        table.add_column(heading, justify="left" if heading in ("quantizer", "") else "right")
    for peer, row in found["rows"].items():
        times = {latency["threads"]: latency for latency in row.get("latency", ())}
        ratios = {count: latency["ratio"] for count, latency in times.items()}
        table.add_row(
            peer,
            f"{row['bytes']:,}" if "bytes" in row else "—",
            *(f"{times[count]['median_ms']:.3f}" if count in times else "—" for count in threads),
            *(interval(ratios.get(count)) for count in threads),
            f"{row['agreement_percent']:.2f}" if "agreement_percent" in row else "—",
            quality_of(row),
            literal(remark(row)),
        )
    return table


def interval(ratio: Mapping[str, float] | None) -> str:
    """A ratio with its 95 % interval."""
    return "—" if ratio is None else f"{ratio['value']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def quality_of(row: Mapping[str, Any]) -> str:
    """Accuracy where it was measured, else the error of the logits."""
    if "accuracy" in row:
        return f"{row['accuracy']['percent']:.2f}"
    return f"{row['logits_error']:.3f}" if row.get("logits_error") is not None else "—"


def remark(row: Mapping[str, Any]) -> str:
    """What else a row says."""
    if "classes_answered" in row:
        return f"{row['classes_answered']} classes answered"
    return str(row.get("failed", ""))[:100]


def chosen_networks(arguments: argparse.Namespace) -> Sequence[str]:
    """Those asked for; the trained one only with its weights and data.

    Raises:
        CompressError: where the trained one is asked for without them.
    """
    has_files = arguments.weights is not None and arguments.data is not None
    if arguments.networks is None:
        return (*RANDOM, TRAINED) if has_files else RANDOM
    if TRAINED in arguments.networks and not has_files:
        raise CompressError(f"{TRAINED} needs --weights and --data")
    return list(arguments.networks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=(*RANDOM, TRAINED))
    parser.add_argument("--weights", type=Path, help=f"of {TRAINED} for CIFAR-10, .safetensors or .pth")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as arrays: train_images.npy and so on")
    parser.add_argument("--samples", type=int, default=256, help="for calibration")
    parser.add_argument("--inputs", type=int, default=256, help="random inputs that agreement is measured on")
    parser.add_argument("--test-samples", type=int, help="test images that accuracy is measured on; all if left out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=LatencyConfig().rounds)
    parser.add_argument("--seconds", type=float, default=LatencyConfig().seconds, help="per file and round")
    parser.add_argument(
        "--json", type=Path, help="networks are added to this file, which begins anew on another machine"
    )
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # quantizers give advice
    networks = chosen_networks(arguments)
    peers = {name: machine.version(name) for name in ("nncf", "neural-compressor")}
    here = {**machine_record().model_dump(mode="json"), "peers": peers}
    # Files are the user's own: where they lie is nobody else's business.
    command = shlex.join(["python", "benchmarks/peers.py", *map(placeless, sys.argv[1:])])
    known = json.loads(arguments.json.read_bytes()) if arguments.json and arguments.json.is_file() else {}
    all_found: dict[str, Any] = known["networks"] if known.get("machine") == here else {}
    console = make_console()
    for name in networks:
        found = measured(name, arguments)
        all_found[name] = {"command": command, "git_revision": git_revision(REPOSITORY), **found}
        console.print(table_of(name, found))
        for repeat in found["repeats"]:
            noisy = ", too noisy to tell 5 %" if repeat["is_noisy"] else ""
            console.print(
                f"fp32 against itself, {repeat['threads']} thr.: {interval(repeat['ratio'])}{noisy}", markup=False
            )
        for text in found["missing"]:
            console.print(text, markup=False)
        if arguments.json:
            write_file(arguments.json, readable_json({"machine": here, "networks": all_found}))


def placeless(argument: str) -> str:
    """The last part of an absolute path, also in `--option=path`; anything else as it is."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


if __name__ == "__main__":
    main()
