"""What is done to the inputs of the model that learns: noise, or attacks on itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.config import PerturbConfig
from compress.config.training import AdversarialConfig, NoiseConfig
from compress.data.base import Batch, Input, Inputs
from compress.errors import StageError, listed
from compress.methods.attacks import Reach, label_loss_of, pgd
from compress.models.answers import logits_of
from compress.models.modes import in_evaluation
from compress.training.terms import classes_of


class Perturbation(Protocol):
    """Changes inputs."""

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Inputs:
        """The inputs of a batch, changed; the model and its gradients stay as they are.

        Args:
            model: the one that will get them.
            batch: on the model's device.
            generator: on the CPU, so that the draws are the same on every device.
        """


def perturbation(config: PerturbConfig | None, inputs: Sequence[Input], at: str) -> Perturbation | None:
    """What the settings ask for; None for nothing.

    Args:
        config: noise, an attack, or None.
        inputs: what the model takes.
        at: the key of the training's settings, for messages.

    Raises:
        StageError: where the inputs are no images: both are told in units of pixels.
    """
    if config is None:
        return None
    images = [place for place, each in enumerate(inputs) if each.is_image]
    described = listed(f"'{each.name}' of shape {each.shape}" for each in inputs)
    if not images:
        raise StageError(f"{at}.perturb: changes pixels of images, but the data has none ({described})")
    if isinstance(config.settings, NoiseConfig):
        return _Noise(config.settings, inputs)
    if len(images) > 1:
        raise StageError(f"{at}.perturb.adversarial: attacks one image, but the data has {len(images)} ({described})")
    return _Attack(config.settings, images[0], inputs[images[0]], f"{at}.perturb.adversarial")


class _Noise:
    """Gaussian noise on each pixel of each image, kept within the range of pixels."""

    def __init__(self, config: NoiseConfig, inputs: Sequence[Input]) -> None:
        self._std = config.std
        self._pixels = [Reach.of_pixels(1.0, each.mean, each.std) if each.is_image else None for each in inputs]

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Inputs:  # noqa: ARG002  # see Perturbation
        return tuple(
            given if pixels is None else self._noisy(given, pixels.to(given.device), generator)
            for given, pixels in zip(batch.inputs, self._pixels, strict=True)
        )

    def _noisy(self, images: Tensor, pixels: Reach, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        noisy = images + self._std * pixels.scale * drawn
        return torch.minimum(torch.maximum(noisy, pixels.lower), pixels.upper)


class _Attack:
    """Projected gradient ascent on the cross-entropy with the labels, the model in evaluation mode meanwhile."""

    def __init__(self, config: AdversarialConfig, place: int, image: Input, at: str) -> None:
        self._config, self._place, self._at = config, place, at
        self._reach = Reach.of_pixels(config.epsilon, image.mean, image.std)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Inputs:
        before, images, after = self._around(batch.inputs)

        def logits(changed: Tensor) -> Tensor:
            return logits_of(model(*before, changed, *after)).float()

        device = images.device
        autocast = torch.is_autocast_enabled(device.type)
        # Weights that autocast keeps while no gradient is wanted would have none in the step itself.
        kept = torch.autocast(device.type, torch.get_autocast_dtype(device.type), autocast, cache_enabled=False)
        with in_evaluation(model), kept:
            try:
                attacked = pgd(
                    label_loss_of(logits, classes_of(batch.labels)),
                    images,
                    self._reach.to(device),
                    step=self._config.step,
                    steps=self._config.steps,
                    generator=generator,
                )
            except ValueError as error:  # a model that rounds its input has no gradient there
                raise StageError(f"{self._at}: cannot be found: {error}") from None
        return (*before, attacked, *after)

    def _around(self, inputs: Inputs) -> tuple[Inputs, Tensor, Inputs]:
        return inputs[: self._place], inputs[self._place], inputs[self._place + 1 :]
