"""Time per node of an ONNX file on the CPU, from ONNX Runtime's own profile, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bench.latency_process import START
from compress.errors import CompressError
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
    name = Path(request["path"]).name
    patience = PATIENCE_SECONDS + request["seconds"]
    with (
        # Made and removed here, so that a worker that is killed leaves nothing behind.
        tempfile.TemporaryDirectory(prefix="compress-") as folder,
        # Run as a file with -P: a module of the user's folder named like a standard one must not be picked up.
        subprocess.Popen(  # noqa: S603 (our own interpreter and file)
            [sys.executable, "-P", str(START), "profile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            answer, log = process.communicate(json.dumps({**request, "folder": folder}), timeout=patience)
        except subprocess.TimeoutExpired:
            raise CompressError(f"profile of '{name}': no answer for {patience:.0f} s") from None
        finally:
            # It holds nothing worth saving, and after an error it may never end.
            process.kill()
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:
        lines = log.strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        raise CompressError(f"profile of '{name}': its process ended with code {process.returncode}{last}") from None
    if "error" in found:
        raise CompressError(f"profile of '{name}': {found['error']}")
    return found
