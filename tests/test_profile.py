"""Time per node, from ONNX Runtime's profile in a process of its own. Times are never compared: the machine may be busy."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.bench import profile as profiling
from compress.bench import profile_worker, single_answer
from compress.bench.profile import profile
from compress.errors import CompressError
from compress.onnx_io.convert import serialized
from compress.onnx_io.quantize import TARGETS, collect_ranges, quantize

QUICK = 0.001
HALFWAY = """
import json, pathlib, sys
pathlib.Path(json.load(sys.stdin)["folder"], "profile.json").write_text("half a")
sys.exit("halfway")
"""


def conv_network(batch="batch", height=8, element=TensorProto.FLOAT):
    """Convolution, maximum, convolution, Softmax over the width."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((4, 4, 3, 3)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], name="stem", pads=[1] * 4),
        helper.make_node("MaxPool", ["a"], ["b"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["b", "second"], ["c"], name="body", pads=[1] * 4),
        helper.make_node("Softmax", ["c"], ["y"], name="end"),
    ]
    ends = [helper.make_tensor_value_info("x", element, [batch, 4, height, 12])]
    ends.append(helper.make_tensor_value_info("y", element, None))
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def written(path, proto):
    path.write_bytes(serialized(proto))
    return path


@pytest.fixture
def float_file(tmp_path):
    return written(tmp_path / "float.onnx", conv_network())


