"""What a pipeline needs of the machine, found missing before anything runs. No torch, so that planning takes no time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from compress.config import Pipeline, TrainingConfig
from compress.errors import Problem


def unmet(pipeline: Pipeline, device: str) -> Iterator[Problem]:
    """What the settings ask for that is not to be had here.

    Args:
        pipeline: the settings.
        device: where training runs, 'cpu' or 'cuda'.
    """
    for index, tracker in enumerate(pipeline.trackers):
        if importlib.util.find_spec(tracker) is None:
            yield Problem("", f"trackers.{index}", f"'{tracker}' is not installed: pip install 'compress[{tracker}]'")
    if device != "cpu":
        return
    for key, training in _trainings(pipeline):
        if training.precision == "fp16":
            yield Problem(
                "", f"{key}.precision", "fp16 needs a CUDA device, but training is on the CPU; use bf16 or fp32"
            )
        if training.batchnorm == "sync":
            yield Problem("", f"{key}.batchnorm", "'sync' needs CUDA devices, but training is on the CPU; use 'frozen'")


def _trainings(pipeline: Pipeline) -> Iterator[tuple[str, TrainingConfig]]:
    """The trainings of a pipeline, each with its key, such as `stages.1.prune.recovery`."""
    for index, entry in enumerate(pipeline.stages):
        key, settings = f"stages.{index}.{entry.kind}", entry.settings
        if isinstance(settings, TrainingConfig):
            yield key, settings
        recovery = getattr(settings, "recovery", None)
        if isinstance(recovery, TrainingConfig):
            yield f"{key}.recovery", recovery
