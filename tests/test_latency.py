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
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compress.bench import latency, latency_process, latency_worker
from compress.bench.backends.base import Task, by_the_clock
from compress.bench.latency import Variant, measure, order, reasons
from compress.bench.latency_process import WorkerProcess
from compress.config.pipeline import LatencyConfig
from compress.events import Silent
from compress.measured import NotMeasured
from compress.methods.statistics import is_noisy_repeat

QUICK = LatencyConfig(batch_sizes=(1,), threads=(1,), rounds=6, seconds=0.001)


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self):
        self.warnings = []
        self.steps = []

    def work(self, what, done, total, detail=""):
        self.steps.append((what, done, total, detail))

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


def write_identity(path, element):
    return write_graph(path, [helper.make_node("Identity", ["x0"], ["x1"])], element, ["batch", 3])


def task(path, threads=1, **changes):
    settings = {"backend": "onnxruntime", "device": "cpu", "compute": "", "precision": "fp32", "checkpoint": None}
    settings |= {"path": str(path), "trusted": (), "batch_size": 1, "threads": threads}
    return Task(**settings | changes)


@pytest.fixture
def started(monkeypatch):
    """Every process that the harness starts."""
    processes = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(latency_process.subprocess, "Popen", Popen)
    return processes


PLANTED = """
import json, os, random, subprocess, sys, time
from pathlib import Path

answers, rounds = sys.stdout, 0
for line in sys.stdin:
    request = json.loads(line)
    answer = {}
    if request["do"] == "prepare":
        path = Path(request["task"]["path"])
        stem = path.stem
        if stem == "absent":
            answer = {"error": "nothing of it is here", "is_unavailable": True}
    elif request["do"] == "load":
        answer = {"provider": "planted", "precision": "fp32", "cold_start_ns": 5_000_000}
        if stem == "refused":
            answer = {"error": "no such model", "is_unavailable": False}
        if stem == "once" and not path.exists():
            path.touch()
            answer = {"error": "no memory left", "is_unavailable": False}
    elif request["do"] == "memory":
        answer = {"peak_bytes": None}
    elif request["do"] == "measure":
        rounds += 1
        if stem == "dies" and rounds == 2:
            print("out of luck", file=sys.stderr)
            os._exit(7)
        if stem == "hangs" and rounds == 2:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            path.with_suffix(".pid").write_text(str(child.pid))
            time.sleep(60)
        # A machine that is up to seven times slower in some rounds than in others; or one on which nothing holds.
        drift = random.Random(os.getpid() + rounds).uniform(1, 8) if stem == "noise" else 1 + rounds * 5 % 7
        factor = 1.0 if stem in ("noise", "dies", "hangs") else float(stem)
        answer = {"nanoseconds": [round(1e6 * factor * drift)] * 5}
    print(json.dumps(answer), file=answers, flush=True)
"""
"""A worker whose times are known: the name of the file says how many times longer its calls take than a millisecond."""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """`measure` on such workers: it takes names of files and tells what it found, and a `Recorder`."""
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    monkeypatch.setattr(latency_process, "START", program)

    def run(*stems, config=QUICK, reference=None, **settings):
        variants = [Variant(stem, tmp_path / f"{stem}.onnx", "fp32", **settings) for stem in stems]
        progress = Recorder()
        return measure(variants, config, progress, reference), progress

    return run


ROUNDS = LatencyConfig(batch_sizes=(1,), threads=(1,), rounds=10, seconds=0.001)


