"""The one place where ONNX Runtime sessions for checking and measuring accuracy are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compress.errors import ExportError

_ERRORS_ONLY = 3


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
        raise ExportError(f"ONNX Runtime does not take the model: {str(error).splitlines()[0]}") from error


def infer(session: onnxruntime.InferenceSession, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """First output for a batch of inputs (n, *input_shape)."""
    logits: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return logits
