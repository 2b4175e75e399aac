"""Making the checkpoint of a stage, alone or together with other processes.

The leader of a group runs the pipeline. Before a stage that trains it tells the others which checkpoints to begin with; all
then make the same calls, and only the leader's result is kept. What does not train it makes alone, while the others wait.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import JsonValue

from compress import checkpoint as checkpoints
from compress.checkpoint import Checkpoint, Draft
from compress.config import Config, Pipeline, TrainingConfig
from compress.config.located import located, within
from compress.data.base import DecisionData
from compress.data.load import load_data
from compress.distributed import ALONE, Group
from compress.errors import CompressError, TrainingError
from compress.events import Progress, Silent
from compress.plan import Keys, Planned, planned_stages
from compress.provenance import identity
from compress.stages import STAGES
from compress.stages.base import Context
from compress.training.failures import out_of_memory_as
from compress.training.trackers import tracked

ANSWERS = "teacher"
"""Folder of a run in which teachers' answers are kept."""
COSTS = "group_costs"
"""Folder of a run in which it is kept what groups of channels cost."""


class Maker:
    """Makes the stages of a run."""

    def __init__(self, pipeline: Pipeline, data: DecisionData, keys: Keys, root: Path, group: Group) -> None:
        """Take what all stages share; `root` is `runs/<name>`.

        Raises:
            CompressError: where the device cannot be used, or another process is not like the leader.
        """
        if keys.device == "cuda" and not torch.cuda.is_available():
            raise CompressError("device: the driver has a CUDA device but this torch cannot use it; set device: cpu")
        self._pipeline, self._data, self._keys, self._root, self._group = pipeline, data, keys, root, group
        self.trusted = frozenset(model.factory for _, model in pipeline.models())
        group.check_alike(keys.shared())

    def make(
        self,
        planned: Planned,
        parent: Checkpoint,
        reference: Checkpoint,
        scratch: Path,
        progress: Progress,
        parent_accuracy: Mapping[str, Mapping[str, float]],
    ) -> Draft:
        """Make a stage, together with whoever assists.

        Args:
            planned: the stage.
            parent: what it begins with.
            reference: what recovery distils from.
            scratch: where it keeps what a killed run needs.
            progress: told of everything that happens; so are the trackers that the pipeline asks for.
            parent_accuracy: what bench measured of the parent, by split.

        Raises:
            CompressError: whatever the user can mend.
        """
        if _trains(planned.settings):
            folders = {"parent": parent.path, "reference": reference.path, "scratch": scratch}
            self._group.told(
                {"position": planned.position, **{name: str(path.resolve()) for name, path in folders.items()}}
            )
        settings, logs = identity(planned.settings), self._root / "trackers"
        with tracked(self._pipeline.trackers, self._pipeline.name, scratch.name, logs, settings, progress) as followed:
            # Only export writes test accuracy down; no other stage gets to see it.
            seen = {split: dict(found) for split, found in parent_accuracy.items()} if planned.name == "export" else {}
            return self._made(planned, parent, reference, scratch, followed, seen)

    def finish(self) -> None:
        """Let those who assist end."""
        self._group.told(None)

    def follow(self) -> None:
        """Train along until the leader has finished.

        Raises:
            CompressError: as in the leader, or what is wrong with this process alone.
        """
        stages = planned_stages(self._pipeline)
        while (task := self._group.told()) is not None:
            assert isinstance(task, dict)
            parent, reference, scratch = (Path(str(task[name])) for name in ("parent", "reference", "scratch"))
            planned = next(stage for stage in stages if stage.position == task["position"])
            with out_of_memory_as(TrainingError(f"out of memory in stage '{planned.label}'")):
                begin = [checkpoints.load(folder, self.trusted) for folder in (parent, reference)]
                self._made(planned, begin[0], begin[1], scratch, Silent(), {})

    def _made(
        self,
        planned: Planned,
        parent: Checkpoint,
        reference: Checkpoint,
        scratch: Path,
        progress: Progress,
        parent_accuracy: dict[str, dict[str, float]],
    ) -> Draft:
        context = Context(
            data=self._data,
            reference=reference,
            device=self._keys.device,
            threads=self._keys.threads,
            seed=planned.seed,
            scratch=scratch,
            progress=progress,
            trusted=self.trusted,
            cache=self._root / ANSWERS,
            costs=self._root / COSTS,
            group=self._group if _trains(planned.settings) else ALONE,  # the others wait for the next stage that trains
            answers_key=self._keys.answers(),
            parent_accuracy=parent_accuracy,
        )
        with within(planned.name, planned.settings):
            draft = STAGES[planned.name].load()(parent, planned.settings, context)
        return replace(draft, notes=tuple(context.notes), warnings=tuple(context.warnings))


def announce(pipeline: Pipeline, root: Path, group: Group) -> None:
    """Tell those who wait in `assist` what will be run."""
    group.told({"pipeline": pipeline.model_dump(mode="json", by_alias=True), "root": str(root.resolve())})


def assist(group: Group) -> None:
    """Train along with the leader of a group, who runs a pipeline, until that one is done; nothing is written or shown.

    Raises:
        CompressError: whatever the user can mend.
    """
    told: JsonValue = group.told()
    assert isinstance(told, dict)
    pipeline = Pipeline.model_validate_json(json.dumps(told["pipeline"]))
    with located(pipeline):
        data, keys = load_data(pipeline.data, pipeline.seed).for_decisions(), Keys(pipeline)
        with reproducible(keys.threads):
            Maker(pipeline, data, keys, Path(str(told["root"])), group).follow()


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """The thread count asked for, and on CUDA the same kernels each time, with float32 that is float32 (no TF32)."""
    cudnn = torch.backends.cudnn
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


def _trains(settings: Config) -> bool:
    return isinstance(settings, TrainingConfig) or getattr(settings, "recovery", None) is not None
