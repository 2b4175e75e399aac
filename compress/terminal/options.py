"""What stands behind options of the command line that are more than one word: lists of numbers and of names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.config.pipeline import LatencyConfig
from compress.errors import CompressError, listed, nearest
from compress.files import TEMPORARY


def latency_config(batch_sizes: str, threads: str, rounds: int, seconds: float) -> LatencyConfig:
    """How latency is measured, from options as they were typed.

    Args:
        batch_sizes: whole numbers from 1 with commas between them; one that is repeated counts once.
        threads: the same.
        rounds: as in `LatencyConfig`.
        seconds: as there.

    Raises:
        CompressError: where a number is none, or is outside its range; names the option.
    """
    options = {"batch_sizes": "--batch-size", "threads": "--threads", "rounds": "--rounds", "seconds": "--seconds"}
    given: dict[str, Any] = {
        "batch_sizes": whole_numbers(batch_sizes, options["batch_sizes"]),
        "threads": whole_numbers(threads, options["threads"]),
        "rounds": rounds,
        "seconds": seconds,
    }
    try:
        return LatencyConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        rule = first["msg"].replace("Input should be", "must be")
        raise CompressError(f"{options[str(first['loc'][0])]}: {rule}, got {first['input']}") from None


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once, in their order.

    Raises:
        CompressError: where there is anything else.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise CompressError(
            f"{option}: must be whole numbers with commas between them, such as 1,8,32, got '{text}'"
        ) from None


def input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of one sample by name of the input, from `NAME=3x224x224`; the name is '' where it is left out.

    Raises:
        CompressError: where a shape is none, or an input has two.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, extents = text.rpartition("=")
        parts = extents.split("x")
        if (equals and not name) or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
            raise CompressError(
                "--shape: must be whole numbers from 1 with x between them, the name of the input before them where a file "
                f"has several, such as 3x224x224 or image=3x224x224, got '{text}'"
            )
        if name in found:
            which = f"input '{name}'" if name else "the only input"
            raise CompressError(f"--shape: {which} has two shapes")
        found[name] = tuple(map(int, parts))
    return found


def chosen(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    """Names with commas between them, each once, in their order.

    Raises:
        CompressError: where one is not known; names the nearest.
    """
    return tuple(dict.fromkeys(one_of(part.strip(), known, option) for part in text.split(",")))


def one_of(name: str, known: Sequence[str], option: str) -> str:
    """The name.

    Raises:
        CompressError: where it is not known; names the nearest.
    """
    if name not in known:
        raise CompressError(f"{option}: there is no '{name}' (there are {listed(known)}){nearest(name, known)}")
    return name


def writable(path: Path | None, option: str) -> None:
    """Check that a file can stand where an option says, before minutes are spent on what it is to hold.

    Raises:
        CompressError: where something else stands there, or the file cannot be made.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise CompressError(f"{option} {path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
            raise CompressError(f"{option} {path}: is no ordinary file, and would be replaced by one")
        there = path.parent
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise CompressError(f"{option} {path}: cannot be written there: {there} is not a folder")
        # As it will be written: under a longer name beside it. Permissions alone do not tell what a file system takes.
        with tempfile.NamedTemporaryFile(prefix=f"{TEMPORARY}{path.name}-", dir=there):
            pass
    except OSError as error:
        raise CompressError(f"{option} {path}: cannot be written: {error.strerror or error}") from None
