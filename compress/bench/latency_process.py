"""A process that measures one variant: started, asked line by line, ended whatever happens."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from compress.bench.backends.base import Task

PATIENCE_SECONDS = 120.0
"""How long a worker may stay silent beyond the time it was asked to measure."""
COMPILE_SECONDS = 900.0
"""How much longer where loading compiles the model."""

START: Final = Path(__file__).with_name("worker_start.py")
"""Program that runs a worker, whose module it takes by name."""
_COMPILES: Final = frozenset({"torch-compile", "tensorrt"})


class NotRunError(Exception):
    """A process could not do what it was asked; the text says why, in one line.

    Attributes:
        is_unavailable: The backend or the device is not there, whatever the model.
    """

    def __init__(self, reason: str, *, is_unavailable: bool = False) -> None:
        super().__init__(reason)
        self.is_unavailable = is_unavailable


class WorkerProcess:
    """The process of one variant in one setting; it ends with the `with` block, and whatever it started with it."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # A file, not a pipe: a pipe that nobody reads fills up and blocks the worker.
            self._log: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            # What a compiler leaves behind goes with the process, and no other process finds its work done already.
            self._scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="compress-", ignore_cleanup_errors=True)
            )
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._resources:
            self.stop()

    def start(self) -> None:
        """Let it begin to import; `ask` waits until it has.

        Raises:
            NotRunError: where the system starts no more processes.
        """
        try:
            # Run as a file with -P: a module of the user's folder named like a standard one must not be picked up.
            self._process = subprocess.Popen(  # noqa: S603 (our own interpreter and file)
                [sys.executable, "-P", str(START), "latency_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                encoding="utf-8",
                env={**os.environ, **environment(self._task, self._scratch)},
                # A group of its own: compilers that it starts can be ended with it.
                process_group=0 if os.name == "posix" else None,
            )
        except OSError as error:
            raise NotRunError(f"its process cannot be started: {error.strerror}") from None
        # Only a thread can wait for a line with a time limit on every system.
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        self._send({"do": "prepare", "task": asdict(self._task)})

    def prepared(self) -> None:
        """Wait until its libraries are imported."""
        self._answer(PATIENCE_SECONDS)

    def ask(self, what: str, seconds: float = 0.0) -> dict[str, Any]:
        """One request and its answer, as `compress.bench.latency_worker` describes them.

        Args:
            what: 'load', 'warm_up', 'measure' or 'memory'.
            seconds: to measure.

        Raises:
            NotRunError: where it answers with an error, ends, or stays silent.
        """
        self._send({"do": what, "seconds": seconds})
        longer = COMPILE_SECONDS if what == "load" and self._task.backend in _COMPILES else 0.0
        return self._answer(PATIENCE_SECONDS + longer + seconds)

    def stop(self) -> None:
        """End it, and whatever it started, if that has not been done."""
        process, self._process = self._process, None
        if process is None:
            return
        # It holds nothing worth saving, and after an error it may never listen again.
        if process.returncode is None and os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        self._reader.join()
        assert process.stdin is not None
        assert process.stdout is not None
        # A request that the process no longer took is still in the buffer.
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _answer(self, patience: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            raise self._failure(f"no answer for {patience:.0f} s") from None
        if line is None:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotRunError(answer["error"], is_unavailable=answer["is_unavailable"])
        return answer

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _ended(self) -> NotRunError:
        assert self._process is not None
        return self._failure(f"its process ended with code {self._process.wait()}")

    def _failure(self, what: str) -> NotRunError:
        """The error to raise, with the last line that the process wrote to standard error."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").strip().splitlines()
        return NotRunError(what + (f": {lines[-1].strip()}" if lines else ""))


def environment(task: Task, scratch: str) -> dict[str, str]:
    """What the process must be told before it imports anything.

    Args:
        task: what it measures.
        scratch: a folder of its own.
    """
    found: dict[str, str] = {}
    if task.backend in ("torch", "torch-compile"):
        found |= {"OMP_NUM_THREADS": str(task.threads), "MKL_NUM_THREADS": str(task.threads)}
    if task.backend == "torch-compile":
        # A cold start is the first on a machine, not one that finds what the last process compiled.
        found |= {"TORCHINDUCTOR_CACHE_DIR": scratch, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if task.device == "cuda" and (task.compute or task.precision) == "fp32":
        found["NVIDIA_TF32_OVERRIDE"] = "0"  # for those libraries whose switch we cannot reach, such as TensorRT's
    return found
