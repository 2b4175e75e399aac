"""The manifest of a checkpoint folder: what it holds, what made it, and the digests that prove it. No torch.

A checkpoint is a folder:

    checkpoint.json     this manifest, written last
    model.safetensors   float weights
    quantization.json   once quantized: target, ranges, nodes kept in float
    model.onnx          once quantized: derived from the two
    …                   files that a stage adds, such as the exported artifacts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from compress.edits import Edit
from compress.errors import CheckpointError
from compress.files import canonical_json, readable_json, sha256_of
from compress.measured import PruningSensitivity
from compress.names import placeless

FILE_NAME = "checkpoint.json"
WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization.json"
MODEL_ONNX = "model.onnx"
# What `export` adds, and what `dist/` holds.
FP32_ONNX, INT8_ONNX, METADATA = "model.fp32.onnx", "model.int8.onnx", "metadata.json"
VERSION: Final = 2
_DECIDES = ("version", "arch", "edits", "form", "memory_format", "aliases", "inputs", "classes", "files")
"""Fields that decide what the model computes."""
_MAX_BYTES = 256 << 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ArchRecord(_Part):
    """The architecture before any edit."""

    factory: str
    kwargs: dict[str, JsonValue] = {}
    code: str | None = None
    """SHA-256 of the file that a user's factory stands in; None for built-in ones."""


class FileRecord(_Part):
    """One file of the folder."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class InputRecord(_Part):
    """One of the tensors that the model takes."""

    name: str
    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: Literal["float32", "int64"] = "float32"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Per channel, for images scaled to [0, 1]; both empty where the input is not normalised."""


class HistoryEntry(_Part):
    """One stage in the life of the model."""

    stage: str
    parent: str | None
    """Digest of the checkpoint it was made from."""
    settings: JsonValue
    seconds: float
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    training: tuple[dict[str, float | int], ...] = ()
    """A row per epoch."""
    sensitivity: PruningSensitivity | None = None
    """What pruning decided by, where it measured that."""


class Manifest(_Part):
    """Everything about a checkpoint but the tensors."""

    version: Literal[2] = VERSION
    arch: ArchRecord
    edits: tuple[Edit, ...] = ()
    form: Literal["float", "int8", "exported"]
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    aliases: dict[str, str] = {}
    """Names of tied tensors, each with the name under which its values are saved."""
    inputs: tuple[InputRecord, ...] = Field(min_length=1)
    """In the order in which the model takes them."""
    classes: tuple[str, ...]
    history: tuple[HistoryEntry, ...]
    key: dict[str, JsonValue]
    """All that could change this checkpoint: what the cache compares."""
    files: dict[str, FileRecord]
    digest: str
    """SHA-256 over the content: everything that decides what the model computes, and no time or place."""
    checksum: str
    """SHA-256 over the rest of the manifest."""


def seal(content: Mapping[str, Any]) -> Manifest:
    """Complete a manifest by its two digests."""
    draft = Manifest.model_validate({**content, "digest": "", "checksum": ""}, strict=False)
    digest = _digest(draft.model_dump(mode="json"))
    complete = draft.model_copy(update={"digest": digest})
    return complete.model_copy(update={"checksum": _checksum(complete.model_dump(mode="json"))})


def dump(manifest: Manifest) -> bytes:
    """The manifest as JSON for people."""
    return readable_json(manifest.model_dump(mode="json"))


def read(folder: Path) -> Manifest:
    """Read and check the manifest of a folder, not the files it lists.

    Raises:
        CheckpointError: where it is missing, damaged, changed by hand, or of another version.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: is too large for a manifest")
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint (there is no {FILE_NAME} in it)") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        content = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is damaged (no valid JSON)") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{path}: {_other_version(version)}")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: is damaged: {key}: {first['msg']}") from None
    # Over what is written, not over what this version makes of it: what it adds with a default changes no old checkpoint.
    try:
        is_whole = manifest.checksum == _checksum(content) and manifest.digest == _digest(content)
    except ValueError:  # 1e999 is JSON, and no number
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{path}: is damaged or was changed: its content does not match its checksum")
    return manifest


def _no_number(word: str) -> None:
    raise ValueError(word)


def _other_version(version: object) -> str:
    reads = f"this program reads version {VERSION}"
    if not isinstance(version, int):
        return f"has format version {version!r}; {reads}"
    if version > VERSION:
        return f"was written by a newer version of this program, in format version {version}; {reads}: install the newer one"
    return (
        f"was written by an older version of this program, in format version {version}; {reads}: run its pipeline again"
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every file that the manifest lists against its size and SHA-256.

    Raises:
        CheckpointError: naming the first bad file.
    """
    if WEIGHTS not in manifest.files:
        raise CheckpointError(f"{folder}: the manifest lists no {WEIGHTS}")
    for name, record in manifest.files.items():
        path = folder / name
        if name != Path(name).name or name in ("", "..") or "\0" in name or path.is_symlink():
            raise CheckpointError(f"{folder}: the manifest names the file '{name}', which is not a file of this folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        if (size := path.stat().st_size) != record.bytes:
            raise CheckpointError(f"{path}: is damaged: {size} bytes, expected {record.bytes}")
        if sha256_of(path) != record.sha256:
            raise CheckpointError(f"{path}: is damaged: its SHA-256 is not the one in {FILE_NAME}")


def describe_file(path: Path) -> FileRecord:
    """Digest and size of a file."""
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


def _digest(content: Mapping[str, Any]) -> str:
    decides = {name: content[name] for name in _DECIDES if name in content}
    arch = content["arch"]
    decides["arch"] = {**arch, "factory": placeless(arch["factory"])}  # the same wherever the file lies
    return hashlib.sha256(canonical_json(decides)).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        canonical_json({name: value for name, value in content.items() if name != "checksum"})
    ).hexdigest()
