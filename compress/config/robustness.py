"""How robustness is measured. Not part of a pipeline file: options of `compress robustness`."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias, get_args

from pydantic import Field

from compress.config.base import Config

Attack: TypeAlias = Literal["fgsm", "pgd"]
ATTACKS: Final[tuple[Attack, ...]] = get_args(Attack)


class RobustnessConfig(Config):
    """On which samples, and how hard."""

    split: Literal["test", "validation"] = Field(default="test", description="Which samples.")
    samples: int = Field(
        default=1000,
        ge=0,
        description="How many of them, stratified by class, the same for every model; 0 takes all.",
    )
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        default=(1, 2, 3, 4, 5), min_length=1, description="Severities of the corruptions, 1 to 5."
    )
    epsilons: tuple[Annotated[float, Field(gt=0.0, le=255.0)], ...] = Field(
        default=(1.0, 2.0, 4.0, 8.0),
        min_length=1,
        description="Largest changes of a pixel by an attack, 255ths of its range.",
    )
    steps: int = Field(
        default=10, ge=1, le=1000, description="Steps of PGD, each 2.5 epsilon / steps long: they can cross the ball."
    )
    restarts: int = Field(default=1, ge=1, le=100, description="Random starts of PGD; each costs all steps.")
