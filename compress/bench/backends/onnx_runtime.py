"""ONNX Runtime: its CPU provider, its CUDA provider, and TensorRT as its provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnxruntime

from compress.bench.backends.base import Call, Feed, Given, Task, UnavailableError, by_the_clock

ERRORS_ONLY: Final = 3
_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_NUMPY: Final[Mapping[str, str]] = {"float": "float32", "double": "float64"}
"""Where numpy calls the elements of a tensor otherwise."""
_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    _CUDA: {"device_id": "0", "use_tf32": "0"},  # fp32 means fp32; NVIDIA's libraries round to 10 bits unless told
    _TENSORRT: {"device_id": "0"},
    _CPU: {},
}


def prepare(task: Task) -> None:
    """Refuses where this build of ONNX Runtime has no provider for the device."""
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    wanted = providers(task)[0]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise UnavailableError(
            f"the installed onnxruntime has no {wanted} (it has {', '.join(available)}); "
            "on a machine with an NVIDIA device onnxruntime-gpu in its place brings it"
        )
    if task.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that come as Python packages


def providers(task: Task) -> tuple[str, ...]:
    """The provider that is asked for, and those that take the nodes it leaves."""
    if task.backend == "tensorrt":
        return (_TENSORRT, _CUDA, _CPU)
    return (_CUDA, _CPU) if task.device == "cuda" else (_CPU,)


def load(task: Task) -> OnnxRuntimeModel:
    """A session with sequential execution and one pool of `task.threads` threads.

    Raises:
        RuntimeError: where the provider that was asked for does not start and another took its place.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ERRORS_ONLY
    names = providers(task)
    session = onnxruntime.InferenceSession(
        task.path, options, providers=[(name, dict(_OPTIONS[name])) for name in names]
    )
    started = session.get_providers()[0]
    if started != names[0]:
        raise RuntimeError(
            f"{names[0]} does not start here (its libraries, or the device, are missing); only {started} does"
        )
    return OnnxRuntimeModel(session, task.precision, task.device)


class OnnxRuntimeModel:
    """A session. On the CPU it is called as users call it; on a device its inputs and outputs stay there."""

    def __init__(self, session: onnxruntime.InferenceSession, precision: str, device: str) -> None:
        self._session = session
        self._device = device
        self.precision = precision

    @property
    def provider(self) -> str:
        """The provider that was asked for; nodes it cannot run are run by the next one."""
        name: str = self._session.get_providers()[0]
        return name

    @property
    def inputs(self) -> Sequence[Given]:
        """As the file says."""
        return inputs_of(self._session)

    def bind(self, feed: Feed) -> Call:
        """Arrays on the CPU; on a device values that are there, so that no transfer is timed, as with torch."""
        if self._device == "cpu":
            return by_the_clock(lambda: self._session.run(None, feed))
        return bound(self._session, feed, self._device)


def inputs_of(session: Any) -> Sequence[Given]:
    """What a session takes, as its file says."""
    return [Given(value.name, tuple(value.shape), _dtype(value.type)) for value in session.get_inputs()]


def bound(session: Any, feed: Feed, device: str) -> Call:
    """Calls of a session whose inputs and outputs lie on a device; a call ends when the device has finished."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    binding.synchronize_inputs()

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return by_the_clock(run)


def _dtype(kind: str) -> str:
    """'float32' for 'tensor(float)'; what is no tensor, or holds strings, keeps its name."""
    element = kind.removeprefix("tensor(").removesuffix(")")
    return _NUMPY.get(element, element)
