"""Errors of a run, told where the setting stands that they speak of, and where in the user's code they arose."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.config.base import Config
from compress.config.data import DigitsConfig, ImageFolderConfig, TorchvisionConfig
from compress.config.pipeline import Pipeline
from compress.config.stages import STAGE_CONFIGS
from compress.errors import CompressError, ConfigError
from compress.names import callable_file, is_code

_KEY = re.compile(r"([a-z_]+(?:\.[A-Za-z0-9_-]+)*): ")
_CHANNELS = re.compile(r"expected input\[\d+, (\d+)[^]]*\] to have (\d+) channels, but got \1 channels")
_SHAPE = re.compile(r"fails on inputs of shape \((\d+), \d+, \d+\)")
_CHANNEL_ARGUMENT = {"cifar": "in_channels", "classic": "in_channels", "timm": "in_chans"}


@contextmanager
def located(pipeline: Pipeline) -> Iterator[None]:
    """Give user errors raised inside the place of the setting that they name.

    Raises:
        CompressError: of the same kind, its message led by `file:line` or `--set`; unchanged where it names no setting
            or the pipeline does not come from a file.
    """
    try:
        yield
    except ConfigError:
        raise
    except CompressError as error:
        told = str(error)
        key = _KEY.match(told)
        if key is None:
            raise
        path = _full_key(pipeline, key[1])
        text = (
            told if path is None else _explained(pipeline, path, told) or told + _place_in_code(pipeline, path, error)
        )
        where = pipeline.where(path) if path is not None else ""
        if where:
            text = f"{where}: {text}"
        if text == told:
            raise
        raise type(error)(text) from error


@contextmanager
def within(stage: str, settings: Config) -> Iterator[None]:
    """Give user errors raised inside that name a setting of this stage alone the key that the whole file knows.

    What a training says of `mixup` becomes `train.mixup`, or `prune.recovery.mixup`.

    Raises:
        CompressError: of the same kind; unchanged where it names no setting of the stage.
    """
    try:
        yield
    except ConfigError:
        raise
    except CompressError as error:
        key = _KEY.match(str(error))
        recovery = getattr(settings, "recovery", None)
        for at, config in ((stage, settings), (f"{stage}.recovery", recovery)):
            if key is not None and config is not None and key[1].partition(".")[0] in type(config).model_fields:
                raise type(error)(f"{at}.{error}") from error
        raise


def _full_key(pipeline: Pipeline, key: str) -> str | None:
    """The key as it stands in the file: a stage speaks of `prune.target`, the file has `stages.2.prune.target`."""
    first = key.partition(".")[0]
    if first in type(pipeline).model_fields:
        return key
    stages = [index for index, entry in enumerate(pipeline.stages) if entry.kind == first]
    return f"stages.{stages[0]}.{key}" if first in STAGE_CONFIGS and len(stages) == 1 else None


def _model(pipeline: Pipeline, path: str) -> tuple[str, str] | None:
    """The model that a key speaks of: its own key and its factory."""
    for key, model in pipeline.models():
        if path == key or path.startswith(f"{key}."):
            return key, model.factory
    return None


def _explained(pipeline: Pipeline, path: str, told: str) -> str:
    """What to change where a model refuses its inputs for their number of channels; empty for any other error."""
    found, shape, named = _CHANNELS.search(told), _SHAPE.search(told), _model(pipeline, path)
    # Only the first layer sees the data; further inside, other numbers are the model's own mistake.
    if found is None or shape is None or named is None or found[1] != shape[1]:
        return ""
    has, takes = found[1], found[2]
    model, factory = named
    scheme = factory.rpartition(":")[0]
    remedies = []
    if isinstance(pipeline.data, (DigitsConfig, ImageFolderConfig, TorchvisionConfig)) and takes in ("1", "3"):
        where = pipeline.where("data.channels")
        remedies.append(f"set data.channels: {takes}" + (f" ({where})" if where else ""))
    else:
        remedies.append(f"give data with {takes} channel{'s' if takes != '1' else ''}")
    if scheme != "torchvision":  # whose models have no such argument
        argument = _CHANNEL_ARGUMENT.get(scheme)
        other = "" if argument else ", or what its factory calls it"
        remedies.append(f"set {model}.kwargs: {{{argument or 'in_channels'}: {has}}}{other}")
    one = "" if takes == "1" else "s"
    return f"{told[: told.index(': ')]}: takes inputs of {takes} channel{one}, but the data has {has}: {'; or '.join(remedies)}"


def _place_in_code(pipeline: Pipeline, path: str, error: CompressError) -> str:
    """Where in the user's own file an error arose, such as ` (net.py:12)`."""
    _, factory = _model(pipeline, path) or ("", "")
    source = callable_file(factory) if factory and is_code(factory) else None
    cause: BaseException | None = error
    while source is not None and cause is not None:
        cause = cause.__cause__
        frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
        lines = [frame.lineno for frame in frames if Path(frame.filename) == source]
        if lines:
            return f" ({source.name}:{lines[-1]})"
    return ""
