"""Settings of the stages. Each default, range and unit stands here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, JsonValue, model_validator

from compress.config.base import Config, Factory, Fraction, OneOf, OpenFraction


class ModelConfig(Config):
    """A model: the callable that makes it, its arguments and its weights."""

    factory: Factory
    kwargs: dict[str, JsonValue] = Field(default={}, description="Arguments of the factory.")
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="A .safetensors or .pth file (relative to the pipeline file), or the name of published weights "
        "(torchvision: 'DEFAULT' or 'IMAGENET1K_V1'; timm: 'pretrained'). Left out: random initialisation.",
    )


class StudentConfig(ModelConfig):
    """The student of a distillation."""


class KDLossConfig(Config):
    """Soft labels: T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv:1503.02531)."""

    temperature: float = Field(
        default=4.0, gt=0.0, le=1000.0, description="T: higher shows more of the dark knowledge."
    )
    weight: float = Field(default=0.9, gt=0.0, description="Factor of this term.")


class LabelLossConfig(Config):
    """Cross-entropy with the labels."""

    weight: float = Field(default=0.1, gt=0.0, description="Factor of this term.")
    smoothing: float = Field(default=0.0, ge=0.0, lt=1.0, description="Label smoothing (Szegedy et al. 2016).")


class LossEntry(OneOf):
    """One term of the training loss."""

    kd: KDLossConfig | None = None
    labels: LabelLossConfig | None = None


DISTILLATION_LOSSES = (LossEntry(kd=KDLossConfig()), LossEntry(labels=LabelLossConfig()))
Losses = Annotated[
    tuple[LossEntry, ...], Field(min_length=1, description="Terms of the loss; each counts with its weight.")
]


class StageConfig(Config):
    """Settings of a stage, and the form of model it takes and gives."""

    takes: ClassVar[tuple[str, ...]] = ("float",)
    gives: ClassVar[str] = "float"


class TrainingConfig(Config):
    """How a model is trained."""

    epochs: int = Field(default=12, ge=1, le=100_000, description="Passes over the training split.")
    batch_size: int = Field(default=64, ge=2, description="Samples per step.")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="SGD is Nesterov with momentum.")
    learning_rate: float = Field(default=0.1, gt=0.0, description="Peak learning rate.")
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0, description="Momentum of SGD; beta 1 of AdamW.")
    weight_decay: float = Field(default=5e-4, ge=0.0, description="Not applied to norms and biases.")
    schedule: Literal["one_cycle", "cosine", "constant"] = Field(
        default="one_cycle", description="Learning rate over the steps: up and down, down only, or flat."
    )
    gradient_clip: float | None = Field(default=None, gt=0.0, description="Largest gradient norm.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Autocast; 'auto' is bf16 where the hardware multiplies it, else fp32."
    )
    channels_last: bool = Field(default=True, description="Memory layout of 4-d inputs; faster on most hardware.")


class TrainConfig(StageConfig, TrainingConfig):
    """`train`: supervised training of the source model; leave it out when you bring trained weights."""

    losses: Losses = (LossEntry(labels=LabelLossConfig(weight=1.0)),)

    @model_validator(mode="after")
    def _no_teacher(self) -> Self:
        if any(entry.kd is not None for entry in self.losses):
            raise ValueError(
                "losses: 'train' has no teacher, so 'kd' cannot be used; use 'labels', or the stage 'distill'"
            )
        return self


class DistillConfig(StageConfig, TrainingConfig):
    """`distill`: train a smaller student on what the model before this stage, its teacher, answers."""

    student: StudentConfig = Field(description="The model to train.")
    losses: Losses = DISTILLATION_LOSSES
    epochs: int = Field(default=15, ge=1, le=100_000, description="Passes over the training split.")


class RecoveryConfig(TrainingConfig):
    """Training after surgery: distillation from the reference model unless the losses say otherwise."""

    losses: Losses = DISTILLATION_LOSSES
    epochs: int = Field(default=5, ge=1, le=100_000, description="Passes over the training split.")
    learning_rate: float = Field(default=0.05, gt=0.0, description="Peak learning rate.")


class PruneTarget(OneOf):
    """How far to prune."""

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    parameters: OpenFraction | None = Field(default=None, description="Fraction of the parameters that remains.")
    ratio: OpenFraction | None = Field(
        default=None, description="Fraction of the channels of every group that is removed."
    )


class PruneConfig(StageConfig):
    """`prune`: remove whole channels, least L1 norm first (Li et al. 2017, arXiv:1608.08710), then recover."""

    criterion: Literal["l1"] = Field(default="l1", description="Score of a channel; the lowest go first.")
    target: PruneTarget = PruneTarget(macs=0.5)
    multiple: int = Field(default=4, ge=1, le=256, description="Channels that remain are a multiple of this.")
    floor: Fraction = Field(default=0.1, description="Fraction of its channels that every group keeps at least.")
    protect: tuple[str, ...] = Field(
        default=(), description="Layer names, with * and ?, whose output channels stay as they are."
    )
    recovery: RecoveryConfig | None = Field(
        default=RecoveryConfig(), description="null leaves the accuracy as it falls."
    )


class FactorizeTarget(OneOf):
    """How far to factorize."""

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    energy: OpenFraction | None = Field(
        default=None, description="Fraction of each layer's squared singular values kept."
    )
    ratio: OpenFraction | None = Field(default=None, description="Fraction of each layer's full rank kept.")


class FactorizeConfig(StageConfig):
    """`factorize`: replace layers by two thinner ones through a truncated SVD, where that saves work."""

    target: FactorizeTarget = FactorizeTarget(macs=0.8)
    multiple: int = Field(default=4, ge=1, le=256, description="Ranks are a multiple of this.")
    min_saving: OpenFraction = Field(
        default=0.3,
        description="A layer is split only where that saves this fraction of its work: two layers cost more overhead than one.",
    )
    protect: tuple[str, ...] = Field(default=(), description="Layer names, with * and ?, that stay as they are.")
    recovery: RecoveryConfig | None = Field(default=None, description="Optional training afterwards.")


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
