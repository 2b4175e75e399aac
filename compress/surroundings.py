"""Where, and from what, something was measured: the machine with its libraries, and the commit of a folder. No torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

from compress import machine
from compress.bench.latency import HARNESS
from compress.provenance import code_digest, versions
from compress.results import Machine
from compress.stages import STAGES

_TAKES_TIMES = (*HARNESS, "compress.bench.profile", "compress.bench.profile_worker")
_MACHINE_ID = Path("/etc/machine-id")
_HOST_DIGITS = 12
_GIT_SECONDS = 10.0
# A hook that runs us sets these, for its own repository.
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def machine_record() -> Machine:
    """Host, CPU, CUDA device, system, versions of all libraries that decide a result, and of our own code that takes times.

    Times that were measured where this record differs are another machine's, and are not reused.
    """
    modules = ("compress.pipeline", *(stage.module for stage in STAGES.values()))
    known = {name: number for module in modules for name, number in versions(module).items()}
    harness = "".join(code_digest(module) for module in _TAKES_TIMES)
    known["compress latency harness"] = hashlib.sha256(harness.encode()).hexdigest()[:12]
    return Machine(
        host=_host(),
        cpu=machine.cpu_model(),
        cores=machine.cores(),
        architecture=platform.machine(),
        instruction_sets=tuple(sorted(machine.cpu_flags() & machine.INTERESTING_FLAGS)),
        cuda_device=machine.cuda_device_name(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=dict(sorted(known.items())),
    )


def _host() -> str:
    """Hash of the host's name and, where the system has one, the id of its installation."""
    try:
        identifier = _MACHINE_ID.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        identifier = ""
    return hashlib.sha256(f"{platform.node()}\n{identifier}".encode()).hexdigest()[:_HOST_DIGITS]


def git_revision(folder: Path) -> str | None:
    """Commit that a folder is at, '+changes' behind it where tracked files of its repository differ.

    Returns:
        None outside of git, without git, before the first commit, and where git does not tell within seconds.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if changes is None:
        return None  # a commit alone would claim that nothing has changed
    return commit.decode("ascii").strip() + ("+changes" if changes.strip() else "")


def _git(folder: Path, *arguments: str) -> bytes | None:
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # reads only: another git may be at work there
    try:
        # A monitor is a program that the repository's own settings name.
        done = subprocess.run(  # noqa: S603 (no shell; the folder is an argument of its own)
            ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments],  # noqa: S607 (the user's git)
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):  # ValueError: a folder with a NUL in its name
        return None
    return done.stdout if done.returncode == 0 else None
