"""What surgery did to a model, as data: small, JSON-able, replayed on a fresh model at load. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

Split: TypeAlias = Literal["channel", "spatial", "tucker"]
"""Forms that a factorized layer can have, see `Factor`."""

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class Keep:
    """Of `size` indices along each of the named tensor axes, keep `kept`, in that order.

    `Keep(size=16, kept=(0, 3), axes=(("conv1.weight", 0), ("bn1.weight", 0)))` leaves two channels of sixteen.
    """

    size: Annotated[int, Field(ge=1)]
    kept: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    axes: Annotated[tuple[tuple[str, Annotated[int, Field(ge=0)]], ...], Field(min_length=1)]
    """Pairs of a tensor's name in the state dict and an axis of it."""
    edit: Literal["keep"] = "keep"


@dataclass(frozen=True, config=_STRICT)
class Attribute:
    """A number that a module remembers about its shape, such as `in_channels`, gets a new value."""

    module: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    value: int | tuple[int, ...]
    edit: Literal["attribute"] = "attribute"


@dataclass(frozen=True, config=_STRICT)
class Factor:
    """A linear or convolutional layer becomes a sequence of two or three, with `rank` channels before the last.

    `split="channel"`: a convolution (o, i, h, w) becomes (rank, i, h, w) and then (o, rank, 1, 1); a linear layer
    (o, i) becomes (rank, i) and then (o, rank).
    `split="spatial"`: a convolution becomes a vertical (rank, i, h, 1) and then a horizontal one (o, rank, 1, w).
    `split="tucker"`: a convolution becomes (rank_in, i, 1, 1), (rank, rank_in, h, w) and then (o, rank, 1, 1).

    The bias, where there is one, belongs to the last; with `bias` the last has one even where the layer had none.
    """

    module: str
    rank: Annotated[int, Field(ge=1)]
    bias: bool = False
    split: Split = "channel"
    rank_in: Annotated[int, Field(ge=1)] | None = None
    """Channels after the first of three; of `tucker` only."""
    edit: Literal["factor"] = "factor"

    @model_validator(mode="after")
    def _ranks_of_the_form(self) -> Self:
        if (self.split == "tucker") != (self.rank_in is not None):
            raise ValueError("rank_in: split 'tucker' has one, the others have none")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints written before there was a second rank must keep their digests.
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if key != "rank_in" or value is not None}


Edit = Annotated[Keep | Attribute | Factor, Field(discriminator="edit")]
EDITS: TypeAdapter[tuple[Edit, ...]] = TypeAdapter(tuple[Edit, ...])
