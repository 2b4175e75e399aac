"""The stages of a pipeline: one explicit line each. Importing this table does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.config import (
    DistillConfig,
    ExportConfig,
    FactorizeConfig,
    PruneConfig,
    QuantizeConfig,
    StageConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from compress.stages.base import Run


@dataclass(frozen=True)
class Stage:
    """A stage: its settings class, and the module whose `run` is it."""

    config: type[StageConfig]
    module: str

    def load(self) -> Run:
        """The stage's function; imports torch."""
        run: Run = importlib.import_module(self.module).run
        return run


SOURCE_MODULE = "compress.stages.source"
STAGES: Mapping[str, Stage] = {
    "train": Stage(TrainConfig, "compress.stages.train"),
    "distill": Stage(DistillConfig, "compress.stages.distill"),
    "prune": Stage(PruneConfig, "compress.stages.prune"),
    "factorize": Stage(FactorizeConfig, "compress.stages.factorize"),
    "quantize": Stage(QuantizeConfig, "compress.stages.quantize"),
    "export": Stage(ExportConfig, "compress.stages.export"),
}