@pytest.fixture
def int8_file(tmp_path):
    proto = conv_network()
    samples = np.random.default_rng(1).standard_normal((4, 4, 8, 12)).astype(np.float32)
    ranges = collect_ranges(proto, [(samples,)])
    return written(tmp_path / "int8.onnx", quantize(proto, ranges, TARGETS["x86-vnni"], ["end"]))


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Processes that are started, and the only folder for temporary files."""
    processes, folder = [], tmp_path / "temporary"
    folder.mkdir()

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(single_answer.subprocess, "Popen", Popen)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return processes, folder


def nothing_is_left(watched):
    processes, folder = watched
    return len(processes) == 1 and processes[0].poll() is not None and list(folder.iterdir()) == []


def test_every_node_of_a_float_file_is_float_and_takes_time(float_file, watched):
    found = profile(float_file, batch_size=2, threads=1, seconds=QUICK)
    assert (found.provider, found.batch_size, found.threads) == ("CPUExecutionProvider", 2, 1)
    assert found.calls >= profile_worker.LEAST_CALLS
    assert {"Conv", "Softmax"} <= {node.operator for node in found.nodes}
    assert {node.kind for node in found.nodes if not node.operator.startswith("Reorder")} == {"float"}
    assert all(node.milliseconds > 0 for node in found.nodes if node.operator == "Conv")
    assert 0 < sum(node.milliseconds for node in found.nodes) < 10 * found.call_ms
    assert {"pool", "end"} <= {node.name for node in found.nodes}
    assert not any(node.name.endswith("_kernel_time") for node in found.nodes)
    assert nothing_is_left(watched)


def test_int8_kernels_conversions_and_fallbacks_are_told_apart(int8_file, watched):
    found = profile(int8_file, batch_size=1, threads=1, seconds=QUICK)
    kinds = [(node.operator, node.kind) for node in found.nodes]
    assert kinds.count(("QLinearConv", "int8")) == 2
    assert {kind for operator, kind in kinds if operator.endswith("MaxPool")} == {"int8"}
    assert ("Softmax", "float") in kinds
    assert ("QuantizeLinear", "convert") in kinds
    assert ("DequantizeLinear", "convert") in kinds
    order = [operator for operator, _ in kinds]
    assert order[0] == "QuantizeLinear"
    assert order[-1] == "Softmax"
    assert nothing_is_left(watched)


def test_calls_go_on_for_as_long_as_asked_and_not_for_ever(float_file):
    short = profile(float_file, batch_size=1, threads=1, seconds=0.0)
    assert short.calls == profile_worker.LEAST_CALLS
    long = profile(float_file, batch_size=1, threads=1, seconds=60.0)
    assert long.calls == profile_worker.MOST_CALLS


def test_inputs_of_other_types_get_numbers_too(tmp_path):
    kinds = {"half": TensorProto.FLOAT16, "index": TensorProto.INT32, "mask": TensorProto.BOOL, "id": TensorProto.INT64}
    nodes = [helper.make_node("Cast", [name], [f"{name} out"], to=TensorProto.DOUBLE) for name in kinds]
    ends = [[helper.make_tensor_value_info(name, kind, ["n", 3]) for name, kind in kinds.items()]]
    ends.append([helper.make_tensor_value_info(f"{name} out", TensorProto.DOUBLE, ["n", 3]) for name in kinds])
    graph = helper.make_graph(nodes, "net", *ends)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = profile(written(tmp_path / "casts.onnx", proto), batch_size=2, threads=1, seconds=QUICK)
    assert [node.kind for node in found.nodes] == ["convert"] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no model"), r"^profile of 'bad\.onnx': .*bad\.onnx"),
        (lambda path: None, r"^profile of 'bad\.onnx': .*bad\.onnx"),
        (
            lambda path: written(path, conv_network(height="height")),
            r"^profile of 'bad\.onnx': input 'x' leaves more than the batch open, its shape .*: give --shape x=4x224x12,",
        ),
        (
            lambda path: written(path, conv_network(batch=3)),
            r"^profile of 'bad\.onnx': the file only takes batch size 3; use --batch-size 3 ",
        ),
    ],
    ids=["broken", "missing", "open height", "fixed batch"],
)
def test_a_file_that_cannot_be_profiled_is_named(tmp_path, watched, make, message):
    path = tmp_path / "bad.onnx"
    make(path)
    with pytest.raises(CompressError, match=message) as caught:
        profile(path, batch_size=1, threads=1, seconds=QUICK)
    assert str(tmp_path) not in str(caught.value)
    assert nothing_is_left(watched)


def test_open_sizes_are_profiled_at_the_shape_given(tmp_path, watched):
    path = written(tmp_path / "open.onnx", conv_network(height="height"))
    found = profile(path, batch_size=2, threads=1, seconds=QUICK, shapes={"x": (4, 6, 12)})
    assert [node.operator for node in found.nodes].count("Conv") == 2
    assert nothing_is_left(watched)
    with pytest.raises(CompressError, match=r"^profile of 'open\.onnx': no input is called 'z'; the model takes 'x'$"):
        profile(path, batch_size=2, threads=1, seconds=QUICK, shapes={"z": (4, 6, 12)})
    with pytest.raises(
        CompressError, match=r"^profile of 'open\.onnx': input 'x' cannot have the shape 5x6x12: .* 4x\?x12"
    ):
        profile(path, batch_size=2, threads=1, seconds=QUICK, shapes={"x": (5, 6, 12)})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('out of luck')", "ended with code 1: out of luck$"),
        ("import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)", "ended with code -9$"),
        ("import time; time.sleep(60)", "no answer for 1 s$"),
        (
            HALFWAY,
            "ended with code 1: halfway$",
        ),
    ],
    ids=["dies at once", "killed", "hangs", "leaves a file"],
)
def test_a_worker_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch, float_file, watched, program, message):
    fake = tmp_path / "worker.py"
    fake.write_text(program)
    monkeypatch.setattr(single_answer, "START", fake)
    monkeypatch.setattr(profiling, "PATIENCE_SECONDS", 1.0)
    with pytest.raises(CompressError, match=r"^profile of 'float\.onnx': .*" + message):
        profile(float_file, batch_size=1, threads=1, seconds=0.0)
    assert nothing_is_left(watched)


def test_the_worker_imports_only_what_it_needs():
    show = "; import sys, json; print(json.dumps(sorted(sys.modules)))"

    def loaded(code):
        done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True)
        return set(json.loads(done.stdout.splitlines()[-1]))

    modules = loaded("import compress.bench.profile_worker") - loaded("import numpy.random, numpy.typing, onnxruntime")
    foreign = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {
        "compress",
        "compress.bench",
        "compress.bench.backends",
        "compress.bench.backends.base",
        "compress.bench.backends.onnx_runtime",
        "compress.bench.profile_worker",
        "compress.methods",
        "compress.methods.statistics",
    }


# Reading a profile


def run(ts, dur):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def kernel(name, ts, dur, operator="Conv", index=0, read="float", wrote="float"):
    args = {
        "op_name": operator,
        "node_index": str(index),
        "input_type_shape": [{read: [1, 4]}, {}],
        "output_type_shape": [{wrote: [1, 4]}],
    }
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def times(events, warm_up, calls):
    found = profile_worker.node_times(events, warm_up, calls)
    return {node["name"]: node["milliseconds"] for node in found}


def test_calls_that_warm_up_do_not_count_and_the_middle_half_does():
    """Of the six calls that count the fastest and the slowest stay out, and ticks of a microsecond are divided."""
    durations = [80, 70, 31, 90, 30, 1, 30, 31]
    events = [run(100 * call, 99) for call in (3, 0, 1, 2, 4, 7, 6, 5)]
    events += [kernel("a", 100 * call + 1, duration) for call, duration in enumerate(durations)]
    events += [{"cat": "Node", "name": "a_fence_before", "ts": 201, "dur": 50, "args": {}}]
    assert times(events, 2, 6) == {"a": 0.0305}


def test_nodes_stand_in_the_order_in_which_they_ran():
    events = [run(0, 90), run(100, 90)]
    events += [kernel("late", 150, 5, index=0), kernel("early", 110, 5, index=9), kernel("only once", 20, 5, index=3)]
    assert list(times(events, 1, 1)) == ["early", "late"]


def test_two_nodes_of_one_name_stay_two():
    events = [run(0, 90), kernel("same", 10, 5, index=0), kernel("same", 20, 7, index=1)]
    assert [node["milliseconds"] for node in profile_worker.node_times(events, 0, 1)] == [0.005, 0.007]


def test_a_loop_sums_its_turns_and_counts_nothing_twice():
    events = [run(0, 90), kernel("loop", 10, 60, operator="Loop", index=1)]
    events += [kernel("body", 20, 15, index=5), kernel("body", 40, 15, index=5), kernel("after", 75, 3, index=2)]
    assert times(events, 0, 1) == pytest.approx({"loop": 0.03, "body": 0.03, "after": 0.003})


def test_a_branch_that_is_not_taken_costs_nothing_then():
    events = [run(start, 90) for start in (0, 100, 200)]
    events += [kernel("always", start + 10, 20) for start in (0, 100, 200)]
    events.append(kernel("sometimes", 40, 9, index=1))
    # Nothing is off the ends of three calls; of four the one that took it is an outlier.
    assert times(events, 0, 3) == {"always": 0.02, "sometimes": 0.003}
    assert times([*events, run(300, 90), kernel("always", 310, 20)], 0, 4) == {"always": 0.02, "sometimes": 0.0}


def test_a_profile_that_was_cut_short_is_refused():
    with pytest.raises(ValueError, match="holds 1 calls instead of 3"):
        profile_worker.node_times([run(0, 90), kernel("a", 10, 5)], 1, 2)
    with pytest.raises(ValueError, match="holds no nodes"):
        profile_worker.node_times([run(0, 90)], 0, 1)


@pytest.mark.parametrize(
    ("operator", "read", "wrote", "kind"),
    [
        ("QLinearConv", "uint8", "uint8", "int8"),
        ("QGemm", "uint8", "float", "int8"),
        ("MatMulIntegerToFloat", "int8", "float", "int8"),
        ("QLinearConcat", "float", "uint8", "int8"),
        ("MaxPool", "uint8", "uint8", "int8"),
        ("Transpose", "int8", "int8", "int8"),
        ("QuantizeLinear", "float", "uint8", "convert"),
        ("DequantizeLinear", "int8", "float", "convert"),
        ("DynamicQuantizeLinear", "float", "uint8", "convert"),
        ("ReorderOutput", "float", "float", "convert"),
        ("Cast", "int64", "float", "convert"),
        ("MatMulNBits", "uint8", "float", "float"),
        ("Conv", "float", "float", "float"),
        ("Gather", "int64", "int64", "float"),
    ],
)
def test_the_kind_is_told_by_operator_and_types(operator, read, wrote, kind):
    assert profile_worker.kind_of(kernel("a", 0, 1, operator, read=read, wrote=wrote)["args"]) == kind


def test_the_worker_never_picks_up_a_module_of_the_users_folder(tmp_path, monkeypatch, float_file):
    (Path(tmp_path) / "bisect.py").write_text("raise RuntimeError('not the standard one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert profile(float_file, batch_size=1, threads=1, seconds=0.0).nodes
    assert onnx.load(float_file).graph.node  # and the file is as it was
