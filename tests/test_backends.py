"""Backends: what each takes and refuses, and that those which are here give rows."""

import importlib.util
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_latency import QUICK, Recorder, task, write_conv

from compress.bench import latency_worker
from compress.bench.backends import base, onnx_runtime, pytorch
from compress.bench.backends.base import MODULES, Given, UnavailableError, by_the_clock, random_feed
from compress.bench.latency import BACKENDS, Variant, measure, refusal
from compress.bench.latency_process import environment
from compress.config.pipeline import LatencyConfig
from compress.events import Silent

HAS_CUDA = torch.cuda.is_available()
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="torch finds no CUDA device")
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="a CUDA device is here")

extents = st.lists(st.integers(1, 5), max_size=4)
kinds = st.sampled_from(sorted(base._FLOATS | base._COUNTS))
batches = st.one_of(st.none(), st.just("batch"))


@given(st.lists(st.tuples(batches, extents, kinds), min_size=1, max_size=3), st.integers(1, 9))
def test_a_feed_is_what_the_model_takes(described, batch_size):
    inputs = [Given(f"x{i}", (batch, *rest), kind) for i, (batch, rest, kind) in enumerate(described)]
    feed = random_feed(inputs, batch_size)
    assert list(feed) == [value.name for value in inputs]
    for value in inputs:
        array = feed[value.name]
        assert array.shape == (batch_size, *value.shape[1:])
        assert array.dtype == value.dtype
        assert array.any() == (array.dtype.kind == "f")
    again = random_feed(inputs, batch_size)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (2, 3),
            "float32",
            r"the file only takes batch size 2; use --batch-size 2 \(in a pipeline bench\.latency\.batch_sizes",
        ),
        ((), "float32", r"input 'x' must have the batch as its first dimension, its shape is \[\]"),
        ((None, 3, "height"), "float32", r"batch open, its shape is \[None, 3, 'height'\]: give --shape x=3x224,"),
        ((None, 3), "string", "input 'x' must hold numbers, it is string"),
        ((None, 3), "seq(tensor(float))", "must hold numbers"),
    ],
)
def test_a_feed_that_cannot_be_made(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        random_feed([Given("x", shape, dtype)], 1)


@given(st.lists(extents, min_size=1, max_size=3), st.integers(1, 9), st.data())
def test_open_sizes_are_those_given(described, batch_size, data):
    """Any of the sizes may be open, by name or without one; those that are not may be told again or left out."""
    inputs, shapes = [], {}
    for i, rest in enumerate(described):
        left_open = [data.draw(st.sampled_from([size, None, "size"])) for size in rest]
        inputs.append(Given(f"x{i}", (None, *left_open), "float32"))
        if left_open != rest or data.draw(st.booleans()):
            shapes[f"x{i}"] = tuple(rest)
    feed = random_feed(inputs, batch_size, shapes)
    assert [array.shape for array in feed.values()] == [(batch_size, *rest) for rest in described]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": (3, 8)}, "^no input is called 'y'; the model takes 'x', 'mask'$"),
        (
            {"x": (3, 8, 8), "mask": (4,)},
            r"^input 'x' cannot have the shape 3x8x8: without the batch it must be 3x\?, with any",
        ),
        ({"x": (3,)}, r"^input 'x' cannot have the shape 3: without the batch it must be 3x\?, with any size from 1"),
        ({"x": (4, 8)}, r"^input 'x' cannot have the shape 4x8: without the batch it must be 3x\?"),
        ({"x": (3, 0)}, r"^input 'x' cannot have the shape 3x0: without the batch it must be 3x\?"),
        ({"x": (3, 8), "mask": (5,)}, "^input 'mask' cannot have the shape 5: without the batch it must be 4$"),
        (
            {"mask": (4,)},
            r"^input 'x' leaves more than the batch open, its shape is \['n', 3, 'h'\]: give --shape x=3x224,",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_told_what_would(shapes, message):
    inputs = [Given("x", ("n", 3, "h"), "float32"), Given("mask", ("n", 4), "bool")]
    with pytest.raises(ValueError, match=message):
        random_feed(inputs, 2, shapes)


def test_the_clock_sees_what_runs():
    assert by_the_clock(lambda: time.sleep(0.02))() >= 20_000_000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"precision": "int8"}, None),
        ({"compute": "fp32"}, None),
        ({"compute": "fp16"}, "onnxruntime computes in what the file holds, fp32"),
        ({"device": "cuda"}, None),
        ({"backend": "openvino"}, None),
        ({"backend": "openvino", "device": "cuda"}, "OpenVINO is measured on the CPU only"),
        ({"backend": "tensorrt"}, "TensorRT runs on CUDA devices only"),
        ({"backend": "tensorrt", "device": "cuda"}, None),
        ({"backend": "torch"}, "PyTorch runs checkpoints, not ONNX files"),
        ({"backend": "torch-compile", "device": "cuda"}, "PyTorch runs checkpoints, not ONNX files"),
        ({"backend": "torch", "checkpoint": "folder"}, None),
        (
            {"backend": "torch", "checkpoint": "folder", "precision": "int8"},
            "the int8 model is an ONNX file; PyTorch has its float weights only",
        ),
        ({"backend": "torch", "checkpoint": "folder", "compute": "bf16"}, "bf16 is measured on CUDA only"),
        ({"backend": "torch", "checkpoint": "folder", "compute": "bf16", "device": "cuda"}, None),
    ],
)
def test_what_a_backend_never_runs(tmp_path, changes, reason):
    settings = {"precision": "fp32", **changes}
    assert refusal(Variant("a", tmp_path / "a.onnx", **settings)) == reason


