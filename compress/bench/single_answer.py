"""A worker that is asked once: it reads a JSON object from standard input and answers with one on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from compress.bench.latency_process import START
from compress.errors import CompressError


def answer_of(worker: str, request: dict[str, Any], patience: float, what: str) -> dict[str, Any]:
    """What a worker answers; no process is left.

    Args:
        worker: name of a module beside this one.
        request: what it is asked.
        patience: seconds to wait for the answer.
        what: what is asked for, for messages.

    Raises:
        CompressError: where the answer is an error, or the process dies or stays silent.
    """
    # Run as a file with -P: a module of the user's folder named like a standard one must not be picked up.
    with subprocess.Popen(  # noqa: S603 (our own interpreter and file)
        [sys.executable, "-P", str(START), worker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            answer, log = process.communicate(json.dumps(request), timeout=patience)
        except subprocess.TimeoutExpired:
            raise CompressError(f"{what}: no answer for {patience:.0f} s") from None
        finally:
            # It holds nothing worth saving, and after an error it may never end.
            process.kill()
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:
        lines = log.strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        raise CompressError(f"{what}: its process ended with code {process.returncode}{last}") from None
    if "error" in found:
        raise CompressError(f"{what}: {found['error']}")
    return found
