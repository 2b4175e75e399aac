"""What surgery did to a model, as data: small, JSON-able, replayed on a fresh model at load. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

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
    """A linear or convolutional layer becomes a sequence of two with `rank` channels between them.

    `split="channel"`: a convolution (o, i, h, w) becomes (rank, i, h, w) and then (o, rank, 1, 1); a linear layer
    (o, i) becomes (rank, i) and then (o, rank). The bias, where there is one, belongs to the second; with `bias` the second
    has one even where the layer had none.
    """

    module: str
    rank: Annotated[int, Field(ge=1)]
    bias: bool = False
    split: Literal["channel"] = "channel"
    edit: Literal["factor"] = "factor"


Edit = Annotated[Keep | Attribute | Factor, Field(discriminator="edit")]
EDITS: TypeAdapter[tuple[Edit, ...]] = TypeAdapter(tuple[Edit, ...])