def test_refusals_are_rows_and_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.bench.latency_process.subprocess.Popen", None)
    variants = [
        Variant("a", tmp_path / "a.onnx", "fp32", backend="torch"),
        Variant("a", tmp_path / "a.onnx", "fp32", backend="tensorrt"),
        Variant("b", tmp_path / "b.onnx", "int8", checkpoint=tmp_path, backend="torch", device="cuda", compute="fp16"),
    ]
    config = LatencyConfig(batch_sizes=(1, 8), threads=(2,), rounds=6)
    found = measure(variants, config, Silent())
    assert found.latencies == {"a": (), "b": ()}
    told = [(each.name, each.backend, each.device, each.precision, each.batch_size) for each in found.missing]
    assert told == [
        ("a", "torch", "cpu", "fp32", 1),
        ("a", "torch", "cpu", "fp32", 8),
        ("a", "tensorrt", "cpu", "fp32", 1),
        ("a", "tensorrt", "cpu", "fp32", 8),
        ("b", "torch", "cuda", "fp16", 1),
        ("b", "torch", "cuda", "fp16", 8),
    ]


def test_every_backend_has_a_module_of_the_right_kind():
    assert set(BACKENDS) == {"onnxruntime", "torch", "torch-compile", "openvino", "tensorrt"}
    for backend, module in MODULES.items():
        assert importlib.util.find_spec(module) is not None
        if backend == "openvino" and not HAS_OPENVINO:
            continue
        loaded = importlib.import_module(module)
        assert callable(loaded.prepare)
        assert callable(loaded.load)


@pytest.mark.parametrize(
    ("backend", "library", "reason"),
    [
        ("openvino", "openvino", r"^openvino is not installed: pip install 'compress\[openvino\]'$"),
        ("onnxruntime", "onnxruntime", "^onnxruntime: .*onnxruntime"),
    ],
)
def test_a_library_that_is_missing_is_named(monkeypatch, backend, library, reason):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, MODULES[backend], raising=False)
    with pytest.raises(UnavailableError, match=reason):
        latency_worker.import_backend(task("a.onnx", backend=backend))


@pytest.mark.skipif(HAS_OPENVINO, reason="openvino is installed")
def test_without_openvino_there_is_a_row_that_says_so(tmp_path):
    path = write_conv(tmp_path / "a.onnx")
    found = measure([Variant("a", path, "fp32", backend="openvino")], QUICK, Silent())
    assert [each.reason for each in found.missing] == ["openvino is not installed: pip install 'compress[openvino]'"]


def test_modules_of_the_user_come_last(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["first", "second"])
    given = task("a.onnx", import_paths=("second", "third", "first"))
    latency_worker.import_backend(given)
    assert sys.path == ["first", "second", "third"]


def test_threads_and_precision_are_set_before_anything_is_imported():
    def told(**changes):
        return environment(task("a.onnx", threads=3, **changes), "scratch")

    assert told() == {}
    threads = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    assert told(backend="torch") == threads
    compiled = {"TORCHINDUCTOR_CACHE_DIR": "scratch", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    assert told(backend="torch-compile") == threads | compiled
    ieee = {"NVIDIA_TF32_OVERRIDE": "0"}
    assert told(device="cuda") == ieee
    assert told(device="cuda", precision="int8") == {}
    assert told(backend="torch", device="cuda", compute="bf16") == threads
    assert told(backend="torch", device="cuda", compute="fp32") == threads | ieee


# ONNX Runtime


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "CPUExecutionProvider"),
        ({"device": "cuda"}, "CUDAExecutionProvider"),
        ({"backend": "tensorrt", "device": "cuda"}, "TensorrtExecutionProvider"),
    ],
)
def test_the_provider_that_is_asked_for(changes, first):
    names = onnx_runtime.providers(task("a.onnx", **changes))
    assert names[0] == first
    assert names[-1] == "CPUExecutionProvider"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider"
)
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_without_its_provider_there_is_a_row_that_says_so(tmp_path, backend):
    path = write_conv(tmp_path / "a.onnx")
    found = measure([Variant("a", path, "fp32", backend=backend, device="cuda")], QUICK, Silent())
    (missing,) = found.missing
    assert missing.device == "cuda"
    assert "the installed onnxruntime has no " in missing.reason
    assert "CPUExecutionProvider" in missing.reason


