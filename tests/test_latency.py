"""The latency harness on tiny models. Times are never asserted beyond a coarse order: the machine may be busy."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.bench import latency, latency_worker
from compress.bench.latency import Variant, measure
from compress.config.pipeline import LatencyConfig
from compress.errors import CompressError
from compress.events import Silent

QUICK = LatencyConfig(batch_sizes=(1,), threads=(1,), rounds=3, seconds=0.001)


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self):
        self.warnings = []
        self.steps = []

    def work(self, what, done, total, detail=""):
        self.steps.append((what, done, total))

    def warn(self, text):
        self.warnings.append(text)


def write_conv(path, batch="batch", channels=4, layers=1, height=8):
    """3×3 convolutions on `channels` × `height` × 12 images."""
    weight = np.random.default_rng(0).standard_normal((channels, channels, 3, 3)).astype(np.float32) / channels
    weights = [numpy_helper.from_array(weight, "weight")]
    nodes = [helper.make_node("Conv", [f"x{i}", "weight"], [f"x{i + 1}"], pads=[1] * 4) for i in range(layers)]
    return write_graph(path, nodes, TensorProto.FLOAT, [batch, channels, height, 12], weights)


def write_graph(path, nodes, element, shape, weights=()):
    """A chain of nodes from `x0` to `x{number of nodes}` that keeps type and shape."""
    ends = [helper.make_tensor_value_info(name, element, shape) for name in ("x0", f"x{len(nodes)}")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def write_double(path):
    """Takes float64."""
    return write_graph(path, [helper.make_node("Identity", ["x0"], ["x1"])], TensorProto.DOUBLE, ["batch", 3])


@pytest.fixture
def started(monkeypatch):
    """Every process that the harness starts."""
    processes = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(latency.subprocess, "Popen", Popen)
    return processes


def test_every_setting_gets_a_well_formed_record(tmp_path, started):
    path = write_conv(tmp_path / "a.onnx")
    config = LatencyConfig(batch_sizes=(1, 3), threads=(1, 2), rounds=3, seconds=0.001)
    progress = Recorder()
    results = measure([Variant("a", path, "fp32"), Variant("again", path, "int8")], config, progress)
    assert list(results) == ["a", "again"]
    for name, precision in (("a", "fp32"), ("again", "int8")):
        records = results[name]
        assert [(record.batch_size, record.threads) for record in records] == [(1, 1), (1, 2), (3, 1), (3, 2)]
        for record in records:
            assert 0 < record.low_ms <= record.median_ms <= record.high_ms
            assert record.median_ms <= record.p90_ms <= record.p99_ms
            assert record.runs >= config.rounds * latency_worker.LEAST_CALLS
            assert (record.precision, record.device, record.backend) == (precision, "cpu", "onnxruntime")
            assert record.provider == "CPUExecutionProvider"
    assert progress.steps == [("latency", done, 12) for done in range(13)]
    # A process per variant and setting, and none of them left.
    assert len(started) == 8
    assert all(process.poll() is not None for process in started)


def test_more_work_takes_longer(tmp_path):
    small = write_conv(tmp_path / "small.onnx", channels=16, height=16)
    large = write_conv(tmp_path / "large.onnx", channels=16, height=16, layers=50)
    results = measure([Variant("small", small, "fp32"), Variant("large", large, "fp32")], QUICK, Silent())
    assert results["large"][0].median_ms > 3 * results["small"][0].median_ms


def test_turns_rotate(tmp_path, monkeypatch):
    path = write_conv(tmp_path / "a.onnx")
    turns = []
    original = latency._Worker.measure

    def spy(worker, seconds):
        turns.append(worker.variant.name)
        original(worker, seconds)

    monkeypatch.setattr(latency._Worker, "measure", spy)
    measure([Variant(name, path, "fp32") for name in "abc"], QUICK, Silent())
    assert "".join(turns) == "abcbcacab"


def test_a_fixed_batch_is_measured_where_it_fits_and_named_where_not(tmp_path, started):
    fixed = write_conv(tmp_path / "fixed.onnx", batch=2)
    free = write_conv(tmp_path / "free.onnx")
    config = LatencyConfig(batch_sizes=(1, 2), threads=(1, 2), rounds=3, seconds=0.001)
    progress = Recorder()
    results = measure([Variant("fixed", fixed, "fp32"), Variant("free", free, "fp32")], config, progress)
    assert [(record.batch_size, record.threads) for record in results["fixed"]] == [(2, 1), (2, 2)]
    assert len(results["free"]) == 4
    assert [text for text in progress.warnings if "core(s)" not in text] == [
        "latency of 'fixed' at batch size 1 left out: the file only takes 2"
    ]
    assert all(process.poll() is not None for process in started)


def test_nothing_that_fits_gives_no_record(tmp_path):
    fixed = write_conv(tmp_path / "fixed.onnx", batch=2)
    assert measure([Variant("fixed", fixed, "fp32")], QUICK, Recorder()) == {"fixed": ()}
    assert measure([], QUICK, Recorder()) == {}


def test_more_threads_than_cores_warn(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "cores", lambda: 1)
    progress = Recorder()
    measure([], LatencyConfig(threads=(1, 2), rounds=3), progress)
    assert progress.warnings == [
        "latency with 2 threads on 1 core(s): the threads wait for each other, the numbers say little"
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no model"), "latency of 'bad': .*bad.onnx"),
        (lambda path: None, "latency of 'bad': .*bad.onnx"),
        (lambda path: write_conv(path, height="height"), "'bad': input 'x0' may leave only its first dimension open"),
        (write_double, "'bad': input 'x0' must be float32 or int64, .*double"),
    ],
    ids=["broken", "missing", "open height", "double"],
)
def test_a_model_that_cannot_be_measured_is_named(tmp_path, started, make, message):
    good, bad = write_conv(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    make(bad)
    with pytest.raises(CompressError, match=message) as caught:
        measure([Variant("good", good, "fp32"), Variant("bad", bad, "fp32")], QUICK, Silent())
    assert str(tmp_path) not in str(caught.value)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_an_interrupt_leaves_no_process(tmp_path, started):
    class Impatient(Silent):
        def work(self, what, done, total, detail=""):
            raise KeyboardInterrupt

    path = write_conv(tmp_path / "a.onnx")
    with pytest.raises(KeyboardInterrupt):
        measure([Variant("a", path, "fp32")], QUICK, Impatient())
    assert len(started) == 1
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('out of luck')", "ended with code 1: out of luck"),
        ("import os, sys; sys.stdin.readline(); os._exit(7)", "'a': its process ended with code 7$"),
        ("import time; time.sleep(60)", "'a': no answer for 1 s$"),
    ],
    ids=["dies at once", "dies while asked", "hangs"],
)
def test_a_worker_that_fails_is_named(tmp_path, monkeypatch, started, program, message):
    fake = tmp_path / "worker.py"
    fake.write_text(program)
    monkeypatch.setattr(latency, "_WORKER", fake)
    monkeypatch.setattr(latency, "PATIENCE_SECONDS", 1.0)
    with pytest.raises(CompressError, match=message):
        measure([Variant("a", tmp_path / "a.onnx", "fp32")], QUICK, Silent())
    assert started[0].poll() is not None


def test_a_killed_worker_is_named(tmp_path, started):
    class Killer(Silent):
        def work(self, what, done, total, detail=""):
            started[0].send_signal(signal.SIGKILL)
            started[0].wait()

    path = write_conv(tmp_path / "a.onnx")
    with pytest.raises(CompressError, match="latency of 'a': its process ended with code -9"):
        measure([Variant("a", path, "fp32")], QUICK, Killer())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to read another process's CPU time")
def test_a_worker_sleeps_after_its_turn(tmp_path):
    path = write_conv(tmp_path / "a.onnx", channels=32, height=32, layers=4)

    def cpu_seconds(pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with latency._Worker(Variant("a", path, "fp32"), threads=2) as worker:
        assert worker.load(1) is None
        worker.measure(0.05)
        before = cpu_seconds(worker._process.pid)
        time.sleep(0.1)
        # Without `settle` the second thread burns 20 to 45 ms here.
        assert cpu_seconds(worker._process.pid) - before <= 0.015


def loaded_modules(code):
    """Top-level modules beyond the standard library that running `code` loads."""
    show = "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True)
    return set(json.loads(shown.stdout.splitlines()[-1]))


def test_the_worker_imports_only_what_it_needs():
    allowed = loaded_modules("import numpy, onnxruntime")
    modules = loaded_modules("import compress.bench.latency_worker") - allowed
    foreign = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"compress", "compress.bench", "compress.bench.latency_worker"}
    assert "torch" not in allowed


def test_the_worker_speaks_its_protocol(tmp_path):
    """Run as a module, as its docstring says; errors are answers and do not end it."""
    path = str(write_conv(tmp_path / "a.onnx"))
    requests = [
        {"do": "measure", "seconds": 0.001},
        {"do": "load", "path": path, "threads": 1, "batch_size": 2},
        {"do": "dance"},
        {"do": "warm_up"},
        {"do": "measure", "seconds": 0.001},
        {"do": "quit"},
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, "-m", "compress.bench.latency_worker"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    *answers, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [{"error": "no model is loaded"}, {"fixed_batch": None}, {"error": "unknown request 'dance'"}, {}]
    assert len(last["nanoseconds"]) >= latency_worker.LEAST_CALLS
    assert sum(last["nanoseconds"]) >= 1e6
    assert min(last["nanoseconds"]) > 0


def test_warm_up_goes_on_until_the_calls_stop_getting_faster(monkeypatch):
    medians = [10, 8, 6, 5, 4.99, 4.98, 1]
    windows = iter(medians)
    monkeypatch.setattr(latency_worker, "sample", lambda call, seconds: [next(windows)])
    latency_worker.warm_up(lambda: None)
    assert list(windows) == [1]


def test_warm_up_ends_though_it_never_gets_steady(monkeypatch):
    medians = iter(0.9**i for i in range(1000))
    clock = iter(np.arange(1000) * 0.5)
    monkeypatch.setattr(latency_worker, "sample", lambda call, seconds: [next(medians)])
    monkeypatch.setattr(latency_worker.time, "monotonic", lambda: next(clock))
    latency_worker.warm_up(lambda: None)
    assert next(medians) == pytest.approx(0.9**3)
