"""What `compress bench` is given on disk, and the ONNX files behind it: checkpoints, runs, folders of files, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import onnx
from pydantic import ValidationError

from compress import checkpoint as checkpoints
from compress.bench.measure import MEASURED_ONNX, deployed_file
from compress.checkpoint import Checkpoint
from compress.data.base import Input
from compress.distinct import Parts, distinct
from compress.errors import CheckpointError, CompressError, listed, nearest
from compress.events import Progress
from compress.files import sha256_of, write_file
from compress.manifest import FILE_NAME
from compress.measured import METRICS, Measurement
from compress.names import near_path
from compress.onnx_io.convert import serialized
from compress.onnx_io.float_graph import float_graph
from compress.results import RESULTS, Results, Row, load_results

ONNX: Final = ".onnx"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shape of one sample, without the batch, by name of the input."""
TAKEN: Final = "an .onnx file, a checkpoint, a run, or a folder of .onnx files"


@dataclass(frozen=True)
class Model:
    """One model to measure."""

    name: str
    """Different from the names of all others."""
    path: Path
    """Its ONNX file."""
    checkpoint: Checkpoint | None = None
    trusted: frozenset[str] = frozenset()
    """Factories of the user's code that may be run to build the checkpoint."""
    row: Row | None = None
    """What its run measured of it."""
    results: Results | None = None
    """Of that run."""


def shapes_of(models: Sequence[Model], asked: Shapes) -> Mapping[str, Shapes]:
    """Which of the shapes that were asked for concern each model, by its name.

    Args:
        models: files that were read before.
        asked: by name of an input, whichever models have one of it; '' is the input of every model with only one.

    Raises:
        CompressError: where no model has an input of a name, or only one input where that is left out.
    """
    inputs = {model.name: _input_names(model.path) for model in models} if asked else {}
    every = list(dict.fromkeys(name for names in inputs.values() for name in names))
    for name in asked:
        if name and name not in every:
            raise CompressError(
                f"--shape: no model has an input '{name}' (there are {listed(every)}){nearest(name, every)}"
            )
        if not name and all(len(names) != 1 for names in inputs.values()):
            raise CompressError(f"--shape: no model has one input only: name it (there are {listed(every)})")
    found: dict[str, Shapes] = {}
    for model in models:
        names = inputs.get(model.name, ())
        alone = {names[0]: asked[""]} if len(names) == 1 and "" in asked else {}
        found[model.name] = alone | {name: asked[name] for name in names if name in asked}
    return found


def _input_names(path: Path) -> tuple[str, ...]:
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return tuple(value.name for value in graph.input if value.name not in constants)


@dataclass(frozen=True)
class _Found:
    """A model before it has a name and, perhaps, before it is converted."""

    place: Parts
    path: Path | None
    checkpoint: Checkpoint | None = None
    row: Row | None = None
    results: Results | None = None


def resolve(targets: Sequence[Path], scratch: Path, progress: Progress, *, trust_code: bool) -> tuple[Model, ...]:
    """The models of all targets, in their order; of a run its reference first, then its other rows.

    A float checkpoint comes as the ONNX file that was measured of it, where that is still there, or else is converted.

    Args:
        targets: files and folders, at least one.
        scratch: folder for files that must be converted; they are needed as long as the models are.
        progress: told of what is converted.
        trust_code: run the checkpoints' own model code, which converting and PyTorch need.

    Raises:
        CompressError: where a target is not there or is nothing that can be measured, a checkpoint is damaged, or one must
            be converted and is made by code that is not trusted.
    """
    found = [one for target in targets for one in _found(target)]
    names = distinct([one.place for one in found])
    models: list[Model] = []
    for position, (one, name) in enumerate(zip(found, names, strict=True)):
        trusted: frozenset[str] = frozenset()
        if one.checkpoint is not None and trust_code:
            trusted = frozenset({one.checkpoint.arch.factory})
        path = one.path
        if path is None:
            assert one.checkpoint is not None
            path = scratch / str(position) / MEASURED_ONNX
            progress.note(f"converting '{name}' to ONNX")
            _convert(one.checkpoint, path, trusted)
        models.append(Model(name, path, one.checkpoint, trusted, one.row, one.results))
    return tuple(models)


