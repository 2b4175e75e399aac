"""What every settings class shares: closed, frozen and strict."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]


def _names_a_callable(factory: str) -> str:
    source, _, name = factory.rpartition(":")
    if not source or not name:
        raise ValueError(
            f"must be like 'cifar:resnet56', 'torchvision:resnet18', 'package.module:callable' or "
            f"'path/to/file.py:callable', got \"{factory}\""
        )
    return factory


Factory = Annotated[
    str,
    AfterValidator(_names_a_callable),
    Field(
        description="Where the model comes from: 'cifar:resnet56', 'torchvision:resnet18', 'timm:resnet18', "
        "'package.module:callable' or 'path/to/file.py:callable' (relative to the pipeline file).",
    ),
]


class Config(BaseModel):
    """Base of all settings: unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OneOf(Config):
    """A mapping with exactly one key, such as `{kd: {temperature: 4.0}}`: the key says which settings follow."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"must have exactly one of the keys {', '.join(type(self).model_fields)}; got {got}")
        return self

    @property
    def kind(self) -> str:
        """The one key that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def settings(self) -> Any:
        """What stands under the one key."""
        return getattr(self, self.kind)


class StageConfig(Config):
    """Settings of a stage, and the form of model it takes and gives."""

    takes: ClassVar[tuple[str, ...]] = ("float",)
    gives: ClassVar[str] = "float"

    @property
    def is_timed(self) -> bool:
        """Whether times decide what comes of the stage, which then belongs to the CPU that it was made on."""
        return False