def test_every_setting_gets_a_well_formed_record(tmp_path, started):
    path = write_conv(tmp_path / "a.onnx")
    config = LatencyConfig(batch_sizes=(1, 3), threads=(1, 2), rounds=6, seconds=0.001)
    progress = Recorder()
    found = measure([Variant("a", path, "fp32"), Variant("again", path, "int8")], config, progress)
    assert list(found.latencies) == ["a", "again"]
    assert found.missing == ()
    settings = [(1, 1), (1, 2), (3, 1), (3, 2)]
    for name, precision in (("a", "fp32"), ("again", "int8")):
        records = found.latencies[name]
        assert [(record.batch_size, record.threads) for record in records] == settings
        for record in records:
            assert 0 < record.low_ms <= record.median_ms <= record.high_ms
            assert record.median_ms <= record.p90_ms <= record.p99_ms
            assert record.runs >= config.rounds * latency_worker.LEAST_CALLS
            assert (record.precision, record.device, record.backend) == (precision, "cpu", "onnxruntime")
            assert record.provider == "CPUExecutionProvider"
            assert record.samples_per_second == pytest.approx(1000 * record.batch_size / record.median_ms)
            # Making a session takes milliseconds and more; numpy and ONNX Runtime alone take tens of megabytes.
            assert 0.1 < record.cold_start_ms < 60_000
            assert 20e6 < record.peak_memory_bytes < 2e9
    assert all(record.ratio is None for record in found.latencies["a"])
    for ratio in [record.ratio for record in found.latencies["again"]]:
        assert ratio.against == "a"
        assert 0 < ratio.low <= ratio.value <= ratio.high
    assert [(repeat.batch_size, repeat.threads) for repeat in found.repeats] == settings
    for repeat in found.repeats:
        assert (repeat.name, repeat.device, repeat.backend, repeat.precision) == ("a", "cpu", "onnxruntime", "fp32")
        assert repeat.ratio.against == "a"
        assert repeat.is_noisy == is_noisy_repeat(repeat.ratio.low, repeat.ratio.high)
    assert [step[:3] for step in progress.steps if "loading" not in step[3]] == [
        ("latency", done, 24) for done in range(25)
    ]
    # A process per variant and setting, one more for the reference, and none of them left.
    assert len(started) == 12
    assert all(process.poll() is not None for process in started)


def test_more_work_takes_longer(tmp_path):
    small = write_conv(tmp_path / "small.onnx", channels=16, height=16)
    large = write_conv(tmp_path / "large.onnx", channels=16, height=16, layers=50)
    found = measure([Variant("small", small, "fp32"), Variant("large", large, "fp32")], QUICK, Silent()).latencies
    assert found["large"][0].median_ms > 3 * found["small"][0].median_ms
    assert found["large"][0].ratio.value < 1 / 3


def test_memory_is_that_of_the_worker_and_not_of_its_parent(tmp_path):
    ballast = np.ones(40_000_000)
    path = write_conv(tmp_path / "a.onnx")
    (record,) = measure([Variant("a", path, "fp32")], QUICK, Silent()).latencies["a"]
    assert record.peak_memory_bytes < ballast.nbytes


def test_more_memory_shows(tmp_path):
    weight = numpy_helper.from_array(np.zeros((3, 8_000_000), np.float32), "weight")
    nodes = [helper.make_node("MatMul", ["x0", "weight"], ["y"]), helper.make_node("ReduceMax", ["y"], ["x1"])]
    path = tmp_path / "large.onnx"
    write_graph(path, nodes, TensorProto.FLOAT, ["batch", 3], [weight])
    proto = onnx.load(path)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("x1", TensorProto.FLOAT, None))
    onnx.save(proto, path)
    small = write_conv(tmp_path / "small.onnx")
    found = measure([Variant("small", small, "fp32"), Variant("large", path, "fp32")], QUICK, Silent()).latencies
    # The weights alone are 96 MB.
    assert found["large"][0].peak_memory_bytes > found["small"][0].peak_memory_bytes + 80e6


@given(st.integers(1, 9), st.integers(0, 60))
def test_every_round_is_a_permutation(runners, turn):
    assert sorted(order(runners, turn)) == list(range(runners))


@given(st.integers(1, 9))
def test_orders_are_balanced(runners):
    """Of two rounds in a row each of two runners comes first once; over all of them each opens as often as another."""
    turns = [order(runners, turn) for turn in range(2 * runners)]
    for one, other in zip(turns[::2], turns[1::2], strict=True):
        assert other == one[::-1]
    assert sorted(turn[0] for turn in turns) == sorted(2 * list(range(runners)))


def test_nobody_has_no_order():
    assert order(0, 3) == []


def test_the_processes_take_turns(tmp_path, monkeypatch):
    path = write_conv(tmp_path / "a.onnx")
    turns = []
    original = WorkerProcess.ask

    def spy(process, what, seconds=0.0):
        if what == "measure":
            turns.append(id(process))
        return original(process, what, seconds)

    monkeypatch.setattr(WorkerProcess, "ask", spy)
    measure([Variant(name, path, "fp32") for name in "ab"], QUICK, Silent())
    positions = {process: position for position, process in enumerate(turns[:3])}
    assert [positions[process] for process in turns] == [place for turn in range(6) for place in order(3, turn)]


