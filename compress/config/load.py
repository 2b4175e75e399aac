"""Read pipeline files: every problem at once, each with file, line and key."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from compress.config.base import Config
from compress.config.pipeline import Pipeline
from compress.config.stages import STAGE_CONFIGS, ModelConfig
from compress.errors import ConfigError, Problem, listed, nearest
from compress.files import is_weights_file

MAX_FILE_BYTES = 1 << 20
Location = tuple[str | int, ...]


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: a YAML file. Relative paths inside it are relative to its folder.
        overrides: `key.path=value` settings laid over the file, checked by the same schema; the value is YAML, list
            items are addressed by number and stages also by name (`stages.prune.target.macs=0.4`). Relative paths in
            them are relative to the working directory.

    Raises:
        ConfigError: with every problem found, each naming file, line, key and what is allowed.
    """
    path = Path(path)
    document = _read_yaml(path)
    problems: list[Problem] = []
    overridden: set[Location] = set()
    for override in overrides:
        try:
            overridden.add(_apply_override(document, override))
        except ValueError as error:
            problems.append(Problem("--set", override, str(error)))
    problems.extend(_not_plain(document, path))
    if problems:
        raise ConfigError(problems)
    order = list(_order_problems(document, path))
    try:
        # Strict pydantic takes JSON's arrays for tuples and strings for paths, but not Python's lists and strings.
        pipeline = Pipeline.model_validate_json(json.dumps(_plain(document)))
    except ValidationError as error:
        found = [_problem(details, document, path, overridden) for details in _in_file_order(error.errors(), document)]
        raise ConfigError([*_merged(found), *order]) from None
    if order:
        raise ConfigError(order)
    located: Pipeline = _with_absolute_paths(pipeline, path.resolve().parent, overridden, ())
    return located


def _read_yaml(path: Path) -> CommentedMap:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([Problem(str(path), "", f"is larger than {MAX_FILE_BYTES:,} bytes; not a pipeline file")])
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise ConfigError([Problem(str(path), "", f"no such file{near}")]) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem(str(path), "", "is not UTF-8 text")]) from None
    except OSError as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        key = re.search(r'duplicate key "([^"]*)"', str(error))
        named = f"key '{key.group(1)}'" if key else "a key"
        raise ConfigError([Problem(f"{path}:{line}", "", f"{named} stands twice")]) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([Problem(where, "", f"is not valid YAML: {error.problem or error.context}")]) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([Problem(str(path), "", f"is not valid YAML: {error}")]) from None
    if not isinstance(document, CommentedMap):
        raise ConfigError([Problem(f"{path}:1", "", "must be a mapping with keys such as name, data, model, stages")])
    return document


def _not_plain(node: Any, path: Path, at: Location = (), line: int = 1) -> Iterable[Problem]:
    """Tags, dates and keys that are not text: YAML has them, pipeline files do not."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = _key_line(node, key, line)
            if not isinstance(key, str):
                yield Problem(f"{path}:{here}", _dotted(at), f"key {key!r} must be text")
            else:
                yield from _not_plain(value, path, (*at, key), here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _not_plain(value, path, (*at, index), _key_line(node, index, line))
    elif isinstance(node, TaggedScalar):
        yield Problem(f"{path}:{line}", _dotted(at), f"the YAML tag {node.tag} is not allowed")
        return
    elif not isinstance(node, (str, int, float, bool, type(None))):
        yield Problem(f"{path}:{line}", _dotted(at), f"must be text, a number, a list or a mapping, got {node!s}")
    tag = getattr(getattr(node, "tag", None), "value", None)
    if isinstance(node, (CommentedMap, CommentedSeq)) and tag is not None:
        yield Problem(f"{path}:{line}", _dotted(at), f"the YAML tag {tag} is not allowed")


def _plain(node: Any) -> Any:
    """Ruamel's round-trip types as Python's own; a list item such as `- prune:` means `- prune: {}`."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        items = [_plain(value) for value in node]
        return [{key: {} for key in item} if _is_bare_key(item) else item for item in items]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _is_bare_key(item: Any) -> bool:
    return isinstance(item, dict) and len(item) == 1 and next(iter(item.values())) is None


def _apply_override(document: CommentedMap, override: str) -> Location:
    """Lay one `key.path=value` over the document; returns where it landed."""
    keys, equals, text = override.partition("=")
    if not equals or not keys.strip():
        raise ValueError("must look like key.path=value")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError:
        raise ValueError(f"the value {text!r} is not valid YAML") from None
    node: Any = document
    at: list[str | int] = []
    parts = keys.strip().split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(node, list):
            index = _list_index(node, part, at)
            at.append(index)
            if not part.isdigit():  # a stage by its name: its settings stand one level deeper
                node, at = node[index], [*at, part]
            place: str | int = index if part.isdigit() else part
        elif isinstance(node, dict):
            at.append(part)
            place = part
        else:
            raise ValueError(f"'{_dotted(tuple(at))}' has no keys inside")
        if last:
            node[place] = value
            break
        if isinstance(node, dict) and not isinstance(node.get(place), (dict, list)):
            node[place] = CommentedMap()
        node = node[place]
    return tuple(at)


def _list_index(node: list[Any], part: str, at: Sequence[str | int]) -> int:
    if part.isdigit():
        if int(part) >= len(node):
            raise ValueError(f"'{_dotted(tuple(at))}' has {len(node)} items, counted from 0")
        return int(part)
    names = [next(iter(item)) if isinstance(item, dict) and item else str(item) for item in node]
    found = [index for index, name in enumerate(names) if name == part]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"'{part}' stands {len(found)} times in '{_dotted(tuple(at))}'; use its number, from 0")
    raise ValueError(f"'{_dotted(tuple(at))}' has no item '{part}' (it has {listed(names)}){nearest(part, names)}")


