"""What the settings of `prune` and `factorize` share: how far they go, what that may cost, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.config.base import Config, OneOf, StageConfig
from compress.config.training import TaughtConfig, imitates


class StageBudgetConfig(Config):
    """What a stage may cost: it goes as far towards its target as keeps within this, recovery included."""

    accuracy_drop: float = Field(
        ge=0.0, le=100.0, description="Largest loss of validation accuracy, measured after recovery, points."
    )
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] | None = Field(
        default=None,
        description="Of a one-sided bound of the loss, which must keep within the budget; null: the estimate itself must.",
    )
    trials: int = Field(
        default=6,
        ge=1,
        le=30,
        description="Settings tried at most, the target first; each is a whole stage with its recovery.",
    )
    against: Literal["input", "source"] = Field(
        default="input",
        description="What the accuracy is compared with: what comes into this stage, or the model that budgets and recovery "
        "go by (the source, or what trains at the head).",
    )


class SurgeryTarget(OneOf):
    """How far surgery goes: one number, whose key says of what."""

    nothing: ClassVar[Mapping[str, float]] = {}
    """By key, the value that would change nothing; all that is allowed lies between it and the strongest."""

    def at(self, value: float) -> Self:
        """The same target, of the same kind, at another value."""
        return type(self).model_validate({self.kind: value})


class SurgeryConfig(StageConfig):
    """Settings of a stage that makes a model smaller as far as its target says."""

    target: SurgeryTarget
    budget: StageBudgetConfig | None = Field(
        default=None, description="Go only as far towards `target` as this allows; null goes all the way."
    )


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