def test_a_provider_that_does_not_start_is_no_cpu_row(tmp_path, monkeypatch):
    """ONNX Runtime falls back to the CPU with a message on standard error only."""
    given = task(write_conv(tmp_path / "a.onnx"), device="cuda")
    original = onnxruntime.InferenceSession

    def falls_back(path, options, providers):
        return original(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(
        RuntimeError, match=r"CUDAExecutionProvider does not start here.*only CPUExecutionProvider does"
    ):
        onnx_runtime.load(given)


def test_a_bound_session_computes_what_a_plain_one_does(tmp_path):
    """On the CPU, as on a device: the same calls of ONNX Runtime, the transfers aside."""
    model = onnx_runtime.load(task(write_conv(tmp_path / "a.onnx")))
    feed = random_feed(model.inputs, 2)
    outputs = []

    class Session:
        """Keeps the outputs of the session it stands for."""

        get_outputs = model._session.get_outputs
        io_binding = model._session.io_binding

        def run_with_iobinding(self, binding):
            model._session.run_with_iobinding(binding)
            outputs.append(binding.copy_outputs_to_cpu())

    call = onnx_runtime.bound(Session(), feed, "cpu")
    assert call() > 0
    assert call() > 0
    (expected,) = model._session.run(None, feed)
    for (found,) in outputs:
        assert np.array_equal(found, expected)
    assert len(outputs) == 2


# PyTorch


def torch_task(workshop, checkpoint, **changes):
    settings = {"backend": "torch", "checkpoint": str(checkpoint.path), "trusted": tuple(workshop.trusted)}
    return task("model.onnx", **settings | changes)


def test_torch_row(workshop, tmp_path):
    checkpoint = workshop.source()
    variant = Variant(
        "good", tmp_path / "none.onnx", "fp32", checkpoint.path, frozenset(workshop.trusted), backend="torch"
    )
    config = LatencyConfig(batch_sizes=(3,), threads=(1,), rounds=6, seconds=0.001)
    found = measure([variant], config, Silent())
    assert found.missing == ()
    (record,) = found.latencies["good"]
    assert (record.backend, record.provider, record.precision, record.device) == ("torch", "eager", "fp32", "cpu")
    assert (record.batch_size, record.threads) == (3, 1)
    assert 0 < record.low_ms <= record.median_ms <= record.high_ms
    assert 0 < record.cold_start_ms < 60_000
    # torch alone takes more than a hundred megabytes.
    assert 100e6 < record.peak_memory_bytes < 8e9
    assert [repeat.backend for repeat in found.repeats] == ["torch"]


def loaded_by_a_worker(checkpoint, trusted=()):
    """What a worker answers that is to load this folder."""
    worker = latency_worker.Worker()
    worker._task = task("a.onnx", backend="torch", checkpoint=str(checkpoint), trusted=tuple(trusted))
    worker._backend = pytorch
    return worker.answer({"do": "load"})


def test_reasons_are_those_of_the_checkpoint_and_name_no_folder(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_worker.gc, "disable", lambda: None)
    checkpoint = workshop.source()
    assert loaded_by_a_worker(checkpoint.path, workshop.trusted)["provider"] == "eager"
    stranger = loaded_by_a_worker(checkpoint.path)
    assert "--trust-code" in stranger["error"]
    assert loaded_by_a_worker(tmp_path / "empty") == {
        "error": "empty: is no checkpoint (there is no checkpoint.json in it)",
        "is_unavailable": False,
    }


def test_a_module_gets_what_its_checkpoint_records(workshop, one_thread):
    checkpoint = workshop.source()
    model = pytorch.load(torch_task(workshop, checkpoint))
    assert model.inputs == [Given("input", (None, 1, 12, 8), "float32")]
    assert (model.provider, model.precision) == ("eager", "fp32")
    feed = random_feed(model.inputs, 4)
    seen = []
    reference = workshop.build(checkpoint)

    def spy(*inputs):
        seen.append((inputs, torch.is_inference_mode_enabled()))
        return reference(*inputs)

    model._model = spy
    assert model.bind(feed)() > 0
    ((inputs, without_gradients),) = seen
    assert without_gradients
    assert np.array_equal(inputs[0].numpy(), feed["input"])


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_is_that_of_weights_and_inputs(workshop, one_thread, compute):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    model = pytorch.load(torch_task(workshop, workshop.source(), compute=compute))
    assert model.precision == compute
    assert {parameter.dtype for parameter in model._model.parameters()} == {dtype}
    assert model.bind(random_feed(model.inputs, 1))() > 0


def test_channels_last_stays_channels_last(workshop, one_thread):
    checkpoint = workshop.source()
    model = pytorch.load(torch_task(workshop, checkpoint))
    model._record = model._record.model_copy(update={"memory_format": "channels_last"})
    model._model = lambda x: layouts.append(x.is_contiguous(memory_format=torch.channels_last)) or x
    layouts = []
    inputs = [Given("input", (None, 3, 12, 8), "float32")]
    model.bind(random_feed(inputs, 2))()
    assert layouts == [True]


@without_cuda
def test_torch_without_a_cuda_device_says_so(workshop):
    with pytest.raises(UnavailableError, match="torch finds no CUDA device here"):
        pytorch.prepare(torch_task(workshop, workshop.source(), device="cuda"))


@pytest.mark.slow
def test_torch_compile_row(workshop, tmp_path):
    checkpoint = workshop.source()
    variant = Variant("a", tmp_path / "none.onnx", "fp32", checkpoint.path, workshop.trusted, backend="torch-compile")
    found = measure([variant], QUICK, Recorder())
    assert found.missing == ()
    (record,) = found.latencies["a"]
    assert (record.backend, record.provider, record.precision) == ("torch-compile", "inductor", "fp32")
    # It compiles, which takes far longer than a call.
    assert record.cold_start_ms > 100 * record.median_ms


@needs_cuda
@pytest.mark.parametrize("compute", ["", "fp32", "fp16", "bf16"])
def test_torch_on_cuda(workshop, tmp_path, compute):
    checkpoint = workshop.source()
    here = {"device": "cuda", "backend": "torch", "compute": compute}
    variant = Variant("a", tmp_path / "none.onnx", "fp32", checkpoint.path, workshop.trusted, **here)
    found = measure([variant], QUICK, Recorder())
    assert found.missing == ()
    (record,) = found.latencies["a"]
    assert (record.device, record.precision) == ("cuda", compute or "fp32")
    assert record.provider.startswith("eager, CUDA")
    assert 0 < record.low_ms <= record.median_ms <= record.high_ms < 1000


@needs_cuda
def test_events_see_what_the_device_does():
    def product(n):
        matrix = torch.randn(n, n, device="cuda")
        return pytorch.by_events(lambda: matrix @ matrix)

    small, large = product(64), product(8192)
    for call in (small, large):
        call()
    assert large() > 5 * small()


# OpenVINO


@needs_openvino
@pytest.mark.parametrize("batch", ["batch", 2])
def test_openvino_row(tmp_path, batch):
    path = write_conv(tmp_path / "a.onnx", batch=batch)
    config = LatencyConfig(batch_sizes=(2,), threads=(1,), rounds=6, seconds=0.001)
    variants = [Variant("a", path, "fp32", backend="openvino"), Variant("b", path, "int8", backend="openvino")]
    found = measure(variants, config, Recorder())
    assert found.missing == ()
    (record,) = found.latencies["a"]
    assert (record.backend, record.provider, record.precision) == ("openvino", "CPU", "fp32")
    assert found.latencies["b"][0].precision == "int8"
    assert 0 < record.low_ms <= record.median_ms <= record.high_ms


@needs_openvino
def test_openvino_refuses_another_batch_of_a_fixed_file(tmp_path):
    path = write_conv(tmp_path / "a.onnx", batch=2)
    (missing,) = measure([Variant("a", path, "fp32", backend="openvino")], QUICK, Silent()).missing
    assert (
        missing.reason
        == "the file only takes batch size 2; use --batch-size 2 (in a pipeline bench.latency.batch_sizes)"
    )


@needs_openvino
def test_openvino_takes_open_sizes_as_given(tmp_path):
    path = write_conv(tmp_path / "a.onnx", height="height")
    variants = [
        Variant("good", path, "fp32", backend="openvino", shapes={"x0": (4, 6, 12)}),
        Variant("bad", path, "fp32", backend="openvino"),
    ]
    found = measure(variants, QUICK, Silent())
    assert len(found.latencies["good"]) == 1
    (missing,) = found.missing
    assert (missing.name, "give --shape x0=4x224x12" in missing.reason) == ("bad", True)


@needs_openvino
def test_openvino_names_the_precision_that_ran(tmp_path):
    from compress.bench.backends import open_vino

    model = open_vino.load(task(write_conv(tmp_path / "a.onnx"), backend="openvino"))
    assert model.precision == "fp32"
    assert model._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    (given,) = model.inputs
    assert (given.name, given.shape, given.dtype) == ("x0", (None, 4, 8, 12), "float32")
