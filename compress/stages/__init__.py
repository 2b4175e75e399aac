"""The stages of a pipeline: one explicit line each. Importing this table does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.stages.base import Run


@dataclass(frozen=True)
class Stage:
    """A stage: the module whose `run` it is; its settings class stands in `compress.config.STAGE_CONFIGS`."""

    module: str
    has_budget: bool = False
    """Whether its settings have a `budget`, which `compress.stages.guard` holds it to."""

    def load(self) -> Run:
        """The stage's function; imports torch."""
        run: Run = importlib.import_module(self.module).run
        if not self.has_budget:
            return run
        held: Run = importlib.import_module(GUARD_MODULE).guarded(run)
        return held


SOURCE_MODULE = "compress.stages.source"
GUARD_MODULE = "compress.stages.guard"
STAGES: Mapping[str, Stage] = {
    "train": Stage("compress.stages.train"),
    "distill": Stage("compress.stages.distill"),
    "prune": Stage("compress.stages.prune", has_budget=True),
    "factorize": Stage("compress.stages.factorize", has_budget=True),
    "quantize": Stage("compress.stages.quantize"),
    "export": Stage("compress.stages.export"),
}