def test_ratios_are_taken_round_by_round(planted):
    """The machine drifts by a factor of seven; the ratio does not."""
    found, progress = planted("1.0", "1.1", "0.5", config=ROUNDS)
    slow, fast = (found.latencies[name][0] for name in ("1.1", "0.5"))
    for record, ratio in ((slow, 1 / 1.1), (fast, 2.0)):
        assert record.ratio.against == "1.0"
        assert (record.ratio.low, record.ratio.value, record.ratio.high) == pytest.approx((ratio, ratio, ratio))
    # Medians alone could not tell the slow one from the reference.
    assert slow.low_ms < found.latencies["1.0"][0].median_ms < slow.high_ms
    (repeat,) = found.repeats
    assert repeat.ratio.value == pytest.approx(1.0)
    assert not repeat.is_noisy
    assert progress.warnings == []
    # None of the calls is thrown away, and the slowest show.
    assert (slow.runs, slow.p99_ms) == (50, pytest.approx(1.1 * 7))
    assert (slow.cold_start_ms, slow.peak_memory_bytes, slow.provider) == (5.0, None, "planted")


def test_the_reference_may_be_any_of_them(planted):
    found, _ = planted("1.0", "2.0", reference="2.0")
    assert found.latencies["2.0"][0].ratio is None
    assert found.latencies["1.0"][0].ratio.value == pytest.approx(2.0)
    assert [repeat.name for repeat in found.repeats] == ["2.0"]


def test_ratios_stay_within_a_backend(tmp_path, planted):
    variants = [
        Variant(stem, tmp_path / f"{stem}.onnx", "fp32", backend=backend)
        for stem, backend in [("1.0", "onnxruntime"), ("3.0", "openvino"), ("2.0", "onnxruntime"), ("1.0", "openvino")]
    ]
    found = measure(variants, QUICK, Silent())
    told = {
        (name, record.backend): record.ratio and pytest.approx(record.ratio.value)
        for name, records in found.latencies.items()
        for record in records
    }
    assert told == {
        ("1.0", "onnxruntime"): None,
        ("1.0", "openvino"): None,
        ("2.0", "onnxruntime"): 0.5,
        ("3.0", "openvino"): 1 / 3,
    }
    assert [(repeat.name, repeat.backend) for repeat in found.repeats] == [("1.0", "onnxruntime"), ("1.0", "openvino")]


def against(found):
    """By name of a variant, what each of its rows is compared with and how that comes out."""
    return {
        name: [record.ratio and (record.ratio.against, round(record.ratio.value, 3)) for record in records]
        for name, records in found.latencies.items()
    }


def test_a_backend_without_the_reference_compares_with_its_first(tmp_path, planted):
    variants = [
        Variant("1.0", tmp_path / "1.0.onnx", "fp32"),
        Variant("2.0", tmp_path / "2.0.onnx", "fp32", backend="openvino"),
        Variant("4.0", tmp_path / "4.0.onnx", "fp32", backend="openvino"),
    ]
    found = measure(variants, QUICK, Silent())
    assert against(found) == {"1.0": [None], "2.0": [None], "4.0": [("2.0", 0.5)]}
    assert [(repeat.backend, repeat.name) for repeat in found.repeats] == [("onnxruntime", "1.0"), ("openvino", "2.0")]


def test_a_reference_that_its_backend_never_runs_is_replaced_there(tmp_path, planted):
    """PyTorch gets a bare file first, then two checkpoints."""
    first = {"name": "1.0", "path": tmp_path / "1.0.onnx", "precision": "fp32"}
    others = [
        {"name": stem, "path": tmp_path / f"{stem}.onnx", "precision": "fp32", "checkpoint": tmp_path}
        for stem in ("2.0", "4.0")
    ]
    variants = [Variant(**each, backend=backend) for backend in ("onnxruntime", "torch") for each in (first, *others)]
    found = measure(variants, QUICK, Silent())
    assert against(found) == {
        "1.0": [None],
        "2.0": [("1.0", 0.5), None],
        "4.0": [("1.0", 0.25), ("2.0", 0.5)],
    }
    assert [(repeat.backend, repeat.name) for repeat in found.repeats] == [("onnxruntime", "1.0"), ("torch", "2.0")]
    assert [(each.name, each.backend) for each in found.missing] == [("1.0", "torch")]


