"""Where training happens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.distributed import ALONE, Group
from compress.events import Progress


@dataclass(frozen=True)
class Workplace:
    """Where and under which seed training happens."""

    device: str
    """'cpu' or 'cuda'."""
    seed: int
    scratch: Path
    """Folder for the state after each epoch."""
    progress: Progress
    cache: Path | None = None
    """Folder of teachers' answers, shared by the trainings of a run; None keeps them in `scratch`."""
    group: Group = ALONE
    """The processes that train together, each in such a workplace; all see the same folders."""
