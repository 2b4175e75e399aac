"""From a trained PyTorch model to the smallest, fastest ONNX model that still does the job.

    from compress import load_pipeline, run

    results = run(load_pipeline("pipelines/resnet_mobile.yaml"))
    print(results.rows[-1].size_bytes)

Importing this package is cheap: torch is imported with the first use of `run` or `Checkpoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.config import Pipeline, load_pipeline
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.checkpoint import load as load_checkpoint
    from compress.pipeline import run
    from compress.results import Results

__version__ = "0.1.0"
__all__ = ["Checkpoint", "CompressError", "Pipeline", "Results", "load_checkpoint", "load_pipeline", "run"]


def __getattr__(name: str) -> Any:
    match name:
        case "run":
            from compress.pipeline import run

            return run
        case "Checkpoint":
            from compress.checkpoint import Checkpoint

            return Checkpoint
        case "load_checkpoint":
            from compress.checkpoint import load

            return load
        case "Results":
            from compress.results import Results

            return Results
    raise AttributeError(f"module 'compress' has no attribute '{name}'")
