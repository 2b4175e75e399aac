"""A pipeline file as plain data that still knows on which line everything stands, with `--set` laid over it."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from compress.errors import ConfigError, Problem, first_line, listed, nearest
from compress.names import near_path

MAX_FILE_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 60
Location = tuple[str | int, ...]


def dotted(location: Location) -> str:
    """A location as people write it: `stages.0.prune`."""
    return ".".join(part if isinstance(part, str) and part.isprintable() else json.dumps(part) for part in location)


class Document:
    """The content of a YAML file as Python's own dicts, lists and scalars, and where each value stands."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: where it is no readable YAML mapping.
        """
        self.path = path
        self.problems: list[Problem] = []
        """What YAML has and pipeline files do not (tags, dates, …), and overrides that lead nowhere."""
        self._lines: dict[Location, int] = {}
        self._overridden: set[Location] = set()
        self._values = 0
        node = _read_yaml(path)
        try:
            self.data: dict[str, Any] = self._plain(node, (), 1)
        except _TooMuchError as error:
            raise ConfigError([Problem(str(path), "", str(error))]) from None

    def is_overridden(self, location: Location) -> bool:
        """Whether the value at this location comes from `--set`."""
        return any(location[: len(place)] == place for place in self._overridden)

    def line(self, location: Location) -> int:
        """Line (from 1) of the deepest part of a location that stands in the file."""
        while location not in self._lines and location:
            location = location[:-1]
        return self._lines.get(location, 1)

    def where(self, location: Location) -> str:
        """`file:line`, or `--set`."""
        return "--set" if self.is_overridden(location) else f"{self.path}:{self.line(location)}"

    def places(self) -> dict[str, str]:
        """`where` of everything that stands in the document, by dotted key."""
        return {dotted(location): self.where(location) for location in self._lines if location}

    def override(self, setting: str) -> None:
        """Lay one `key.path=value` over the document; whatever is wrong with it is added to the problems."""
        try:
            keys, equals, text = setting.partition("=")
            parts = keys.strip().split(".")
            if not equals or not all(parts):
                raise ValueError("must look like key.path=value")
            try:
                value = YAML(typ="rt", pure=True).load(text) if text.strip() else None
            except (YAMLError, ValueError, RecursionError):
                raise ValueError(f"the value {text!r} is not valid YAML") from None
            self._put(parts, value)
        except ValueError as error:
            self.problems.append(Problem("--set", setting, str(error)))

    def _put(self, parts: Sequence[str], value: Any) -> None:
        node: Any = self.data
        at: Location = ()
        for position, part in enumerate(parts):
            place: str | int = part
            if isinstance(node, list):
                place = _list_index(node, part, at)
                if not part.isdecimal():  # a stage by its name: its settings stand one level deeper
                    node, at, place = node[place], (*at, place), part
            at = (*at, place)
            if position == len(parts) - 1:
                self._overridden.add(at)
                node[place] = self._plain(value, at, 1)
                return
            if isinstance(node, dict) and node.get(place) is None:
                self._overridden.add(at)
                node[place] = {}
            node = node[place]
            if not isinstance(node, (dict, list)):
                raise ValueError(f"'{dotted(at)}' is {json.dumps(node, default=str)}, which has no keys inside")

    def _plain(self, node: Any, at: Location, line: int) -> Any:
        self._lines[at] = line
        self._values += 1
        if self._values > _MAX_VALUES or len(at) > _MAX_DEPTH:  # aliases can multiply, or contain themselves
            raise _TooMuchError(f"holds more than {_MAX_VALUES:,} values, or values nested over {_MAX_DEPTH} deep")
        tag = getattr(getattr(node, "tag", None), "value", None)
        if isinstance(node, TaggedScalar) or tag is not None:
            self._complain(at, f"the YAML tag {str(tag).replace('tag:yaml.org,2002:', '!!')} is not allowed")
            return None
        if isinstance(node, dict):
            content = {}
            for key, value in node.items():
                place = (*at, str(key))
                content[str(key)] = self._plain(value, place, _key_line(node, key, line))
                if not isinstance(key, str):
                    self._complain(place, "the key must be text; put it in quotes")
                elif not _is_text(key):
                    self._complain(place, "the key holds a character that is no text")
                    del content[str(key)]
            return content
        if isinstance(node, list):
            return [self._plain(value, (*at, i), _key_line(node, i, line)) for i, value in enumerate(node)]
        if isinstance(node, str):
            if _is_text(node):
                return str(node)
            self._complain(at, "holds a character that is no text")
            return ""
        if isinstance(node, ScalarBoolean):  # true or false with an anchor
            return bool(node)
        if isinstance(node, bool) or node is None:
            return node
        if isinstance(node, int):
            if node.bit_length() > 63:
                self._complain(at, "is too large for a whole number")
            return int(node) if node.bit_length() <= 63 else 0
        if isinstance(node, float):
            if not math.isfinite(node):
                self._complain(at, f"must be a finite number, got {node}")
            return float(node) if math.isfinite(node) else 0.0
        hint = f"the date {node}; put it in quotes if you mean text"
        shown = hint if isinstance(node, datetime.date) else type(node).__name__
        self._complain(at, f"must be text, a number, a list or a mapping, got {shown}")
        return None

    def _complain(self, at: Location, message: str) -> None:
        self.problems.append(Problem(self.where(at), dotted(at), message))


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8 and used in a path: no half surrogate pair, no NUL."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


class _TooMuchError(ValueError):
    """Raised on a document without a reasonable end."""


def _read_yaml(path: Path) -> CommentedMap:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([Problem(str(path), "", f"is larger than {MAX_FILE_BYTES:,} bytes; not a pipeline file")])
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = near_path(path, (".yaml", ".yml")) or near_path(path, (path.suffix or ".yaml",))
        raise ConfigError([Problem(str(path), "", f"no such file{near}")]) from None
    except IsADirectoryError:
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        inside = f"in it are {listed(files)}" if files else "there is no YAML file in it"
        raise ConfigError([Problem(str(path), "", f"is a folder, not a pipeline file; {inside}")]) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem(str(path), "", "is not UTF-8 text")]) from None
    except OSError as error:
        raise ConfigError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None
    line: int | None = None
    try:
        document = YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        key = re.search(r'duplicate key "([^"]*)"', str(error))
        problem = f"key '{key.group(1)}' stands twice" if key else "a key stands twice"
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        text_of_it = error.problem or error.context or ""
        if text_of_it.startswith("but "):  # half a sentence
            text_of_it = f"{error.context} {text_of_it}"
        problem = f"is not valid YAML: {text_of_it}"
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"is not valid YAML: {error.reason} (character {error.character:#x})"
    except RecursionError:
        problem = "is not valid YAML: it is nested too deep"
    except (YAMLError, ValueError) as error:
        problem = f"is not valid YAML: {first_line(error)}"
    else:
        if isinstance(document, CommentedMap):
            return document
        line, problem = 1, "must be a mapping with keys such as name, data, model, stages"
    raise ConfigError([Problem(str(path) if line is None else f"{path}:{line}", "", problem)])


def _list_index(node: list[Any], part: str, at: Location) -> int:
    if part.isdecimal():
        if int(part) >= len(node):
            raise ValueError(f"'{dotted(at)}' has {len(node)} items, counted from 0")
        return int(part)
    names = [next(iter(item)) if isinstance(item, dict) and item else "" for item in node]
    found = [index for index, name in enumerate(names) if name == part]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = " or ".join(dotted((*at, index)) for index in found)
        raise ValueError(f"'{part}' stands {len(found)} times in '{dotted(at)}'; write {numbers}")
    has = f"it has {listed(filter(None, names))}" if any(names) else f"it has {len(node)} items without names"
    raise ValueError(f"'{dotted(at)}' has no item '{part}' ({has}){nearest(part, names)}")


def _key_line(node: Any, key: Any, default: int) -> int:
    """Line (from 1) where a key or item of a round-trip node stands."""
    try:
        position = node.lc.key(key) if isinstance(node, CommentedMap) else node.lc.item(key)
    except (KeyError, AttributeError, TypeError, IndexError):
        return default
    return default if position is None else int(position[0]) + 1
