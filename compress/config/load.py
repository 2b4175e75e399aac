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

from compress.config.base import Config
from compress.config.document import Document, Location, dotted
from compress.config.pipeline import NAME_RULE, Origin, Pipeline, usable_name
from compress.config.stages import STAGE_CONFIGS
from compress.config.training import ModelConfig
from compress.errors import ConfigError, Problem, listed, nearest
from compress.names import is_weights_file

_DATA_KINDS = ("digits", "arrays", "image_folder", "torchvision", "python")
_KINDS = {
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "path_type": "a path",
}


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
    document = Document(path)
    for override in overrides:
        document.override(override)
    problems = [*document.problems, *_order_problems(document)]
    try:
        # Strict pydantic takes JSON's arrays for tuples and strings for paths, but not Python's lists and strings.
        pipeline = Pipeline.model_validate_json(json.dumps(_with_empty_settings(document.data)))
    except ValidationError as error:
        known = {problem.key for problem in document.problems}
        found = [_problem(details, document) for details in _outermost(error.errors())]
        problems += [problem for problem in _merged(found) if problem.key not in known]
    if problems:
        raise ConfigError(sorted(problems, key=_line_of))
    located: Pipeline = _with_absolute_paths(pipeline, path.resolve().parent, document, ())
    located._origin = Origin(document.places())
    return located


