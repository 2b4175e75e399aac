"""The float graph of a checkpoint: converted once where several ask for it in a row.

Conversion takes longer than anything else in a stage without training, and after a factorization three ask for the same
graph: bench, `quantize` and `export`.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from torch import nn

from compress.checkpoint import Checkpoint
from compress.data.base import Input
from compress.manifest import WEIGHTS
from compress.onnx_io.convert import to_onnx

_last: list[tuple[object, onnx.ModelProto]] = []


def float_graph(checkpoint: Checkpoint, model: nn.Module, inputs: Sequence[Input]) -> onnx.ModelProto:
    """What `to_onnx` makes of a checkpoint's float model; must not be changed.

    Args:
        checkpoint: decides which graph it is.
        model: what the checkpoint builds.
        inputs: as in `to_onnx`.

    Raises:
        ExportError: as `to_onnx`.
    """
    record = checkpoint.manifest
    key = (record.arch.model_dump_json(), record.edits, record.files[WEIGHTS].sha256, tuple(inputs))
    if not _last or _last[0][0] != key:
        _last[:] = [(key, to_onnx(model, inputs))]
    return _last[0][1]
