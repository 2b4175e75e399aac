"""Attacks with gradients: the inputs within reach for which a loss is large.

Inputs are what the model takes, normalised; how far an attack may go is said in pixels from 0 to 1. A loss is any
function from inputs to one number per sample, such as `label_loss_of`, or for distillation the divergence from what a
teacher answers to the clean inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Loss: TypeAlias = Callable[[Tensor], Tensor]
"""From inputs (n, ...) to a loss per sample, (n,), which the attack makes large."""


@dataclass(frozen=True)
class Reach:
    """How far an attack may go from an image: `epsilon` in every pixel (L∞), and never out of the range of pixels."""

    epsilon: float
    """Largest change of a pixel, pixels in [0, 1]."""
    scale: Float[Tensor, "c 1 1"]
    """Units of the model's input in a pixel's range, per channel: 1 / std."""
    lower: Float[Tensor, "c 1 1"]
    """A black pixel as the model gets it."""
    upper: Float[Tensor, "c 1 1"]
    """A white one."""

    @classmethod
    def of_pixels(cls, epsilon: float, mean: Sequence[float], std: Sequence[float]) -> Reach:
        """The reach for images that the model gets as (pixel - mean) / std.

        Args:
            epsilon: largest change of a pixel, 0 to 1.
            mean: per channel, of pixels in [0, 1].
            std: per channel, > 0.
        """
        centre, spread = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std))
        # In the order in which images are normalised: rounding then keeps every pixel of an image between the two.
        return cls(epsilon, 1 / spread, (0.0 - centre) / spread, (1.0 - centre) / spread)

    def to(self, device: str | torch.device) -> Reach:
        """The same on a device."""
        return Reach(self.epsilon, self.scale.to(device), self.lower.to(device), self.upper.to(device))

    def around(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The least and the greatest that each value may become, rounded towards the image: no further than `epsilon`."""
        exact = images.double()
        margin = self.epsilon * self.scale.double()
        low, high = (exact - margin).to(images.dtype), (exact + margin).to(images.dtype)
        # Rounding to the type of the images may have gone a last digit too far.
        # Distances are compared, and not `exact - margin`, which double precision has rounded itself.
        low = torch.where(exact - low.double() > margin, torch.nextafter(low, images), low)
        high = torch.where(high.double() - exact > margin, torch.nextafter(high, images), high)
        return torch.maximum(low, self.lower), torch.minimum(high, self.upper)


def label_loss_of(model: Callable[[Tensor], Tensor], labels: Int[Tensor, " n"]) -> Loss:
    """Cross-entropy of a model's logits with the labels, per sample.

    Args:
        model: from inputs (n, ...) to logits (n, classes).
        labels: class indices from 0.
    """
    return lambda inputs: F.cross_entropy(model(inputs), labels, reduction="none")


def fgsm(loss: Loss, images: Float[Tensor, "n c h w"], reach: Reach) -> Float[Tensor, "n c h w"]:
    """One step of size ε along the sign of the gradient (fast gradient sign method): x + ε · sign(∇ₓ loss).

    Source: Goodfellow, Shlens, Szegedy 2015, "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572,
    section 4.

    Args:
        loss: what is to grow. Layers that behave differently in training are the caller's business.
        images: what the model takes, within the range of pixels.
        reach: ε and that range.

    Returns:
        Images of the same shape, no further than ε from the given ones in any pixel, within the range of pixels. The
        loss may shrink for some: the gradient says nothing about steps of this size.

    Raises:
        ValueError: where the loss does not depend on the images in a way that has a gradient.
    """
    low, high = reach.around(images)
    _, gradient = _losses_and_gradient(loss, images)
    return _clamped(images + reach.epsilon * reach.scale * gradient.sign(), low, high)


def pgd(
    loss: Loss,
    images: Float[Tensor, "n c h w"],
    reach: Reach,
    *,
    step: float,
    steps: int,
    restarts: int = 1,
    generator: torch.Generator,
) -> Float[Tensor, "n c h w"]:
    """Projected gradient ascent in the L∞ ball: the worst of all points on the way, from random starts.

    From a start drawn evenly from the ball it repeats x ← Π(x + step · sign(∇ₓ loss)), Π back into ball and range. Of
    each image the point of the largest loss is kept, the image itself among them, so that no loss is below the clean one.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    arXiv:1706.06083, section 2.1; random starts and restarts: section 4.

    Args:
        loss: what is to grow. Layers that behave differently in training are the caller's business.
        images: what the model takes, within the range of pixels.
        reach: the radius ε of the ball and that range.
        step: change of a pixel per step, pixels in [0, 1], > 0.
        steps: from 1.
        restarts: starts, from 1; each costs `steps` gradients.
        generator: of the starts, on the CPU, so that they are the same on every device.

    Returns:
        Images of the same shape, no further than ε from the given ones in any pixel, within the range of pixels.

    Raises:
        ValueError: where the loss does not depend on the images in a way that has a gradient, or a number is too small.
    """
    if steps < 1 or restarts < 1 or step <= 0:
        raise ValueError(f"needs steps, restarts >= 1 and step > 0, got {steps}, {restarts} and {step}")
    low, high = reach.around(images)
    with torch.no_grad():
        worst = _Worst(images, loss(images))
    for _ in range(restarts):
        drawn = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        current = _clamped(images + reach.epsilon * reach.scale * (2 * drawn - 1), low, high)
        for _ in range(steps):
            losses, gradient = _losses_and_gradient(loss, current)
            worst.add(current, losses)
            current = _clamped(current + step * reach.scale * gradient.sign(), low, high)
        with torch.no_grad():
            worst.add(current, loss(current))
    return worst.images


class _Worst:
    """Of each sample the point of the largest loss so far."""

    def __init__(self, images: Tensor, losses: Tensor) -> None:
        self.images, self._losses = images.clone(), losses.detach().clone()

    def add(self, images: Tensor, losses: Tensor) -> None:
        is_worse = losses.detach() > self._losses  # never where it is no number
        self._losses = torch.where(is_worse, losses.detach(), self._losses)
        self.images = torch.where(is_worse.view(-1, 1, 1, 1), images, self.images)


def _losses_and_gradient(loss: Loss, images: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, (n,), and their gradients, like the images; nothing is added to the gradients of any parameter."""
    with torch.enable_grad():
        point = images.detach().requires_grad_()
        losses = loss(point)
        found: Sequence[Tensor | None] = (None,)
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), (point,), allow_unused=True)
    if found[0] is None:
        raise ValueError("the loss has no gradient with respect to the images")
    return losses.detach(), found[0].nan_to_num(0.0)


def _clamped(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(images, low), high)