def test_types_on_a_device_are_compared_among_themselves(tmp_path, planted):
    variants = [
        Variant(stem, tmp_path / f"{stem}.onnx", "fp32", tmp_path, device="cuda", backend="torch", compute=compute)
        for stem, compute in [("1.0", ""), ("2.0", ""), ("2.0", "fp16"), ("4.0", "fp16"), ("4.0", "bf16")]
    ]
    found = measure(variants, QUICK, Silent(), "1.0")
    assert against(found) == {"1.0": [None], "2.0": [("1.0", 0.5), None], "4.0": [("2.0", 0.5), None]}
    assert [repeat.name for repeat in found.repeats] == ["1.0", "2.0", "4.0"]


@pytest.mark.parametrize("reference", ["refused", "absent"])
def test_a_reference_that_does_not_load_is_replaced(planted, started, reference):
    found, progress = planted(reference, "2.0", "4.0", config=ROUNDS)
    assert against(found) == {reference: [], "2.0": [None], "4.0": [("2.0", 0.5)]}
    assert [(repeat.name, repeat.ratio.against) for repeat in found.repeats] == [("2.0", "2.0")]
    assert [each.name for each in found.missing] == [reference]
    assert progress.warnings == []
    assert len(started) == 5  # the three, the reference's repeat, and that of the one in its place
    assert all(process.poll() is not None for process in started)


def test_a_noisy_machine_is_said_to_be_one(planted):
    config = LatencyConfig(batch_sizes=(1, 2), threads=(1,), rounds=10, seconds=0.001)
    found, progress = planted("noise", "1.0", config=config)
    assert [repeat.is_noisy for repeat in found.repeats] == [True, True]
    # One line for each setting, with how far the two seemed apart.
    assert len(progress.warnings) == 2
    for repeat, text in zip(found.repeats, progress.warnings, strict=True):
        percent = 100 * (max(repeat.ratio.high, 1 / repeat.ratio.low) - 1)
        assert f"onnxruntime on cpu, batch size {repeat.batch_size}, 1 thread: this machine is too noisy" in text
        assert f"differences under {percent:.0f} % apart ('noise' against itself: {repeat.ratio.value:.3f}×" in text


def test_one_that_dies_is_missing_and_the_others_go_on(planted, started):
    found, _ = planted("1.0", "dies", "2.0", config=ROUNDS)
    assert found.latencies["dies"] == ()
    assert found.latencies["2.0"][0].ratio.value == pytest.approx(0.5)
    assert found.missing == (
        NotMeasured(
            name="dies",
            device="cpu",
            backend="onnxruntime",
            precision="fp32",
            batch_size=1,
            threads=1,
            reason="its process ended with code 7: out of luck",
        ),
    )
    assert all(process.poll() is not None for process in started)


def test_the_repeat_of_a_reference_that_does_not_load_goes_with_it(planted, started):
    """The second process of `once` would load."""
    found, _ = planted("once", "2.0", "4.0", config=ROUNDS)
    assert against(found) == {"once": [], "2.0": [None], "4.0": [("2.0", 0.5)]}
    assert [(repeat.name, repeat.ratio.value) for repeat in found.repeats] == [("2.0", pytest.approx(1.0))]
    assert [(each.name, each.reason) for each in found.missing] == [("once", "no memory left")]
    assert len(started) == 5
    assert all(process.poll() is not None for process in started)


def test_a_reference_that_ends_in_the_middle_is_not_replaced(planted):
    found, progress = planted("dies", "2.0", config=ROUNDS)
    assert found.latencies["2.0"][0].ratio is None
    assert found.repeats == ()
    assert [each.name for each in found.missing] == ["dies"]
    assert progress.warnings == []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look for another process")
