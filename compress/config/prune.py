"""Settings of `prune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from compress.config.base import Config, Fraction, OneOf, OpenFraction
from compress.config.surgery import BatchNormSamples, RecoveryConfig, SurgeryConfig, SurgeryTarget

Criterion: TypeAlias = Literal["l1", "l2", "fpgm", "lamp", "bn_scale", "taylor", "hessian", "activation", "random"]
Reduction: TypeAlias = Literal["sum", "mean", "max", "product"]
Ranking: TypeAlias = Literal["local", "global", "isomorphic", "sensitivity"]
Normalization: TypeAlias = Literal["none", "mean", "max", "sum", "standardize"]


class PruneTarget(SurgeryTarget):
    """How far to prune."""

    nothing: ClassVar[Mapping[str, float]] = {"macs": 1.0, "parameters": 1.0, "latency": 1.0, "ratio": 0.0}

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    parameters: OpenFraction | None = Field(default=None, description="Fraction of the parameters that remains.")
    latency: OpenFraction | None = Field(
        default=None,
        description="Fraction of the time that remains, measured in ONNX Runtime on this machine (one sample, one thread).",
    )
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
    """Each cut takes the same fraction of what is left, pruning and training in turns (Han et al. 2015, arXiv:1506.02626)."""

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
        description="Factor of the penalty: about 1e-4 to 1e-3 of group_lasso; of group_growing that of the last step, 0.1 to 1.",
    )
    epochs: int = Field(default=2, ge=1, le=100_000, description="Passes over the training split.")


class PruneConfig(SurgeryConfig):
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
        "among groups of one kind, the same fraction of each kind (arXiv:2407.04616); sensitivity: of each group as much as "
        "costs the least accuracy, found on validation by silencing the channels of one group at a time.",
    )
    normalize: Normalization = Field(
        default="mean",
        description="What scores of a group are divided by before groups are compared; for 'global' and 'isomorphic' only.",
    )
    sensitivity_samples: int = Field(
        default=512, ge=1, description="Validation samples that 'sensitivity' is found on, stratified by class."
    )
    samples: int = Field(
        default=512, ge=1, description="Training samples that 'taylor', 'hessian' and 'activation' look at."
    )
    target: PruneTarget = PruneTarget(macs=0.5)
    timed_as: Literal["fp32", "int8"] = Field(
        default="fp32",
        description="What a target of latency and `multiple: auto` are measured in: int8 where 'quantize' follows and its file "
        "is deployed.",
    )
    multiple: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        default=4,
        description="Channels that remain are a multiple of this. auto: of 1, 2, 4, 8 and 16 the smallest that no larger one "
        "beats by 2 % of the time or more, measured in ONNX Runtime on this machine (one sample, one thread), the target met in "
        "each.",
    )
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

    @property
    def is_timed(self) -> bool:
        """Where the target is one of latency, or the multiple is found by timing."""
        return self.target.kind == "latency" or self.multiple == "auto"

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        usual = type(self).model_fields
        if self.ranking not in ("global", "isomorphic") and self.normalize != usual["normalize"].default:
            raise ValueError(
                f"normalize: with ranking '{self.ranking}' scores of groups are never compared; leave it out, or rank 'global'"
            )
        if self.ranking != "sensitivity" and self.sensitivity_samples != usual["sensitivity_samples"].default:
            raise ValueError(f"sensitivity_samples: ranking '{self.ranking}' looks at none; leave it out")
        if self.ranking == "sensitivity" and self.target.kind == "ratio":
            raise ValueError(
                "ranking: a target of ratio takes the same fraction of every group and leaves 'sensitivity' nothing to decide; "
                "take a target of macs, parameters or latency"
            )
        if self.target.kind != "latency" and self.multiple != "auto" and self.timed_as != usual["timed_as"].default:
            raise ValueError(f"timed_as: a target of {self.target.kind} times nothing; leave it out")
        if self.target.kind == "latency" and self.multiple == "auto":
            raise ValueError(
                "multiple: with a target of latency models of all multiples take the same time, so that 'auto' has nothing to "
                "compare; give a number"
            )
        if self.target.kind == "latency" and self.schedule.one_shot is None:
            raise ValueError("schedule: a target of latency is met in one cut; take one_shot, or a target of macs")
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