def _found(target: Path) -> Iterator[_Found]:
    if target.is_file():
        yield _file(target)
    elif not target.is_dir():
        raise CompressError(f"{target}: no such file or folder{near_path(target, (ONNX,), folders=True)}")
    elif (target / FILE_NAME).is_file():
        checkpoint = checkpoints.load(target)
        yield _checkpoint(checkpoint, _kept_sha256(target))
    elif (target / RESULTS).is_file():
        yield from _run(target)
    else:
        yield from _files(target)


def _file(target: Path) -> _Found:
    if target.name in (RESULTS, FILE_NAME, METRICS):
        raise CompressError(f"{target}: is no model; did you mean its folder, '{target.parent}'?")
    if target.suffix.lower() != ONNX:
        raise CompressError(f"{target}: is no .onnx file; a target is {TAKEN}")
    return _Found((*target.resolve().parent.parts, target.stem), target)


def _files(folder: Path) -> Iterator[_Found]:
    """Of a folder that is neither checkpoint nor run, such as a run's `dist/`, every ONNX file."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ONNX and path.is_file())
    if not files:
        inside = sorted(
            path.name for path in folder.iterdir() if any((path / name).is_file() for name in (FILE_NAME, RESULTS))
        )
        hint = f"; in it are {listed(inside)}" if inside else ""
        raise CompressError(f"{folder}: holds nothing to measure{hint}; a target is {TAKEN}")
    yield from map(_file, files)


def _run(folder: Path) -> Iterator[_Found]:
    results = load_results(folder / RESULTS)
    reference = results.reference_row()
    for row in (reference, *(row for row in results.rows if row is not reference)):
        place = folder / Path(row.checkpoint).name
        if not place.is_dir():
            raise CompressError(
                f"{folder}: the checkpoint of '{row.stage}' is not there any more ({place.name}); run the pipeline again, "
                "or name single files"
            )
        checkpoint = checkpoints.load(place)
        if checkpoint.digest != row.digest:
            raise CheckpointError(f"{place}: is not the checkpoint that {folder / RESULTS} was written of")
        found = _checkpoint(checkpoint, row.sha256)
        yield replace(found, place=(*folder.resolve().parts, row.stage), row=row, results=results)


def _checkpoint(checkpoint: Checkpoint, sha256: str | None) -> _Found:
    """A checkpoint with the file that it brings, or that was measured of it and has this digest."""
    place = (*checkpoint.path.resolve().parts, checkpoint.history[-1].stage)
    path = deployed_file(checkpoint)
    if path is None:
        kept = checkpoint.path / MEASURED_ONNX
        path = kept if kept.is_file() and sha256_of(kept) == sha256 else None
    return _Found(place, path, checkpoint)


def _kept_sha256(folder: Path) -> str | None:
    """Digest of the file that was measured of a checkpoint, None where that is not known."""
    try:
        return Measurement.model_validate_json((folder / METRICS).read_bytes()).sha256
    except (OSError, ValidationError):
        return None


def _convert(checkpoint: Checkpoint, path: Path, trusted: frozenset[str]) -> None:
    if not _is_trusted(checkpoint, trusted):
        raise CheckpointError(
            f"{checkpoint.path}: holds no ONNX file, and its model is made by '{checkpoint.arch.factory}', which is code; "
            "it is not run unless you say so (--trust-code), because a checkpoint may come from a stranger"
        )
    inputs = [Input(each.name, each.shape, each.dtype, each.mean, each.std) for each in checkpoint.inputs]
    write_file(path, serialized(float_graph(checkpoint, checkpoint.build(trusted), inputs)))


def _is_trusted(checkpoint: Checkpoint, trusted: frozenset[str]) -> bool:
    return not checkpoint.arch.is_code() or checkpoint.arch.factory in trusted