def test_one_that_hangs_is_ended_with_what_it_started(tmp_path, planted, started, monkeypatch):
    monkeypatch.setattr(latency_process, "PATIENCE_SECONDS", 3.0)
    found, _ = planted("1.0", "hangs")
    assert [(each.name, each.reason) for each in found.missing] == [("hangs", "no answer for 3 s")]
    assert len(found.latencies["1.0"]) == 1
    assert all(process.poll() is not None for process in started)
    child = int((tmp_path / "hangs.pid").read_text())
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_backend_that_is_not_there_is_tried_once(planted, started):
    config = LatencyConfig(batch_sizes=(1, 2), threads=(1, 2), rounds=6, seconds=0.001)
    found, _ = planted("absent", config=config)
    assert found.latencies == {"absent": ()}
    assert [(each.batch_size, each.threads) for each in found.missing] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert {each.reason for each in found.missing} == {"nothing of it is here"}
    assert len(started) == 2  # itself and its repeat, in the first setting


def test_what_one_setting_refuses_is_tried_in_the_next(planted, started):
    config = LatencyConfig(batch_sizes=(1,), threads=(1, 2), rounds=6, seconds=0.001)
    found, _ = planted("1.0", "refused", config=config)
    assert [(each.name, each.threads, each.reason) for each in found.missing] == [
        ("refused", 1, "no such model"),
        ("refused", 2, "no such model"),
    ]
    assert len(found.latencies["1.0"]) == 2
    assert len(started) == 6


def test_reasons_are_told_once_for_all_settings():
    def row(name, batch_size, threads, reason):
        setting = {"device": "cpu", "backend": "onnxruntime", "precision": "fp32"}
        return NotMeasured(name=name, batch_size=batch_size, threads=threads, reason=reason, **setting)

    rows = [row("a", 1, 1, "too large"), row("a", 1, 2, "too large"), row("b", 1, 1, "gone"), row("a", 8, 1, "gone")]
    assert reasons(rows) == (
        "no latency of 'a' in onnxruntime on cpu (batch size 1, 1 thread; batch size 1, 2 threads): too large",
        "no latency of 'b' in onnxruntime on cpu (batch size 1, 1 thread): gone",
        "no latency of 'a' in onnxruntime on cpu (batch size 8, 1 thread): gone",
    )
    assert reasons([]) == ()


def test_a_fixed_batch_is_measured_where_it_fits_and_named_where_not(tmp_path, started):
    fixed = write_conv(tmp_path / "fixed.onnx", batch=2)
    free = write_conv(tmp_path / "free.onnx")
    config = LatencyConfig(batch_sizes=(1, 2), threads=(1,), rounds=6, seconds=0.001)
    found = measure([Variant("fixed", fixed, "fp32"), Variant("free", free, "fp32")], config, Recorder())
    assert [(record.batch_size, record.threads) for record in found.latencies["fixed"]] == [(2, 1)]
    assert len(found.latencies["free"]) == 2
    assert [(each.name, each.batch_size, each.reason) for each in found.missing] == [
        ("fixed", 1, "the file only takes batch size 2; use --batch-size 2 (in a pipeline bench.latency.batch_sizes)")
    ]
    # Where it cannot run the other is compared with itself, where it can with it.
    assert [(repeat.name, repeat.batch_size) for repeat in found.repeats] == [("free", 1), ("fixed", 2)]
    assert [record.ratio and record.ratio.against for record in found.latencies["free"]] == [None, "fixed"]
    assert all(process.poll() is not None for process in started)


def test_nothing_that_fits_gives_no_record(tmp_path):
    fixed = write_conv(tmp_path / "fixed.onnx", batch=2)
    found = measure([Variant("fixed", fixed, "fp32")], QUICK, Recorder())
    assert (found.latencies, found.repeats) == ({"fixed": ()}, ())
    nothing = measure([], QUICK, Recorder())
    assert (nothing.latencies, nothing.repeats, nothing.missing) == ({}, (), ())


