"""PyTorch on checkpoints: eager, and compiled by `torch.compile`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compress import checkpoint as checkpoints
from compress import manifest
from compress.bench.backends.base import Call, Feed, Given, Task, UnavailableError, by_the_clock
from compress.errors import CheckpointError
from compress.names import WITH_PUBLISHED_WEIGHTS

_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare(task: Task) -> None:
    """Sets the threads and forbids TF32; refuses CUDA where torch finds none.

    What loading a model would import first is imported here: libraries do not belong to a cold start.
    """
    if task.device == "cuda" and not torch.cuda.is_available():
        build = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise UnavailableError(f"torch finds no CUDA device here (it is {build})")
    torch.set_num_threads(task.threads)
    torch.set_num_interop_threads(1)
    # The first is torch's default, the second is not: convolutions in "fp32" would be TF32 on devices that have it.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if task.backend == "torch-compile":
        with contextlib.suppress(ImportError):  # a place inside torch: where it has moved, the cold start imports it
            importlib.import_module("torch._inductor.compile_fx")
    assert task.checkpoint is not None
    with contextlib.suppress(CheckpointError):  # `load` says what is wrong with it
        library = manifest.read(Path(task.checkpoint)).arch.factory.partition(":")[0]
        if library in WITH_PUBLISHED_WEIGHTS and importlib.util.find_spec(library) is not None:
            importlib.import_module(library)


def load(task: Task) -> TorchModel:
    """The checkpoint's model on the device, in what `task.compute` says; compiled where that is the backend.

    fp16 and bf16 are the types of all its parameters and inputs, as a model is deployed, not autocast, which would convert
    the weights again with each call.

    Raises:
        CompressError: where the checkpoint is damaged, not trusted, or does not build.
    """
    assert task.checkpoint is not None
    checkpoint = checkpoints.load(task.checkpoint, task.trusted)
    compute = task.compute or "fp32"
    model: Callable[..., Any] = checkpoint.build(task.trusted).to(task.device, _DTYPES[compute])
    if task.backend == "torch-compile":
        model = torch.compile(model)
    return TorchModel(model, checkpoint.manifest, compute, task.device)


class TorchModel:
    """A module, called without gradients on tensors that lie on its device."""

    def __init__(self, model: Callable[..., Any], record: manifest.Manifest, precision: str, device: str) -> None:
        self._model = model
        self._record = record
        self._device = device
        self.precision = precision

    @property
    def provider(self) -> str:
        """'eager' or 'inductor', and which CUDA library on a device."""
        kind = "inductor" if hasattr(self._model, "_orig_mod") else "eager"
        return f"{kind}, CUDA {torch.version.cuda}" if self._device == "cuda" else kind

    @property
    def inputs(self) -> Sequence[Given]:
        """As the checkpoint records them."""
        return [Given(each.name, (None, *each.shape), each.dtype) for each in self._record.inputs]

    def bind(self, feed: Feed) -> Call:
        """Tensors on the device, in the model's type and layout."""
        tensors = tuple(self._tensor(torch.from_numpy(array)) for array in feed.values())

        @torch.inference_mode()
        def run() -> object:
            return self._model(*tensors)

        return by_events(run) if self._device == "cuda" else by_the_clock(run)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(_DTYPES[self.precision])
        tensor = tensor.to(self._device)
        if tensor.dim() == 4 and self._record.memory_format == "channels_last":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def by_events(run: Callable[[], object]) -> Call:
    """A call that only hands work to a CUDA device: events before and behind it in the stream tell how long it took.

    The device is idle when it begins, so that time in which it waits for the CPU to hand over more counts as well.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def call() -> int:
        start.record()
        run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return round(milliseconds * 1e6)

    return call
