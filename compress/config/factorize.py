"""Settings of `factorize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from compress.config.base import OpenFraction
from compress.config.surgery import BatchNormSamples, RecoveryConfig, SurgeryConfig, SurgeryTarget

# The same as in compress.edits, which is a neighbour of the settings and not below them.
Split: TypeAlias = Literal["channel", "spatial", "tucker"]


class FactorizeTarget(SurgeryTarget):
    """How far to factorize."""

    nothing: ClassVar[Mapping[str, float]] = {"macs": 1.0, "energy": 1.0, "ratio": 1.0}

    macs: OpenFraction | None = Field(default=None, description="Fraction of the multiply-accumulates that remains.")
    energy: OpenFraction | None = Field(
        default=None,
        description="Fraction of each layer's squared singular values kept: each takes the cheapest form that loses no more "
        "than the rest.",
    )
    ratio: OpenFraction | None = Field(default=None, description="Fraction of each layer's full rank kept.")


class FactorizeConfig(SurgeryConfig):
    """`factorize`: replace layers by thinner ones in a row, where that saves work and time."""

    splits: tuple[Split, ...] = Field(
        default=("channel", "spatial", "tucker"),
        min_length=1,
        description="Forms that a layer may take; each takes the one that serves the target best. channel: k x k to fewer "
        "channels, then 1 x 1 (arXiv:1505.06798), the only one of linear layers and of a target of ratio; spatial: k x 1, then "
        "1 x k (arXiv:1405.3866); tucker: 1 x 1, k x k, 1 x 1 (arXiv:1511.06530).",
    )
    truncation: Literal["outputs", "weights"] = Field(
        default="outputs",
        description="What stays as it was, as far as the rank allows: what layers answer to training samples "
        "(activation-aware, arXiv:1505.06798), or their weights (plain SVD).",
    )
    allocation: Literal["least_error", "same_energy"] = Field(
        default="least_error",
        description="Forms and ranks for a target of MACs: where a MAC saved costs the least relative error, or so that each "
        "layer keeps the same fraction of its energy.",
    )
    samples: int = Field(default=256, ge=1, description="Training samples that 'outputs' looks at, not augmented.")
    target: FactorizeTarget = FactorizeTarget(macs=0.8)
    multiple: int = Field(default=4, ge=1, le=256, description="Ranks are a multiple of this.")
    min_saving: OpenFraction = Field(
        default=0.3,
        description="A layer is split only where that saves this fraction of its work: two layers cost more overhead than one.",
    )
    faster_by: float = Field(
        default=0.02,
        ge=0.0,
        lt=1.0,
        description="A layer is split only where that saves this fraction of its time, measured in ONNX Runtime on this machine "
        "(one sample, one thread). 0 measures nothing.",
    )
    timed_as: Literal["fp32", "int8"] = Field(
        default="fp32",
        description="What 'faster_by' is measured in: int8 where 'quantize' follows and its file is deployed.",
    )
    protect: tuple[str, ...] = Field(default=(), description="Layer names, with * and ?, that stay as they are.")
    batchnorm_samples: BatchNormSamples = 512
    recovery: RecoveryConfig | None = Field(default=None, description="Optional training afterwards.")

    @property
    def is_timed(self) -> bool:
        """Where splits must be faster to be kept."""
        return self.faster_by > 0

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        usual = type(self).model_fields
        if self.truncation == "weights" and self.samples != usual["samples"].default:
            raise ValueError("samples: truncation 'weights' looks at no samples; leave it out")
        if self.target.kind != "macs" and self.allocation != usual["allocation"].default:
            raise ValueError(
                f"allocation: a target of {self.target.kind} decides each layer's rank alone; leave it out"
            )
        if len(set(self.splits)) < len(self.splits):
            raise ValueError("splits: each form is named once")
        if self.target.kind == "ratio" and self.splits not in (usual["splits"].default, ("channel",)):
            raise ValueError(
                "splits: a target of ratio is a fraction of the channel split's rank, the others have no such rank; leave it "
                "out, or take a target of macs or energy"
            )
        if self.faster_by == 0 and self.timed_as != usual["timed_as"].default:
            raise ValueError("timed_as: with faster_by 0 nothing is timed; leave it out")
        return self