def _key_line(node: Any, key: str | int, default: int) -> int:
    """Line (from 1) where a key or item of a round-trip node stands."""
    try:
        position = node.lc.key(key) if isinstance(node, CommentedMap) else node.lc.item(key)
    except (KeyError, AttributeError, TypeError, IndexError):
        position = None
    # What the command line added has no position in the file.
    return default if position is None else int(position[0]) + 1


def _order_problems(document: CommentedMap, path: Path) -> Iterable[Problem]:
    """Stages that cannot follow each other, such as pruning an int8 graph; names both."""
    entries = document.get("stages")
    if not isinstance(entries, list):
        return
    form, maker = "float", "the source model"
    for index, entry in enumerate(entries):
        name = next(iter(entry), None) if isinstance(entry, dict) else None
        config = STAGE_CONFIGS.get(str(name))
        if config is None:
            continue
        if form not in config.takes:
            yield Problem(
                f"{path}:{_key_line(entries, index, 1)}",
                f"stages.{index}",
                f"'{name}' cannot come after {maker}: it takes a {' or '.join(config.takes)} model "
                f"and gets a{'n' if form[0] in 'aei' else ''} {form} one; put '{name}' before",
            )
            return
        form, maker = config.gives, f"'{name}' (stages.{index})"


def _locate(document: CommentedMap, location: Location) -> tuple[int, Location]:
    """Line of the deepest part of `location` that stands in the document, and the part of it that are keys there."""
    node: Any = document
    line = 1
    keys: list[str | int] = []
    for part in location:
        is_item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_item or (isinstance(node, dict) and part in node):
            line, node = _key_line(node, part, line), node[part]
            keys.append(part)
        elif part in ("digits", "arrays", "image_folder", "torchvision", "python") and keys == ["data"]:
            continue  # pydantic names the member of the union; the file does not
        elif isinstance(node, dict):
            keys.append(part)  # a key that is missing
            node = None
    return line, tuple(keys)


def _in_file_order(errors: list[ErrorDetails], document: CommentedMap) -> list[ErrorDetails]:
    return sorted(errors, key=lambda details: _locate(document, details["loc"])[0])


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem per key: a setting that may be one of two kinds is reported for each kind it is not."""
    by_key: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first = by_key.setdefault((problem.where, problem.key), problem)
        if first is not problem:
            kind = problem.message.partition(", got ")[0].removeprefix("must be ")
            by_key[problem.where, problem.key] = replace(
                first, message=first.message.replace(", got ", f" or {kind}, got ", 1)
            )
    return list(by_key.values())


def _problem(details: ErrorDetails, document: CommentedMap, path: Path, overridden: set[Location]) -> Problem:
    line, keys = _locate(document, details["loc"])
    from_override = any(keys[: len(location)] == location for location in overridden)
    return Problem("--set" if from_override else f"{path}:{line}", _dotted(keys), _message(details, keys))


def _message(details: ErrorDetails, keys: Location) -> str:
    kind, context, given = details["type"], details.get("ctx", {}), details["input"]
    if kind == "extra_forbidden":
        allowed = _keys_at(keys[:-1])
        return f"unknown key (allowed: {listed(allowed, 20)}){nearest(str(keys[-1]), allowed)}"
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return "must have the key 'kind': digits, arrays, image_folder, torchvision or python"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return f"kind must be one of {listed(tags)}, got {context['tag']!r}{nearest(str(context['tag']), tags)}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"must be {context['expected']}, got {given!r}{nearest(str(given), allowed)}"
    if kind == "value_error":
        return str(context["error"])
    text = details["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    text = text[0].lower() + text[1:]
    shown = json.dumps(given, default=str)
    return f"{text}, got {shown if len(shown) <= 60 else shown[:57] + '…'}"


def _keys_at(keys: Location) -> list[str]:
    """Keys that the schema allows at a place of the file."""
    model: Any = Pipeline
    for key in keys:
        if isinstance(key, int) or model is None:
            continue
        model = _inner_model(model.model_fields[key].annotation)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The settings class somewhere inside an annotation such as `tuple[X, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _inner_model(inner)
        if found is not None:
            return found
    return None


def _with_absolute_paths(config: Config, base: Path, overridden: set[Location], at: Location) -> Any:
    """The settings with each relative path made absolute: the file's are relative to it, the command line's to the cwd."""
    changed: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, here = getattr(config, name), (*at, field.alias or name)
        root = Path.cwd() if any(here[: len(location)] == location for location in overridden) else base
        if isinstance(value, Config):
            new: Any = _with_absolute_paths(value, base, overridden, here)
        elif isinstance(value, tuple) and any(isinstance(item, Config) for item in value):
            new = tuple(_with_absolute_paths(item, base, overridden, (*here, i)) for i, item in enumerate(value))
        elif isinstance(value, Path):
            new = Path(os.path.normpath(root / value.expanduser()))
        elif name in ("factory", "callable") and ".py:" in value:
            file, _, attribute = value.rpartition(":")
            new = f"{os.path.normpath(root / Path(file).expanduser())}:{attribute}"
        elif isinstance(config, ModelConfig) and name == "weights" and value and is_weights_file(value):
            new = os.path.normpath(root / Path(value).expanduser())
        else:
            continue
        if new != value:
            changed[name] = new
    return config.model_copy(update=changed) if changed else config


def _dotted(keys: Location) -> str:
    return ".".join(str(key) for key in keys)
