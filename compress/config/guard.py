"""Settings of a stage that goes only as far as the accuracy allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from compress.config.base import Config, OneOf


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
