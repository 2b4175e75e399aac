"""The pipeline file as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from compress.config.base import Config
from compress.config.data import AnyDataConfig
from compress.config.stages import StageEntry
from compress.config.training import ModelConfig


class LatencyConfig(Config):
    """How latency is measured at the end of a run, for all rows together."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1,), min_length=1, description="Samples per call."
    )
    threads: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 2), min_length=1, description="Threads of ONNX Runtime's CPU provider."
    )
    rounds: int = Field(
        default=10,
        ge=6,
        le=1000,
        description="Alternating rounds over all variants; at least 6, because fewer have no 95 % interval of the median "
        "between order statistics.",
    )
    seconds: float = Field(
        default=0.05, gt=0.0, le=60.0, description="Least time measured per variant and round, seconds."
    )


class SensitivityConfig(Config):
    """How much each layer costs in int8 on its own: it alone quantized, all others in float."""

    samples: int = Field(
        default=256,
        ge=1,
        le=10_000,
        description="Validation samples, stratified by class, that are answered once per quantized layer; they are held in "
        "memory.",
    )


class BenchConfig(Config):
    """What is measured."""

    batch_size: int = Field(default=256, ge=1, description="Samples per call while measuring accuracy.")
    latency: LatencyConfig | None = Field(default=LatencyConfig(), description="null measures no latency.")
    sensitivity: SensitivityConfig | None = Field(
        default=SensitivityConfig(),
        description="null does not measure what each layer costs in int8; without `quantize` there is nothing to measure.",
    )


class BudgetConfig(Config):
    """What the result may cost; a run that misses it ends with exit code 1."""

    accuracy_drop: float = Field(
        ge=0.0,
        le=100.0,
        description="Largest loss of validation accuracy of the artifact against the reference model, points.",
    )


@dataclass(frozen=True)
class Origin:
    """Where settings come from. Any two are equal: a pipeline is its settings, wherever they were written."""

    places: Mapping[str, str] = field(default_factory=dict, compare=False)
    """By dotted key: `file:line`, or `--set`."""


NAME_RULE = "up to 64 letters (A to z), digits, '_', '-' and '.', the first a letter or digit"


def usable_name(name: str) -> str:
    """What a name that breaks `NAME_RULE` could be instead; empty where nothing of it can stay."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.")[:64]


class Pipeline(Config):
    """A pipeline file: data, source model, stages in order, and what the result may cost."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description=f"Names the run folder: {NAME_RULE}.")
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="Seeds splits, initialisation, order and augmentation."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where training runs; 'auto' is CUDA where the driver finds a device."
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of training; all cores of the process when left out."
    )
    data: AnyDataConfig = Field(description="The data, by kind.")
    model: ModelConfig = Field(description="The source model, as it comes.")
    stages: tuple[StageEntry, ...] = Field(default=(), description="Stages in the order they run.")
    budget: BudgetConfig | None = None
    bench: BenchConfig = BenchConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(), description="Where every epoch is logged besides the report; each is a package of its own."
    )

    _origin: Origin = PrivateAttr(default=Origin())

    def models(self) -> Iterator[tuple[str, ModelConfig]]:
        """Every model that is named, the source first, each with its key, such as `stages.1.distill.student`."""
        yield "model", self.model
        for index, entry in enumerate(self.stages):
            if entry.distill is None:
                continue
            at = f"stages.{index}.distill"
            yield f"{at}.student", entry.distill.student
            yield from ((f"{at}.peers.{number}", peer) for number, peer in enumerate(entry.distill.peers))
            others = entry.distill.ensemble.others if entry.distill.ensemble is not None else ()
            yield from ((f"{at}.ensemble.others.{number}", teacher) for number, teacher in enumerate(others))

    def where(self, key: str) -> str:
        """`file:line` or `--set` of a setting such as `stages.0.prune.target`, or of the deepest part that was written.

        Empty where the pipeline does not come from a file.
        """
        while key and key not in self._origin.places:
            key = key.rpartition(".")[0]
        return self._origin.places.get(key, "")
