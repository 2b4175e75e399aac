"""Time per node of an ONNX file on the CPU, from ONNX Runtime's own profile, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bench.single_answer import answer_of
from compress.measured import OperatorTime, Profile

PATIENCE_SECONDS = 300.0
"""How long loading, warming up and reading the profile may take beyond the time that was asked for."""


def profile(
    path: Path,
    batch_size: int,
    threads: int,
    seconds: float = 1.0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Profile:
    """Time every node of an ONNX file.

    ONNX Runtime's CPU provider, sequential execution; inputs are those of latency: seeded random floats, zeros for
    everything else. Calls that warm up do not count. Runtime and not file decides what the nodes are: it fuses some and
    adds others.

    Args:
        path: The ONNX file.
        batch_size: Fills the open first size of each input.
        threads: Threads of a call.
        seconds: Calls go on for so long; at least 5 and at most 200 of them count.
        shapes: By name, sizes without the batch of inputs that leave them open.

    Raises:
        CompressError: where the file cannot be loaded or run, only takes another batch size, leaves sizes open that
            `shapes` does not give or contradicts those it gives, and where the process dies or stays silent; it names the
            file.
    """
    asked = {"batch_size": batch_size, "threads": threads, "seconds": seconds, "shapes": dict(shapes or {})}
    found = _ask({"path": str(path.resolve()), **asked})
    return Profile(
        provider=found["provider"],
        batch_size=batch_size,
        threads=threads,
        calls=found["calls"],
        call_ms=found["call_ms"],
        nodes=tuple(OperatorTime(**node) for node in found["nodes"]),
    )


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """What the worker answers; nothing of it is left, neither process nor file."""
    # Made and removed here, so that a worker that is killed leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        name, patience = Path(request["path"]).name, PATIENCE_SECONDS + request["seconds"]
        return answer_of("profile_worker", {**request, "folder": folder}, patience, f"profile of '{name}'")
