"""What a result depends on: digests of code, versions of libraries, settings without the places of this machine."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from compress.config import Config
from compress.files import canonical_json, sha256_of
from compress.machine import version
from compress.names import callable_file, is_code, is_weights_file

PACKAGE = Path(__file__).resolve().parent
# Their values stand in the key itself, so that a new setting of one stage does not cost another its cache.
_NOT_CODE = (
    "compress.config",
    "compress.errors",
    "compress.events",
    "compress.results",
    "compress.measured",
    "compress.manifest",
)
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "timm": "timm",
    "torch": "torch",
    "torch_pruning": "torch-pruning",
    "torchvision": "torchvision",
}


@functools.cache
def closure(module: str) -> tuple[str, ...]:
    """The modules of this package that `module` imports, itself included, directly or not, at any depth of the code."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        # The package's own __init__ only passes names on; following it would take in everything.
        if name in found or name == PACKAGE.name or name.startswith(_NOT_CODE):
            continue
        found.add(name)
        pending += [inner for inner in _imports(name) if inner.split(".")[0] == PACKAGE.name]
    return tuple(sorted(found))


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 over the code of a module's closure; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in closure(module):
        digest.update(f"{name}\n{_code_of(name)}\n".encode())
    return digest.hexdigest()


@functools.cache
def versions(module: str) -> dict[str, str]:
    """Versions of the libraries that a module's closure imports and that can change its results."""
    used = {imported.split(".")[0] for name in closure(module) for imported in _imports(name)}
    if "torch" in used:
        used.add("onnxscript")
    found = {_DISTRIBUTIONS[name]: version(_DISTRIBUTIONS[name]) for name in used if name in _DISTRIBUTIONS}
    return {name: number for name, number in sorted(found.items()) if number is not None}


def identity(settings: Config) -> dict[str, JsonValue]:
    """Settings with each file replaced by its digest and without folders: the same wherever the files lie."""
    plain: dict[str, JsonValue] = _placeless(settings.model_dump(mode="json", by_alias=True, exclude_none=True))
    return plain


def code_of(factory: str) -> str | None:
    """SHA-256 of the file a user's factory stands in; None for built-in ones and where there is no such file.

    Files which that one imports are not seen.
    """
    file = callable_file(factory) if is_code(factory) else None
    return _cached_digest(file, file.stat().st_mtime_ns) if file and file.is_file() else None


def key_digest(key: Mapping[str, JsonValue]) -> str:
    """SHA-256 of a cache key."""
    return hashlib.sha256(canonical_json(key)).hexdigest()


def differences(old: JsonValue, new: JsonValue, at: str = "") -> list[str]:
    """Which fields of a key changed, each as `name: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted({*old, *new})
            for line in differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
        ]
    return [] if old == new else [f"{at}: {_short(old)} → {_short(new)}"]


def _short(value: JsonValue) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode()
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    if is_digest:
        return text[:8]
    return text if len(text) <= 40 else f"{text[:37]}…"


def _placeless(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        # What kwargs mean only the callable knows.
        return {name: inner if name == "kwargs" else _placeless(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_placeless(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if key == "weights" and is_weights_file(value):
        return _file_identity(Path(value))
    if key in ("factory", "callable") and (file := callable_file(value) if is_code(value) else None):
        return {**_file_identity(file), "name": value.rpartition(":")[2]}
    return Path(value).name if key == "root" else value


def _file_identity(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": _cached_digest(path, path.stat().st_mtime_ns) if path.is_file() else "missing"}


@functools.lru_cache(maxsize=256)
def _cached_digest(path: Path, _: int) -> str:
    return sha256_of(path)


def _path_of(module: str) -> Path | None:
    base = PACKAGE.parent / Path(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _path_of(module)
    return ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    return tuple(_walk_imports(module))


def _walk_imports(module: str) -> Iterator[str]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            for alias in node.names:  # `from compress import surgery` names a module
                if _path_of(f"{node.module}.{alias.name}") and node.module.split(".")[0] == PACKAGE.name:
                    yield f"{node.module}.{alias.name}"


@functools.cache
def _code_of(module: str) -> str:
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
