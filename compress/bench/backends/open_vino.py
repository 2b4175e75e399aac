"""OpenVINO on the CPU: reads the ONNX file itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import openvino

from compress.bench.backends.base import Call, Feed, Given, Task, UnavailableError, by_the_clock, closed_shapes

_PRECISIONS: Final[Mapping[str, str]] = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
_NUMPY: Final[Mapping[str, str]] = {
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "boolean": "bool",
}
_core = openvino.Core()


def prepare(task: Task) -> None:
    """Refuses where OpenVINO has no plugin for CPUs."""
    del task
    if "CPU" not in _core.available_devices:
        raise UnavailableError("the installed openvino has no plugin for the CPU")


def load(task: Task) -> OpenVinoModel:
    """The file compiled for one call at a time on `task.threads` threads, in float32 where it is not quantized.

    Left to itself OpenVINO computes "fp32" in bfloat16 on CPUs that have it.

    Raises:
        ValueError: as `closed_shapes`.
    """
    model = _core.read_model(task.path)
    inputs = [_given(value) for value in model.inputs]
    shapes = closed_shapes(inputs, task.batch_size, task.shapes)
    if shapes:
        # They are known now, as they are when a user compiles; those left open cost it some of its speed.
        model.reshape({name: openvino.PartialShape(list(shape)) for name, shape in shapes.items()})
    compiled = _core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": task.threads,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    return OpenVinoModel(compiled, inputs, task.precision)


class OpenVinoModel:
    """A compiled model and one request on it."""

    provider = "CPU"

    def __init__(self, compiled: Any, inputs: Sequence[Given], precision: str) -> None:
        self._compiled = compiled
        self._precision = precision
        self.inputs = inputs

    @property
    def precision(self) -> str:
        """What ran: int8 for a quantized file, else what the compiled model says of itself."""
        if self._precision == "int8":
            return self._precision
        name = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        return _PRECISIONS.get(name, name)

    def bind(self, feed: Feed) -> Call:
        """Arrays are handed over without copies, as ONNX Runtime takes them."""
        request = self._compiled.create_infer_request()
        return by_the_clock(lambda: request.infer(feed, share_inputs=True, share_outputs=True))


def _given(value: Any) -> Given:
    shape = tuple(extent.get_length() if extent.is_static else None for extent in value.partial_shape)
    element = value.element_type.to_string()
    return Given(value.any_name, shape, _NUMPY.get(element, element))
