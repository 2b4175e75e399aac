"""Settings of the terms of a training loss. Each default, range and unit stands here and nowhere else."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from compress.config.base import Config, OneOf


class ScheduleConfig(Config):
    """A number that changes over the training, step by step."""

    start: float = Field(ge=0.0, description="Value at the first step.")
    end: float = Field(ge=0.0, description="Value at the last step.")
    shape: Literal["linear", "cosine"] = Field(default="linear", description="The way from start to end.")


class TemperatureScheduleConfig(ScheduleConfig):
    """A temperature that changes over the training."""

    start: float = Field(gt=0.0, le=1000.0, description="T at the first step.")
    end: float = Field(gt=0.0, le=1000.0, description="T at the last step.")


Reads: TypeAlias = Literal["labels", "student", "logits", "features"]
Weight = Annotated[float, Field(gt=0.0, description="Factor of this term.")]
Smoothing = Annotated[float, Field(ge=0.0, lt=1.0, description="Label smoothing (Szegedy et al. 2016).")]
Temperature = Annotated[
    float, Field(gt=0.0, le=1000.0, description="T: higher shows more of how the teacher ranks the wrong classes.")
]
Layers = Annotated[
    Annotated[dict[str, str], Field(min_length=1)] | Literal["auto"],
    Field(
        description="Layers whose outputs are compared: name in the student: name in the teacher. auto: of the layers "
        "that both have under one name, the last one at each height and width (or number of tokens), at most four; the notes "
        "name them.",
    ),
]


class TermConfig(Config):
    """One term of the loss, and what it needs besides the labels."""

    reads: ClassVar[Reads]
    """'labels' and 'student': no teacher; 'logits': what a teacher answers; 'features': what its layers give out."""

    @property
    def imitated(self) -> Literal["teacher", "peers", "ema"] | None:
        """Who is imitated; None where nobody is."""
        return None


class LogitTermConfig(TermConfig):
    """A term that compares the student's logits with those of somebody who knows more."""

    reads: ClassVar[Reads] = "logits"

    source: Literal["teacher", "peers", "ema"] = Field(
        default="teacher",
        alias="from",
        description="Who is imitated: the teacher; the other students that learn at the same time (deep mutual learning, "
        "Zhang et al. 2018, arXiv:1706.00384); the moving average of the student itself (Tarvainen & Valpola 2017, "
        "arXiv:1703.01780).",
    )

    @property
    def imitated(self) -> Literal["teacher", "peers", "ema"]:
        """Whose logits."""
        return self.source


class KDLossConfig(LogitTermConfig):
    """Soft labels: T² · KL(teacher ‖ student) at temperature T (Hinton et al. 2015, arXiv:1503.02531)."""

    temperature: Temperature | TemperatureScheduleConfig = Field(default=4.0, description="T, fixed or changing.")
    divergence: Literal["kl", "cross_entropy"] = Field(
        default="kl", description="Equal gradients; cross_entropy adds the teacher's entropy to the number shown."
    )
    standardize: bool = Field(
        default=False,
        description="Both logits are z-scored per sample first (logit standardization, Sun et al. 2024, arXiv:2403.01427).",
    )
    weight: Weight = 1.0


class TeacherLabelsConfig(LogitTermConfig):
    """Cross-entropy with the class that the teacher finds most likely (hard labels)."""

    smoothing: Smoothing = 0.0
    weight: Weight = 1.0


class LogitMSEConfig(LogitTermConfig):
    """Mean squared difference of centred logits (Ba & Caruana 2014, arXiv:1312.6184; Kim et al. 2021, arXiv:2105.08919)."""

    weight: Weight = 0.1


class DKDLossConfig(LogitTermConfig):
    """Decoupled distillation: target and other classes with a weight each (Zhao et al. 2022, arXiv:2203.08679)."""

    temperature: Temperature | TemperatureScheduleConfig = Field(default=4.0, description="T, fixed or changing.")
    alpha: float = Field(default=1.0, ge=0.0, description="Weight of the target class against all others together.")
    beta: float = Field(default=8.0, ge=0.0, description="Weight of how the other classes are ranked.")
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha, beta: one of the two must be greater than 0")
        return self


class DISTLossConfig(LogitTermConfig):
    """Correlation with the teacher within samples and within classes (Huang et al. 2022, arXiv:2205.10536)."""

    temperature: Temperature | TemperatureScheduleConfig = Field(default=1.0, description="T, fixed or changing.")
    beta: float = Field(default=1.0, ge=0.0, description="Weight of the correlation over the classes of a sample.")
    gamma: float = Field(default=1.0, ge=0.0, description="Weight of the correlation over the samples for a class.")
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.beta == 0 and self.gamma == 0:
            raise ValueError("beta, gamma: one of the two must be greater than 0")
        return self


class LabelLossConfig(TermConfig):
    """Cross-entropy with the labels."""

    reads: ClassVar[Reads] = "labels"

    weight: Weight = 1.0
    smoothing: Smoothing = 0.0


class EntropyConfig(TermConfig):
    """Rewards unsure answers: minus the entropy of the student's probabilities (Pereyra et al. 2017, arXiv:1701.06548)."""

    reads: ClassVar[Reads] = "student"

    weight: Weight = 0.1


class FeatureTermConfig(TermConfig):
    """A term that compares outputs of layers."""

    reads: ClassVar[Reads] = "features"

    layers: Layers

    @property
    def imitated(self) -> Literal["teacher"]:
        """Whose layers: there are no others."""
        return "teacher"


class HintConfig(FeatureTermConfig):
    """FitNets: mean squared difference after a learned 1×1 adapter (Romero et al. 2015, arXiv:1412.6550, eq. 3)."""

    weight: Weight = 1.0


class AttentionConfig(FeatureTermConfig):
    """Attention transfer: where in the image the layers are active (Zagoruyko & Komodakis 2017, arXiv:1612.03928)."""

    power: float = Field(
        default=2.0, ge=1.0, description="Exponent of the activations whose sum over channels is compared."
    )
    weight: Weight = 1000.0


class SimilarityConfig(FeatureTermConfig):
    """Similarity-preserving: which samples of a batch look alike (Tung & Mori 2019, arXiv:1907.09682)."""

    weight: Weight = 3000.0


class RelationalConfig(FeatureTermConfig):
    """Relational distillation: distances and angles between samples (Park et al. 2019, arXiv:1904.05068)."""

    distance: float = Field(default=25.0, ge=0.0, description="Weight of the distances between two samples.")
    angle: float = Field(default=50.0, ge=0.0, description="Weight of the angles between three samples.")
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.distance == 0 and self.angle == 0:
            raise ValueError("distance, angle: one of the two must be greater than 0")
        return self


class LossEntry(OneOf):
    """One term of the training loss."""

    kd: KDLossConfig | None = None
    labels: LabelLossConfig | None = None
    teacher_labels: TeacherLabelsConfig | None = None
    logit_mse: LogitMSEConfig | None = None
    dkd: DKDLossConfig | None = None
    dist: DISTLossConfig | None = None
    entropy: EntropyConfig | None = None
    hint: HintConfig | None = None
    attention: AttentionConfig | None = None
    similarity: SimilarityConfig | None = None
    relational: RelationalConfig | None = None


DISTILLATION_LOSSES = (LossEntry(kd=KDLossConfig(weight=0.9)), LossEntry(labels=LabelLossConfig(weight=0.1)))
Losses = Annotated[
    tuple[LossEntry, ...], Field(min_length=1, description="Terms of the loss; each counts with its weight.")
]
