"""Epochs as TensorBoard, Weights & Biases or MLflow show them: one run of a tracker per training, one step per epoch.

Nothing of this can change a result: a tracker hears what the progress display hears, and one that fails is given up with a
warning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from compress.errors import first_line
from compress.events import EpochResult, Forwarding, Progress

_NOT_LOGGED = ("epoch", "epochs")


@contextmanager
def tracked(
    trackers: Sequence[str], project: str, run: str, folder: Path, settings: Mapping[str, Any], progress: Progress
) -> Iterator[Progress]:
    """A `Progress` that logs each epoch, too, until the block ends.

    A training that never has an epoch leaves no run behind. One that goes on after it was killed goes on in the same run, where
    the tracker can do that (MLflow begins another one of the same name).

    Args:
        trackers: of 'tensorboard', 'wandb', 'mlflow'; each is installed. None at all gives `progress` itself.
        project: what all runs of the pipeline have in common: its name.
        run: names this training, the same when it goes on.
        folder: where logs go, unless the tracker's own environment variables say otherwise.
        settings: of the stage, as JSON has them.
        progress: told of everything as well.
    """
    if not trackers:
        yield progress
        return
    told = _Tracked({name: _MAKERS[name] for name in trackers}, (project, run, folder), _flat(settings), progress)
    try:
        yield told
    finally:
        told.finish()


def _tensorboard(project: str, run: str, folder: Path) -> GeneralTracker:  # noqa: ARG001
    return TensorBoardTracker(run, folder / "tensorboard")


def _wandb(project: str, run: str, folder: Path) -> GeneralTracker:
    folder.mkdir(parents=True, exist_ok=True)  # where it does not exist, wandb writes elsewhere without a word
    return WandBTracker(project, name=run, id=f"{project}-{run}", dir=str(folder), resume="allow")


def _mlflow(project: str, run: str, folder: Path) -> GeneralTracker:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    return MLflowTracker(project, (folder.absolute() / "mlflow").as_uri(), run_name=run)


_Maker = Callable[[str, str, Path], GeneralTracker]
_MAKERS: Mapping[str, _Maker] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


class _Tracked(Forwarding):
    """A `Progress` that passes everything on and logs the epochs; trackers start with the first one."""

    def __init__(
        self,
        makers: Mapping[str, _Maker],
        place: tuple[str, str, Path],
        settings: Mapping[str, str | float],
        progress: Progress,
    ) -> None:
        super().__init__(progress)
        self._makers, self._place, self._settings = dict(makers), place, settings
        self._running: dict[str, GeneralTracker] = {}

    def epoch(self, result: EpochResult) -> None:
        """Passes it on and logs it."""
        super().epoch(result)
        values = {name: value for name, value in asdict(result).items() if name not in _NOT_LOGGED}
        for name in list(self._makers):
            with self._given_up_where_it_fails(name):
                if name not in self._running:
                    self._start(name)
                self._running[name].log(values, step=result.epoch)

    def finish(self) -> None:
        """Close what was started."""
        for name in list(self._running):
            with self._given_up_where_it_fails(name):
                self._running.pop(name).finish()

    def _start(self, name: str) -> None:
        tracker = self._makers[name](*self._place)
        tracker.start()
        self._running[name] = tracker
        if name != "tensorboard":  # there, settings would show as another run with each start
            tracker.store_init_configuration(dict(self._settings))

    @contextmanager
    def _given_up_where_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # networks, accounts, disks: whatever it is, training goes on
            self._makers.pop(name, None)
            self._progress.warn(f"{name} failed and gets no more epochs: {first_line(error)}")


def _flat(settings: Mapping[str, Any], at: str = "") -> dict[str, str | float]:
    """Settings by dotted keys; what is neither a number nor a word becomes text, what is not set is left out."""
    found: dict[str, str | float] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{at}{name}.")
        elif value is not None:
            found[f"{at}{name}"] = value if isinstance(value, (str, int, float)) else str(value)
    return found