def _with_empty_settings(node: Any, at: Location = ()) -> Any:
    """`- prune:` in the list of stages, or `- kd:` among losses, means `- prune: {}`."""
    if isinstance(node, dict):
        return {key: _with_empty_settings(value, (*at, key)) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    items = [_with_empty_settings(item, (*at, index)) for index, item in enumerate(node)]
    if at[:1] != ("stages",) or at[-1] not in ("stages", "losses") or "kwargs" in at:
        return items
    return [{key: {} for key in item} if _is_bare_key(item) else item for item in items]


def _is_bare_key(item: Any) -> bool:
    return isinstance(item, dict) and len(item) == 1 and next(iter(item.values())) is None


def _line_of(problem: Problem) -> int:
    """Problems of the file in its order, then those of the command line."""
    _, colon, line = problem.where.rpartition(":")
    return int(line) if colon and line.isdecimal() else 1 << 30


def _order_problems(document: Document) -> Iterable[Problem]:
    """Stages that cannot follow each other, such as pruning an int8 graph; names both."""
    entries = document.data.get("stages")
    if not isinstance(entries, list):
        return
    form, maker, made_at = "float", "", 0
    for index, entry in enumerate(entries):
        name = next(iter(entry), None) if isinstance(entry, dict) else None
        config = STAGE_CONFIGS.get(str(name))
        if config is None:
            continue
        if form in config.takes:
            form, maker, made_at = config.gives, str(name), index
            continue
        at: Location = ("stages", index)
        before: Location = ("stages", made_at)
        advice = "leave out one of the two" if maker == name else f"put '{name}' before it"
        yield Problem(
            document.where(at),
            dotted(at),
            f"'{name}' cannot come after '{maker}' ({dotted(before)}, line {document.line(before)}): it takes a "
            f"{' or '.join(config.takes)} model and gets an {form} one; {advice}",
        )


def _locate(document: Document, location: Location) -> Location:
    """The part of an error's location that are keys of the file, or would be: pydantic also names members of unions."""
    node: Any = document.data
    keys: list[str | int] = []
    for part in location:
        is_item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_item or (isinstance(node, dict) and part in node):
            node = node[part]
            keys.append(part)
        elif (part in _DATA_KINDS and keys == ["data"]) or "[" in str(part):  # such as dict[str,str]
            continue
        elif isinstance(node, dict):
            keys.append(part)  # a key that is missing
            node = None
    return tuple(keys)


def _outermost(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without errors that only follow from another: a list whose items are wrong is also reported as too short."""
    places = [details["loc"] for details in errors]
    return [
        details
        for details in errors
        if not (
            details["type"] == "too_short"
            and any(
                len(place) > len(details["loc"]) and place[: len(details["loc"])] == details["loc"] for place in places
            )
        )
    ]


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem per key: a setting that may be one of two kinds is reported for each kind it is not."""
    by_key: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first = by_key.setdefault((problem.where, problem.key), problem)
        if first is not problem:
            kind = problem.message.partition(", got ")[0].removeprefix("must be ")
            message = first.message.replace(", got ", f" or {kind}, got ", 1)
            by_key[first.where, first.key] = replace(
                first, message=message.replace("a whole number or a number", "a number")
            )
    return list(by_key.values())


def _problem(details: ErrorDetails, document: Document) -> Problem:
    keys = _locate(document, details["loc"])
    if details["type"] == "missing" and keys[-1:] != details["loc"][-1:]:
        keys = (*keys, details["loc"][-1])  # inside settings that are null
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        keys = (*keys, "kind")
    message = _message(details, keys)
    inner = re.match(r"([a-z_]+): ", message) if details["type"] == "value_error" else None
    if inner:  # a check over several keys names the one that is to blame
        keys, message = (*keys, inner[1]), message[inner.end() :]
    is_stage = len(keys) == 3 and keys[0] == "stages" and details["type"] == "extra_forbidden"
    if is_stage:
        message = _unknown_stage(document, keys)
    return Problem(document.where(keys), dotted(keys), message)


def _unknown_stage(document: Document, keys: Location) -> str:
    entry = document.data["stages"][keys[1]]
    owner = next((name for name in entry if name in STAGE_CONFIGS), None)
    if owner is not None:
        return f"is no stage; if it is a setting of '{owner}', indent it deeper than '{owner}'"
    return f"unknown stage (there are: {listed(STAGE_CONFIGS)}){nearest(str(keys[2]), STAGE_CONFIGS)}"


def _message(details: ErrorDetails, keys: Location) -> str:
    kind, context, given = details["type"], details.get("ctx", {}), details["input"]
    shown = json.dumps(given, default=str, ensure_ascii=False)
    got = f", got {shown if len(shown) <= 60 else shown[:57] + '…'}"
    if kind in _KINDS:
        is_bare_stage = len(keys) == 2 and keys[0] == "stages" and isinstance(given, str) and given in STAGE_CONFIGS
        hint = f"; write '- {given}:' with a colon, or '- {given}: {{…}}'" if is_bare_stage else ""
        return f"must be {_KINDS[kind]}{got}{hint}"
    if kind == "extra_forbidden":
        allowed = _keys_at(keys[:-1])
        return f"unknown key (allowed: {listed(allowed, 20)}){nearest(str(keys[-1]), allowed)}"
    if kind == "missing":
        return "is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = given.get("kind")
        if tag is None:
            return f"is missing: one of {listed(_DATA_KINDS)}"
        return f"must be one of {listed(_DATA_KINDS)}, got {json.dumps(tag)}{nearest(str(tag), _DATA_KINDS)}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"must be {context['expected']}{got}{nearest(str(given), allowed)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"must have at least {context['min_length']} item{'s' if context['min_length'] > 1 else ''}{got}"
    if kind == "string_too_short":
        return f"must have at least {context['min_length']} character{'s' if context['min_length'] > 1 else ''}{got}"
    if kind == "string_pattern_mismatch":
        if keys == ("name",):
            usable = usable_name(str(given))
            return f"must be {NAME_RULE}{got}" + (f"; '{usable}' would do" if usable else "")
        if keys[-1] == "callable":
            return f"must be like 'package.module:function' or 'path/to/file.py:function'{got}"
        return f"must match the pattern {context['pattern']}{got}"
    text = details["msg"].replace("Input should be", "must be")
    return text[0].lower() + text[1:] + got


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


def _with_absolute_paths(config: Config, base: Path, document: Document, at: Location) -> Any:
    """The settings with each relative path made absolute: the file's are relative to it, the command line's to the cwd."""
    changed: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value, here = getattr(config, name), (*at, field.alias or name)
        root = Path.cwd() if document.is_overridden(here) else base
        if isinstance(value, Config):
            new: Any = _with_absolute_paths(value, base, document, here)
        elif isinstance(value, tuple) and any(isinstance(item, Config) for item in value):
            new = tuple(_with_absolute_paths(item, base, document, (*here, i)) for i, item in enumerate(value))
        elif isinstance(value, Path):
            new = Path(_absolute(root, str(value)))
        elif name in ("factory", "callable") and ".py:" in value:
            file, _, attribute = value.rpartition(":")
            new = f"{_absolute(root, file)}:{attribute}"
        elif isinstance(config, ModelConfig) and name == "weights" and value and is_weights_file(value):
            new = _absolute(root, value)
        else:
            continue
        if new != value:
            changed[name] = new
    return config.model_copy(update=changed) if changed else config


def _absolute(root: Path, path: str) -> str:
    return os.path.normpath(root / os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises on an unknown user
