"""Settings of training: the engine's, and those of learning from a teacher."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from compress.config.base import Config, Factory, OneOf, OpenFraction
from compress.config.losses import DISTILLATION_LOSSES, LossEntry, Losses, ScheduleConfig
from compress.names import is_code


class ModelConfig(Config):
    """A model: the callable that makes it, its arguments and its weights."""

    factory: Factory
    kwargs: dict[str, JsonValue] = Field(default={}, description="Arguments of the factory.")
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="A .safetensors or .pth file (relative to the pipeline file), or the name of published weights "
        "(torchvision: 'DEFAULT' or 'IMAGENET1K_V1'; timm: 'pretrained'). Left out: random initialisation.",
    )


class StudentConfig(ModelConfig):
    """The student of a distillation."""


class TeacherConfig(ModelConfig):
    """A further teacher."""

    share: float = Field(default=1.0, gt=0.0, description="Its part of the mean; the parts are divided by their sum.")

    @model_validator(mode="after")
    def _knows_something(self) -> Self:
        if self.weights is None and not is_code(self.factory):
            raise ValueError("weights: a teacher with random weights knows nothing; name a file or published weights")
        return self


class AdversarialConfig(Config):
    """The worst inputs within reach (PGD, Madry et al. 2018, arXiv:1706.06083), found in each step with the labels.

    With terms that imitate: adversarially robust distillation (Goldblum et al. 2020, arXiv:1905.09747).
    """

    epsilon: float = Field(default=8 / 255, gt=0.0, le=1.0, description="Largest change of a pixel, pixels in [0, 1].")
    step: float = Field(default=2 / 255, gt=0.0, le=1.0, description="Change of a pixel per step of the search.")
    steps: int = Field(
        default=7,
        ge=1,
        le=1000,
        description="Steps of the search, a pass each; 1 with step = epsilon is close to FGSM.",
    )


class NoiseConfig(Config):
    """Gaussian noise on each pixel, drawn anew in each step, kept within [0, 1]."""

    std: float = Field(default=0.1, gt=0.0, le=10.0, description="Standard deviation, of pixels in [0, 1].")


class PerturbConfig(OneOf):
    """What is done to the images that the model sees in training; the teacher always sees them as they are.

    The terms that imitate see the changed images, all other terms clean ones. Where no term imitates, all see the changed
    ones: plain adversarial training, or training with noise.
    """

    adversarial: AdversarialConfig | None = None
    noise: NoiseConfig | None = None


class TrainingConfig(Config):
    """How a model is trained."""

    epochs: int = Field(default=12, ge=1, le=100_000, description="Passes over the training split.")
    batch_size: int = Field(default=64, ge=2, description="Samples per step, over all processes together.")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="A step's samples go through the model in this many parts, for less memory. The same step, but for what "
        "looks at the samples of a part together: batch norms, and terms that compare samples.",
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = Field(
        default="sgd", description="SGD is Nesterov with momentum."
    )
    learning_rate: float = Field(default=0.1, gt=0.0, description="Peak learning rate.")
    momentum: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="Momentum of SGD and RMSprop; beta 1 of Adam and AdamW."
    )
    weight_decay: float = Field(default=5e-4, ge=0.0, description="Not applied to norms and biases.")
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = Field(
        default="one_cycle", description="Learning rate over the steps: up and down, down only, down by steps, or flat."
    )
    warm_up: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the steps over which the learning rate rises linearly first; one_cycle has its own.",
    )
    milestones: tuple[OpenFraction, ...] = Field(
        default=(0.5, 0.75), description="Fractions of the steps at which the schedule 'step' goes down."
    )
    gamma: OpenFraction = Field(default=0.1, description="Factor of the learning rate at each milestone.")
    gradient_clip: float | None = Field(default=None, gt=0.0, description="Largest gradient norm.")
    mixup: float | None = Field(
        default=None,
        gt=0.0,
        description="Alpha of mixup (Zhang et al. 2018, arXiv:1710.09412): two samples blended. With cutmix, one of the two "
        "is drawn per step.",
    )
    cutmix: float | None = Field(
        default=None, gt=0.0, description="Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899): a box of another image."
    )
    ema: OpenFraction | None = Field(
        default=None,
        description="Decay per step of a moving average of the weights, such as 0.999; it is what is validated and kept.",
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop after this many epochs without a better one on validation."
    )
    batchnorm: Literal["train", "frozen", "sync"] = Field(
        default="train",
        description="Statistics of batch norms: of each batch and process; frozen as they are; or over all processes "
        "(CUDA only).",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Autocast; 'auto' is bf16 where the hardware multiplies it, else fp32. fp16 (CUDA only) scales the loss.",
    )
    perturb: PerturbConfig | None = Field(default=None, description="Noise or attacks on the images, for robustness.")
    channels_last: bool = Field(default=True, description="Memory layout of 4-d inputs; faster on most hardware.")
    compile: bool = Field(default=False, description="torch.compile the model; pays in long trainings only.")

    @model_validator(mode="after")
    def _parts_have_samples(self) -> Self:
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} parts of batch_size {self.batch_size} would have fewer than 2 samples each"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: must rise, got {list(self.milestones)}")
        return self

    @model_validator(mode="after")
    def _schedule_reads_all(self) -> Self:
        if self.warm_up > 0 and self.schedule == "one_cycle":
            raise ValueError("warm_up: one_cycle rises and falls by itself; leave it out, or take another schedule")
        for name in ("milestones", "gamma"):
            if self.schedule != "step" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: only the schedule 'step' has them, this is '{self.schedule}'")
        return self


class TeacherCacheConfig(Config):
    """Teacher outputs computed once, kept on disk, and read in every epoch that sees the same inputs."""

    views: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Augmented versions per image, taken in turn by the epochs; 1 is all there is without augmentation. "
        "Fewer views than epochs are less variety for the student.",
    )
    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="How logits are stored; float16 takes half the disk and rounds them."
    )


class EnsembleConfig(Config):
    """Several teachers as one."""

    others: tuple[TeacherConfig, ...] = Field(min_length=1, description="Teachers beside the model that comes in.")
    share: float = Field(default=1.0, gt=0.0, description="Part of the model that comes in.")
    average: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="What is averaged: softened probabilities (Hinton et al. 2015) or logits."
    )


class TaughtConfig(TrainingConfig):
    """Training with a teacher."""

    losses: Losses = DISTILLATION_LOSSES
    teacher_share: Annotated[float, Field(ge=0.0, le=1.0)] | ScheduleConfig | None = Field(
        default=None,
        description="s: all terms that imitate count s times their weight, all others 1 - s times (α·CE + (1-α)·KD), fixed or "
        "changing. Left out: the weights alone (CE + λ·KD).",
    )
    ema_teacher: OpenFraction = Field(
        default=0.999, description="Decay per step of the moving average that terms 'from: ema' imitate."
    )
    cache: TeacherCacheConfig | None = Field(
        default=None, description="Compute the teacher's answers once per input; null asks the teacher in every step."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        terms = [entry.settings for entry in self.losses]
        compares_layers = any(term.reads == "features" for term in terms)
        if (
            isinstance(self.teacher_share, ScheduleConfig)
            and max(self.teacher_share.start, self.teacher_share.end) > 1.0
        ):
            raise ValueError("teacher_share: must lie between 0 and 1 from start to end")
        if self.teacher_share is not None and all(term.imitated is None for term in terms):
            raise ValueError("teacher_share: no term of the losses imitates anybody")
        if self.teacher_share is not None and all(term.imitated for term in terms):
            raise ValueError("teacher_share: all terms of the losses imitate, so that nothing is left to share with")
        if self.teacher_share is not None and self.losses == DISTILLATION_LOSSES:
            raise ValueError(
                "teacher_share: the usual losses have weights of 0.9 and 0.1 already; write them down, such as "
                "losses: [{kd: {}}, {labels: {}}]"
            )
        if self.ema_teacher != type(self).model_fields["ema_teacher"].default and not any(
            imitates(entry, "ema") for entry in self.losses
        ):
            raise ValueError(
                "ema_teacher: no term of the losses imitates the average; add one such as {kd: {from: ema}}"
            )
        if self.cache is not None and self.cache.views > self.epochs:
            raise ValueError(f"cache: {self.cache.views} views are more than {self.epochs} epochs can see")
        if self.compile and compares_layers:
            raise ValueError("compile: a compiled model does not tell what its layers give out; leave it out here")
        if self.cache is not None and not any(imitates(entry, "teacher") for entry in self.losses):
            raise ValueError("cache: no term of the losses imitates the teacher")
        if self.cache is not None and compares_layers:
            raise ValueError("cache: keeps what the teacher answers, not what its layers give out; leave it out here")
        if self.cache is not None and (self.mixup or self.cutmix):
            raise ValueError("cache: with mixup or cutmix no input comes twice; leave one of them out")
        return self


def imitates(entry: LossEntry, source: Literal["teacher", "peers", "ema"]) -> bool:
    """Whether a term imitates that source."""
    return bool(entry.settings.imitated == source)
