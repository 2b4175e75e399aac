"""The one place where ONNX Runtime sessions for checking and measuring accuracy are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compress.errors import ExportError, first_line
from compress.models.answers import LOGITS

_ERRORS_ONLY = 3
Feed = Sequence[NDArray[Any]]


def open_session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session over a file or its bytes.

    Raises:
        ExportError: where ONNX Runtime does not take the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise ExportError(f"ONNX Runtime does not take the model: {first_line(error)}") from error


def infer_all(session: onnxruntime.InferenceSession, inputs: Feed) -> dict[str, NDArray[Any]]:
    """All outputs, by name, for a batch of inputs (n, ...) in the order of the model."""
    feed = dict(zip((given.name for given in session.get_inputs()), inputs, strict=True))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def infer(session: onnxruntime.InferenceSession, inputs: Feed) -> NDArray[np.float32]:
    """Logits (n, classes) for a batch of inputs: the output of that name, of a foreign file without it the first one."""
    outputs = infer_all(session, inputs)
    logits: NDArray[np.float32] = outputs.get(LOGITS, next(iter(outputs.values())))
    return logits
