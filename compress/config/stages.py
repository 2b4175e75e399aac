"""Settings of the stages. Each default, range and unit stands here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, ClassVar, Literal, Self, TypeAlias, get_args

from pydantic import Field, model_validator

from compress.config.base import Config, Fraction, OneOf, OpenFraction
from compress.config.losses import LabelLossConfig, LossEntry, Losses
from compress.config.training import (
    EnsembleConfig,
    StudentConfig,
    TaughtConfig,
    TrainingConfig,
    imitates,
)


class StageConfig(Config):
    """Settings of a stage, and the form of model it takes and gives."""

    takes: ClassVar[tuple[str, ...]] = ("float",)
    gives: ClassVar[str] = "float"


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


class RecoveryConfig(TaughtConfig):
    """Training after surgery: distillation from the reference model unless the losses say otherwise."""

    epochs: int = Field(default=5, ge=1, le=100_000, description="Passes over the training split.")
    learning_rate: float = Field(default=0.05, gt=0.0, description="Peak learning rate.")

    @model_validator(mode="after")
    def _no_peers(self) -> Self:
        if any(imitates(entry, "peers") for entry in self.losses):
            raise ValueError("losses: recovery has no peers; 'from: peers' is for the stage 'distill'")
        return self


BatchNormSamples = Annotated[
    int,
    Field(
        ge=0,
        description="Training samples, not augmented, from which batch norms find their statistics anew after surgery, before "
        "any recovery; kept where validation gains by it. 0 leaves them.",
    ),
]


Criterion: TypeAlias = Literal["l1", "l2", "fpgm", "lamp", "bn_scale", "taylor", "hessian", "activation", "random"]
Reduction: TypeAlias = Literal["sum", "mean", "max", "product"]
Ranking: TypeAlias = Literal["local", "global", "isomorphic"]
Normalization: TypeAlias = Literal["none", "mean", "max", "sum", "standardize"]


class PruneTarget(OneOf):
    """How far to prune."""

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    parameters: OpenFraction | None = Field(default=None, description="Fraction of the parameters that remains.")
    ratio: OpenFraction | None = Field(
        default=None, description="Fraction of the channels of every group that is removed."
    )


class OneShotConfig(Config):
    """All at once."""


class StepsConfig(Config):
    """Several cuts, each but the last followed by a short training."""

    epochs: int = Field(
        default=1, ge=1, le=1000, description="Passes over the training split after each cut but the last."
    )


class IterativeConfig(StepsConfig):
    """Each cut takes the same fraction of what is left (cuts and training in turns: Han et al. 2015, arXiv:1506.02626)."""

    steps: int = Field(default=4, ge=2, le=1000, description="Cuts in all.")


class GradualConfig(StepsConfig):
    """Much at first, less and less later: the cubic schedule of Zhu & Gupta 2017, arXiv:1710.01878, eq. 1."""

    steps: int = Field(default=8, ge=2, le=1000, description="Cuts in all.")


class PruneSchedule(OneOf):
    """In how many cuts the target is reached."""

    one_shot: OneShotConfig | None = None
    iterative: IterativeConfig | None = None
    gradual: GradualConfig | None = None

    @property
    def steps(self) -> int:
        """Cuts in all."""
        return 1 if self.one_shot is not None else int(self.settings.steps)


class LayerLimits(Config):
    """What the channels of some layers do not go beyond; the first entry that matches a layer counts."""

    match: str = Field(
        min_length=1,
        description="Layer names, with * and ?: of the layers that make the channels. Where several layers make the same "
        "ones, as on a residual stream, one is enough.",
    )
    floor: Fraction | None = Field(
        default=None, description="Fraction of the channels that is kept at least; left out: that of the stage."
    )
    ceiling: OpenFraction | None = Field(
        default=None,
        description="Fraction of the channels that is kept at most: the others go, whatever the target says.",
    )
    multiple: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Channels that remain are a multiple of this; left out: that of the stage.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.floor is None and self.ceiling is None and self.multiple is None:
            raise ValueError("sets nothing: give floor, ceiling or multiple")
        if self.floor is not None and self.ceiling is not None and self.floor > self.ceiling:
            raise ValueError(f"ceiling: {self.ceiling:g} is below the floor of {self.floor:g}")
        return self


class SparsityConfig(Config):
    """Training before the first cut, with the settings of `recovery`, that draws the channels towards zero that go."""

    kind: Literal["group_lasso", "group_growing"] = Field(
        default="group_lasso",
        description="group_lasso: the norm of all that a channel goes through is part of the loss (arXiv:1608.03665), those of "
        "little norm with up to 16 times the weight (arXiv:2301.12900); group_growing: a growing weight decay on the "
        "channels that are to go (arXiv:2012.09243).",
    )
    weight: float = Field(
        gt=0.0,
        description="Factor of the penalty, such as 1e-4 to 1e-3 for group_lasso; of group_growing the one of the last step, "
        "such as 0.1 to 1.",
    )
    epochs: int = Field(default=2, ge=1, le=100_000, description="Passes over the training split.")


class PruneConfig(StageConfig):
    """`prune`: remove whole channels, by default least L1 norm first (Li et al. 2017, arXiv:1608.08710), then recover."""

    criterion: Criterion = Field(
        default="l1",
        description="Score of a channel; the lowest go first. l1, l2: norms of its weights; fpgm: distance from all other "
        "filters (arXiv:1811.00250); lamp: layer-adaptive magnitude (arXiv:2010.07611); bn_scale: factor of its norm "
        "(arXiv:1708.06519); taylor: first-order change of the loss (arXiv:1906.10771); hessian: second-order, by the "
        "empirical Fisher (LeCun et al. 1990); activation: mean magnitude where it is read (arXiv:1611.06440); random.",
    )
    reduction: Reduction = Field(
        default="sum", description="How the scores of all tensors that a channel goes through become one."
    )
    ranking: Ranking = Field(
        default="local",
        description="local: the same fraction of every group; global: the lowest of all channels; isomorphic: the lowest "
        "among groups of one kind, the same fraction of each kind (arXiv:2407.04616).",
    )
    normalize: Normalization = Field(
        default="mean", description="What scores of a group are divided by before groups are compared; not for 'local'."
    )
    samples: int = Field(
        default=512, ge=1, description="Training samples that 'taylor', 'hessian' and 'activation' look at."
    )
    target: PruneTarget = PruneTarget(macs=0.5)
    multiple: int = Field(default=4, ge=1, le=256, description="Channels that remain are a multiple of this.")
    floor: Fraction = Field(default=0.1, description="Fraction of its channels that every group keeps at least.")
    protect: tuple[str, ...] = Field(
        default=(), description="Layer names, with * and ?, whose output channels stay as they are."
    )
    layers: tuple[LayerLimits, ...] = Field(
        default=(),
        description="Limits of single layers, in place of `floor` and `multiple`; the first that matches counts.",
    )
    schedule: PruneSchedule = PruneSchedule(one_shot=OneShotConfig())
    sparsity: SparsityConfig | None = Field(
        default=None, description="Training towards sparse channels, before any cut."
    )
    batchnorm_samples: BatchNormSamples = 512
    recovery: RecoveryConfig | None = Field(
        default=RecoveryConfig(),
        description="Training after the last cut; what trains before it takes these settings, too. null leaves the accuracy "
        "as it falls.",
    )

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        usual = type(self).model_fields
        if self.ranking == "local" and self.normalize != usual["normalize"].default:
            raise ValueError(
                "normalize: with ranking 'local' groups are never compared; leave it out, or rank 'global'"
            )
        if self.criterion not in ("taylor", "hessian", "activation") and self.samples != usual["samples"].default:
            raise ValueError(f"samples: '{self.criterion}' looks at no samples; leave it out")
        if self.criterion == "random" and self.reduction != usual["reduction"].default:
            raise ValueError("reduction: 'random' has one score per channel; leave it out")
        return self

    @model_validator(mode="after")
    def _limits_leave_room(self) -> Self:
        for index, entry in enumerate(self.layers):
            if entry.floor is None and entry.ceiling is not None and entry.ceiling < self.floor:
                raise ValueError(
                    f"layers.{index}.ceiling: {entry.ceiling:g} is below the floor of {self.floor:g}; give '{entry.match}' a "
                    "floor of its own"
                )
        return self

    @model_validator(mode="after")
    def _can_train_before_the_last_cut(self) -> Self:
        if self.recovery is not None:
            return self
        if self.schedule.one_shot is None:
            raise ValueError(
                f"schedule: '{self.schedule.kind}' trains between its cuts with the settings of recovery, which is null; "
                "give recovery, or take one_shot"
            )
        if self.sparsity is not None:
            raise ValueError(
                "sparsity: trains with the settings of recovery, which is null; give recovery, or leave it out"
            )
        return self


class FactorizeTarget(OneOf):
    """How far to factorize."""

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    energy: OpenFraction | None = Field(
        default=None, description="Fraction of each layer's squared singular values kept."
    )
    ratio: OpenFraction | None = Field(default=None, description="Fraction of each layer's full rank kept.")


class FactorizeConfig(StageConfig):
    """`factorize`: replace layers by two thinner ones through a truncated SVD, where that saves work."""

    truncation: Literal["outputs", "weights"] = Field(
        default="outputs",
        description="What stays as it was, as far as the rank allows: what layers answer to training samples "
        "(activation-aware, arXiv:1505.06798), or their weights (plain SVD).",
    )
    allocation: Literal["least_error", "same_energy"] = Field(
        default="least_error",
        description="Ranks for a target of MACs: where a MAC saved costs the least relative error, or so that each layer "
        "keeps the same fraction of its energy.",
    )
    samples: int = Field(default=256, ge=1, description="Training samples that 'outputs' looks at, not augmented.")
    target: FactorizeTarget = FactorizeTarget(macs=0.8)
    multiple: int = Field(default=4, ge=1, le=256, description="Ranks are a multiple of this.")
    min_saving: OpenFraction = Field(
        default=0.3,
        description="A layer is split only where that saves this fraction of its work: two layers cost more overhead than one.",
    )
    protect: tuple[str, ...] = Field(default=(), description="Layer names, with * and ?, that stay as they are.")
    batchnorm_samples: BatchNormSamples = 512
    recovery: RecoveryConfig | None = Field(default=None, description="Optional training afterwards.")

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        usual = type(self).model_fields
        if self.truncation == "weights" and self.samples != usual["samples"].default:
            raise ValueError("samples: truncation 'weights' looks at no samples; leave it out")
        if self.target.kind != "macs" and self.allocation != usual["allocation"].default:
            raise ValueError(
                f"allocation: a target of {self.target.kind} decides each layer's rank alone; leave it out"
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
