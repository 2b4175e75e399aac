"""Settings of the stages, those of surgery in files of their own. Each default, range and unit stands there and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from compress.config.base import Config, OneOf, StageConfig
from compress.config.factorize import FactorizeConfig
from compress.config.losses import LabelLossConfig, LossEntry, Losses
from compress.config.prune import PruneConfig
from compress.config.training import (
    EnsembleConfig,
    StudentConfig,
    TaughtConfig,
    TrainingConfig,
    imitates,
)


class TrainConfig(StageConfig, TrainingConfig):
    """`train`: supervised training of the source model; leave it out when you bring trained weights."""

    losses: Losses = (LossEntry(labels=LabelLossConfig(weight=1.0)),)

    @model_validator(mode="after")
    def _no_teacher(self) -> Self:
        for entry in self.losses:
            if entry.settings.reads not in ("labels", "student"):
                raise ValueError(
                    f"losses: 'train' has no teacher, so '{entry.kind}' cannot be used; use 'labels', or the stage 'distill'"
                )
        return self


class DistillConfig(StageConfig, TaughtConfig):
    """`distill`: train a smaller student on what the model before this stage, its teacher, answers."""

    student: StudentConfig = Field(description="The model to train.")
    ensemble: EnsembleConfig | None = Field(default=None, description="More teachers than the model that comes in.")
    peers: tuple[StudentConfig, ...] = Field(
        default=(),
        description="Further students that learn at the same time, each from the others; only `student` goes on.",
    )
    epochs: int = Field(default=15, ge=1, le=100_000, description="Passes over the training split.")

    @model_validator(mode="after")
    def _everybody_is_heard(self) -> Self:
        heard = any(imitates(entry, "peers") for entry in self.losses)
        if heard and not self.peers:
            raise ValueError("peers: a term imitates them ('from: peers'), but none are named")
        if self.peers and not heard:
            raise ValueError("peers: no term of the losses imitates them; add one such as {kd: {from: peers}}")
        if self.ensemble is not None and not any(imitates(entry, "teacher") for entry in self.losses):
            raise ValueError("ensemble: no term of the losses imitates a teacher")
        if self.ensemble is not None and any(entry.settings.reads == "features" for entry in self.losses):
            raise ValueError(
                "ensemble: teachers can be averaged by what they answer only, not by what their layers give out"
            )
        return self


class CalibrationConfig(Config):
    """How the ranges of the activations are found."""

    samples: int = Field(default=256, ge=1, description="Training samples, stratified by class, not augmented.")
    method: Literal["minmax"] = Field(
        default="minmax", description="Ranges from the smallest to the largest value seen."
    )
    chunk: int = Field(default=32, ge=1, description="Samples held in memory at a time.")


class QuantizeConfig(StageConfig):
    """`quantize`: post-training int8 (QDQ) by ONNX Runtime; per-channel int8 weights."""

    gives: ClassVar[str] = "int8"

    calibration: CalibrationConfig = CalibrationConfig()
    target: Literal["auto", "x86-vnni", "x86-avx2", "arm64"] = Field(
        default="auto", description="CPU the file is for: decides activation types; 'auto' looks at this machine."
    )
    keep_float: tuple[str, ...] = Field(
        default=(), description="Node names of the exported graph, with * and ?, that stay in float."
    )


class ExportConfig(StageConfig):
    """`export`: the ONNX files to deploy, checked and compared with the checkpoint, in `dist/`."""

    takes: ClassVar[tuple[str, ...]] = ("float", "int8")
    gives: ClassVar[str] = "exported"

    tolerance: float = Field(
        default=1e-4, gt=0.0, description="Largest difference of the fp32 file's outputs, relative to their magnitude."
    )
    agreement: float = Field(
        default=0.95,
        ge=0.0,
        le=1.0,
        description="Least fraction of validation samples on which the int8 file answers as its float weights; 0 checks none.",
    )


class StageEntry(OneOf):
    """One stage of the pipeline: its name and its settings."""

    train: TrainConfig | None = None
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    factorize: FactorizeConfig | None = None
    quantize: QuantizeConfig | None = None
    export: ExportConfig | None = None


STAGE_CONFIGS: Mapping[str, type[StageConfig]] = {
    name: next(kind for kind in get_args(field.annotation) if kind is not NoneType)
    for name, field in StageEntry.model_fields.items()
}
