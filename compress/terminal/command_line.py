"""The commands that results name as the way to repeat them: what was typed, without folders of this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress import machine


def run_command(file: Path, overrides: Sequence[str], until: str | None) -> str:
    """The command that repeats a run."""
    words = [*_launcher(), "compress", "run", _placeless(file), *_override_words(overrides)]
    if until is not None:
        words += ["--until", until]
    return shlex.join(words)


def measuring_command(
    name: str,
    targets: Sequence[Path],
    values: Mapping[str, tuple[object, object]],
    pipeline: Path | None,
    overrides: Sequence[str],
    flags: Mapping[str, bool],
    shapes: Sequence[str] = (),
) -> str:
    """The command that repeats a measurement.

    Args:
        name: such as 'bench'.
        targets: what it was given.
        values: by option what it is and what it is where it is left out.
        pipeline: of `--pipeline`.
        overrides: of `--set`.
        flags: whether each stands there.
        shapes: of `--shape`.
    """
    words = [str(word) for option, (value, default) in values.items() if value != default for word in (option, value)]
    words += [word for shape in shapes for word in ("--shape", shape)]
    words += [] if pipeline is None else ["--pipeline", _placeless(pipeline)]
    words += [*_override_words(overrides), *(flag for flag, stands in flags.items() if stands)]
    return shlex.join(["compress", name, *map(_placeless, targets), *words])


def _launcher() -> list[str]:
    """What stands before the command where several processes train together; on each machine, where there are several."""
    if machine.processes() == 1:
        return []
    here = machine.processes_here()
    nodes = machine.processes() // here
    return ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", str(here), "-m"]


def _placeless(path: Path) -> str:
    return path.name if path.is_absolute() else path.as_posix()


def _override_words(overrides: Sequence[str]) -> list[str]:
    words = []
    for override in overrides:
        key, _, value = override.partition("=")
        words += ["--set", f"{key}={Path(value).name if Path(value).is_absolute() else value}"]
    return words