def test_more_threads_than_cores_warn(monkeypatch):
    monkeypatch.setattr(latency, "cores", lambda: 1)
    progress = Recorder()
    measure([], LatencyConfig(threads=(1, 2), rounds=6), progress)
    assert progress.warnings == [
        "latency with 2 threads on 1 core(s): the threads wait for each other, the numbers say little"
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"no model"), "bad.onnx"),
        (lambda path: None, "bad.onnx"),
        (lambda path: write_conv(path, height="height"), "['batch', 4, 'height', 12]: give --shape x0=4x224x12,"),
        (lambda path: write_identity(path, TensorProto.STRING), "input 'x0' must hold numbers, it is string"),
    ],
    ids=["broken", "missing", "open height", "strings"],
)
def test_a_model_that_cannot_be_measured_is_a_row_with_the_reason(tmp_path, started, make, reason):
    good, bad = write_conv(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    make(bad)
    found = measure([Variant("good", good, "fp32"), Variant("bad", bad, "fp32")], QUICK, Silent())
    assert len(found.latencies["good"]) == 1
    (missing,) = found.missing
    assert missing.name == "bad"
    assert reason in missing.reason
    assert "\n" not in missing.reason
    assert str(tmp_path) not in missing.reason
    assert len(started) == 3
    assert all(process.poll() is not None for process in started)


def test_open_sizes_are_measured_at_the_shapes_given(tmp_path):
    path = write_conv(tmp_path / "a.onnx", channels=16, height="height", layers=20)

    def variant(name, **shapes):
        return Variant(name, path, "fp32", shapes=shapes)

    variants = [variant("low", x0=(16, 4, 12)), variant("high", x0=(16, 160, 12))]
    variants += [
        variant("another channel", x0=(4, 8, 12)),
        variant("misspelt", x=(16, 8, 12)),
        variant("flat", x0=(16, 8)),
    ]
    found = measure(variants, QUICK, Silent())
    (low,), (high,) = found.latencies["low"], found.latencies["high"]
    assert high.median_ms > 3 * low.median_ms
    ending = "must be 16x?x12, with any size from 1 in the place of '?'"
    assert [(each.name, each.reason) for each in found.missing] == [
        ("another channel", f"input 'x0' cannot have the shape 4x8x12: without the batch it {ending}"),
        ("misspelt", "no input is called 'x'; the model takes 'x0'"),
        ("flat", f"input 'x0' cannot have the shape 16x8: without the batch it {ending}"),
    ]
    assert len({*variants, variant("low", x0=(16, 4, 12))}) == len(variants)


@pytest.mark.parametrize("element", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.BOOL])
def test_other_peoples_inputs(tmp_path, element):
    path = write_identity(tmp_path / "a.onnx", element)
    with WorkerProcess(task(path)) as process:
        process.start()
        process.prepared()
        assert process.ask("load")["provider"] == "CPUExecutionProvider"


def test_an_interrupt_leaves_no_process(tmp_path, started):
    class Impatient(Silent):
        def work(self, what, done, total, detail=""):
            if "loading" not in detail:
                raise KeyboardInterrupt

    path = write_conv(tmp_path / "a.onnx")
    with pytest.raises(KeyboardInterrupt):
        measure([Variant("a", path, "fp32")], QUICK, Impatient())
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("program", "patience", "reason"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('out of luck')", 60, "ended with code 1: out of luck"),
        ("import os, sys; sys.stdin.readline(); os._exit(7)", 60, "its process ended with code 7"),
        ("import time; time.sleep(60)", 1, "no answer for 1 s"),
    ],
    ids=["dies at once", "dies while asked", "hangs"],
)
def test_a_worker_that_fails_is_named(tmp_path, monkeypatch, started, program, patience, reason):
    fake = tmp_path / "worker.py"
    fake.write_text(program)
    monkeypatch.setattr(latency_process, "START", fake)
    monkeypatch.setattr(latency_process, "PATIENCE_SECONDS", float(patience))
    (missing,) = measure([Variant("a", tmp_path / "a.onnx", "fp32")], QUICK, Silent()).missing
    assert missing.name == "a"
    assert missing.reason.endswith(reason)
    assert all(process.poll() is not None for process in started)


def test_a_killed_worker_is_named(tmp_path, started):
    class Killer(Silent):
        def work(self, what, done, total, detail=""):
            if started:
                started[0].send_signal(signal.SIGKILL)
                started[0].wait()

    path = write_conv(tmp_path / "a.onnx")
    (missing,) = measure([Variant("a", path, "fp32")], QUICK, Killer()).missing
    assert missing.reason == "its process ended with code -9"
    assert all(process.poll() is not None for process in started)


