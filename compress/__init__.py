"""From a trained PyTorch model to the smallest, fastest ONNX model that still does the job.

    from compress import load_pipeline, run

    results = run(load_pipeline("pipelines/resnet_mobile.yaml"))
    print(results.rows[-1].size_bytes)

Importing this package is cheap: torch is imported with the first use of `run` or `Checkpoint`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.checkpoint import load as load_checkpoint
    from compress.config import Pipeline, load_pipeline
    from compress.errors import CompressError
    from compress.pipeline import run
    from compress.results import Results

__version__ = "0.1.0"
__all__ = ["Checkpoint", "CompressError", "Pipeline", "Results", "load_checkpoint", "load_pipeline", "run"]

_PLACES = {
    "Checkpoint": ("compress.checkpoint", "Checkpoint"),
    "CompressError": ("compress.errors", "CompressError"),
    "Pipeline": ("compress.config", "Pipeline"),
    "Results": ("compress.results", "Results"),
    "load_checkpoint": ("compress.checkpoint", "load"),
    "load_pipeline": ("compress.config", "load_pipeline"),
    "run": ("compress.pipeline", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
