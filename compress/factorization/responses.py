"""What layers see and give out for calibration samples: what activation-aware truncation needs."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data.base import Batch
from compress.factorization.calls import first_input
from compress.methods.whitening import Moments, add_moments, sampled_rows
from compress.models.modes import in_evaluation
from compress.seeds import derive_seed

PATCHES = 2048
"""About how many patches of a convolution are remembered; 38 MB for one of 512 channels and 3x3 filters."""


@dataclass(frozen=True, eq=False)
class Heard:
    """What was heard of a layer."""

    outputs: Moments
    """Over samples and positions, bias included. Outputs instead of inputs: of a 3x3 convolution they are nine times fewer
    numbers, and say the same (see `whitening`)."""
    patches: Tensor | None = None
    """Of a convolution that was asked for: rows of `convolution_rows` at random positions of every sample, float32."""


@torch.no_grad()
def listen(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Batch],
    *,
    patches_of: Collection[str] = (),
    samples: int = 1,
) -> dict[str, Heard]:
    """Run samples through a model and remember what some of its layers see and give out.

    Args:
        model: float32, on the CPU.
        layers: names of linear layers and convolutions; what one that is called several times gives out adds up.
        batches: calibration samples.
        patches_of: which of the convolutions remember patches, the same positions each time; of one that is called several
            times, those of the first call in a batch.
        samples: how many the batches hold together; `PATCHES` are spread over them.

    Returns:
        By name; a layer that is never called has none.
    """
    outputs: dict[str, Moments] = {}
    patches: dict[str, list[Tensor]] = {}
    called: set[str] = set()

    def remember(
        name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        channels_last = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
        outputs[name] = add_moments(outputs.get(name), channels_last)
        if name in patches_of and name not in called:
            assert isinstance(module, nn.Conv2d)
            per_sample = -(-PATCHES // max(1, samples))
            patches.setdefault(name, []).append(_some_rows(module, first_input(given, named), output, per_sample, name))
            called.add(name)

    with ExitStack() as hooks, in_evaluation(model):
        for name in layers:
            hook = functools.partial(remember, name)
            hooks.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            called.clear()
            model(*batch.inputs)
    return {
        name: Heard(moments, torch.cat(patches[name]) if name in patches else None) for name, moments in outputs.items()
    }


def _some_rows(layer: nn.Conv2d, given: Tensor, output: Tensor, per_sample: int, name: str) -> Tensor:
    """Rows of one call: the positions differ from layer to layer, not from batch to batch."""
    places = output.shape[-2] * output.shape[-1]
    generator = torch.Generator().manual_seed(derive_seed(0, "patches", name))
    at = torch.randperm(places, generator=generator)[:per_sample]
    height, width = layer.kernel_size
    padding = layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1])
    stride, dilation = (layer.stride[0], layer.stride[1]), (layer.dilation[0], layer.dilation[1])
    return sampled_rows(given, at, (height, width), stride, padding, dilation)