def test_a_process_that_cannot_be_started_is_a_reason(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(latency_process.subprocess, "Popen", never)
    (missing,) = measure([Variant("a", tmp_path / "a.onnx", "fp32")], QUICK, Silent()).missing
    assert missing.reason == "its process cannot be started: Resource temporarily unavailable"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to read another process's CPU time")
def test_a_worker_sleeps_after_its_turn(tmp_path):
    path = write_conv(tmp_path / "a.onnx", channels=32, height=32, layers=4)

    def cpu_seconds(pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with WorkerProcess(task(path, threads=2)) as process:
        process.start()
        process.prepared()
        process.ask("load")
        process.ask("measure", 0.05)
        before = cpu_seconds(process._process.pid)
        time.sleep(0.1)
        # Without `settle` the second thread burns 20 to 45 ms here.
        assert cpu_seconds(process._process.pid) - before <= 0.015


def loaded_modules(code):
    """Top-level modules beyond the standard library that running `code` loads."""
    show = "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True)
    return set(json.loads(shown.stdout.splitlines()[-1]))


def test_the_worker_imports_only_what_it_needs(tmp_path):
    allowed = loaded_modules("import numpy.random, numpy.typing, onnxruntime")
    given = task(write_conv(tmp_path / "a.onnx"))
    code = (
        "from compress.bench import latency_worker; from compress.bench.backends.base import Task; "
        f"given = {given!r}; latency_worker.import_backend(given).prepare(given)"
    )
    modules = loaded_modules(code) - allowed
    foreign = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {
        "compress",
        "compress.bench",
        "compress.bench.backends",
        "compress.bench.backends.base",
        "compress.bench.backends.onnx_runtime",
        "compress.bench.latency_worker",
    }
    assert "torch" not in allowed


def test_the_worker_speaks_its_protocol(tmp_path):
    """Run as a module, as its docstring says; errors are answers and do not end it."""
    given = task(write_conv(tmp_path / "a.onnx"), batch_size=2)
    requests = [
        {"do": "measure", "seconds": 0.001},
        {"do": "load"},
        {"do": "prepare", "task": given.__dict__},
        {"do": "dance"},
        {"do": "load"},
        {"do": "warm_up"},
        {"do": "memory"},
        {"do": "measure", "seconds": 0.001},
        {"do": "quit"},
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, "-m", "compress.bench.latency_worker"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[:4] == [
        {"error": "no model is loaded", "is_unavailable": False},
        {"error": "no backend is prepared", "is_unavailable": False},
        {},
        {"error": "unknown request 'dance'", "is_unavailable": False},
    ]
    loaded, warm, memory, measured = answers[4:]
    assert (loaded["provider"], loaded["precision"]) == ("CPUExecutionProvider", "fp32")
    assert loaded["cold_start_ns"] > 0
    assert warm == {}
    assert memory["peak_bytes"] > 20e6
    assert len(measured["nanoseconds"]) >= latency_worker.LEAST_CALLS
    assert sum(measured["nanoseconds"]) >= 1e6
    assert min(measured["nanoseconds"]) > 0


def test_the_workers_package_is_the_parents(tmp_path):
    """Whatever is installed or lies about: another `compress` does not come in, nor does a `statistics` of the user's."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    (elsewhere / "compress").mkdir(parents=True)
    (elsewhere / "compress" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    here.mkdir()
    (here / "statistics.py").write_text("raise SystemExit('the wrong module')")
    done = subprocess.run(
        [sys.executable, "-P", str(latency_process.START), "latency_worker"],
        input='{"do": "dance"}\n',
        capture_output=True,
        text=True,
        check=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(elsewhere)},
    )
    assert json.loads(done.stdout) == {"error": "unknown request 'dance'", "is_unavailable": False}


def test_a_call_with_a_known_delay_takes_that_much_longer():
    """The clock counts what a call does, and nothing else."""

    def busy(nanoseconds):
        def run():
            end = time.perf_counter_ns() + nanoseconds
            while time.perf_counter_ns() < end:
                pass

        return by_the_clock(run)

    short, long = (latency_worker.measure(busy(ms * 1_000_000), 0.02) for ms in (1, 40))
    assert min(short) >= 1_000_000
    assert min(long) >= 40_000_000
    assert min(long) > 2 * min(short)
    # As many calls as last 20 ms together, and never fewer than the least.
    assert len(short) <= 20
    assert len(long) == latency_worker.LEAST_CALLS


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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one", "one"),
        ("\n one \n two", "one"),
        ("backend='inductor' raised:\nNo compiler found\n\nmore", "backend='inductor' raised: No compiler found"),
        ("what:", "what:"),
        ("", "ValueError"),
    ],
)
def test_reasons_are_one_line(text, line):
    assert latency_worker.one_line(ValueError(text)) == line
