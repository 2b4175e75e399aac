"""What each channel of a group is worth, by any criterion: what is read of the model, and handed to the mathematics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config.prune import Criterion, Reduction
from compress.data.base import Batch
from compress.methods.groups import ChannelGroup, Coupled
from compress.methods.importance import (
    geometric_median,
    l1_norm,
    l2_norm,
    lamp,
    mean_magnitude,
    obd,
    random,
    scale,
    taylor,
)
from compress.methods.ranking import reduced
from compress.models.answers import logits_of
from compress.models.modes import in_evaluation
from compress.seeds import derive_seed

Batches: TypeAlias = Iterable[Batch]
_OF_WEIGHTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "l1": l1_norm,
    "l2": l2_norm,
    "fpgm": geometric_median,
    "lamp": lamp,
}
_OF_FILTERS = ("fpgm", "lamp")
"""These compare the weights that make a channel with those of other channels; what reads it is none of theirs."""
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def scores_of(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    reduction: Reduction,
    batches: Callable[[], Batches],
    seed: int,
) -> dict[str, Tensor]:
    """The scores of the channels of each group, float64, (channels,); the lowest go first.

    Args:
        model: float32, on the CPU; it is left as it was.
        groups: of this model.
        criterion: what is looked at.
        reduction: how the scores of the tensors that a channel goes through become one.
        batches: training samples, for `taylor`, `hessian` and `activation`.
        seed: of `random`.

    Returns:
        Scores by name of the group; a group that the criterion can say nothing of is not among them.
    """
    if criterion == "random":
        return {group.name: random(group.channels, derive_seed(seed, "random", group.name)) for group in groups}
    scored = _scorer(model, groups, criterion, batches)
    found = {}
    for group in groups:
        pairs = [(score, item) for item in group.coupled if (score := scored(item)) is not None]
        if pairs:
            parts = [score.cpu()[torch.tensor(item.slices)] for score, item in pairs]
            roots = [torch.tensor(item.roots) for _, item in pairs]
            found[group.name] = reduced(parts, roots, group.channels, reduction)
    return found


def _scorer(
    model: nn.Module, groups: Sequence[ChannelGroup], criterion: Criterion, batches: Callable[[], Batches]
) -> Callable[[Coupled], Tensor | None]:
    """What says of a tensor's slices what each is worth; None where it says nothing."""
    if criterion in _OF_WEIGHTS:
        return functools.partial(_of_weight, model, _OF_WEIGHTS[criterion], criterion in _OF_FILTERS)
    if criterion == "bn_scale":
        return functools.partial(_of_norm, model)
    coupled = [item for group in groups for item in group.coupled]
    if criterion == "activation":
        readers = {_layer(item) for item in coupled if _reads_inputs(model, item)}
        heard = _activations(model, readers, batches())
        return lambda item: heard.get(_layer(item)) if _reads_inputs(model, item) else None
    graded = _gradients(model, {(item.tensor, item.axis) for item in coupled if item.scored}, criterion, batches())
    return lambda item: graded[item.tensor, item.axis] if item.scored else None


def _of_weight(
    model: nn.Module, score: Callable[[Tensor, int], Tensor], filters_only: bool, item: Coupled
) -> Tensor | None:
    if not item.scored or (filters_only and item.reads):
        return None
    return score(model.get_parameter(item.tensor).detach(), item.axis)


def _of_norm(model: nn.Module, item: Coupled) -> Tensor | None:
    layer = model.get_submodule(_layer(item))
    weight = model.get_parameter(item.tensor).detach()
    if not isinstance(layer, _NORMS) or not item.tensor.endswith("weight") or weight.dim() != 1:
        return None
    return scale(weight)


def _reads_inputs(model: nn.Module, item: Coupled) -> bool:
    """Whether the slices are those of a layer's inputs."""
    transposed = isinstance(model.get_submodule(_layer(item)), nn.modules.conv._ConvTransposeNd)
    return item.reads and item.axis == (0 if transposed else 1)


def _layer(item: Coupled) -> str:
    return item.tensor.rpartition(".")[0]


def _activations(model: nn.Module, layers: Iterable[str], batches: Batches) -> dict[str, Tensor]:
    """Mean magnitude of what each layer is given, by channel: behind norms and activations, as it is read.

    A layer that is never called as a module, such as the output projection of attention, has none.
    """
    total: dict[str, Tensor] = {}
    samples = 0

    def listen(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            found = mean_magnitude(given[0].detach(), axis) * count
            total[name] = total[name] + found if name in total else found

    with ExitStack() as hooks, in_evaluation(model), torch.no_grad():
        for name in sorted(layers):
            hook = functools.partial(listen, name)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for batch in batches:
            count = len(batch.labels)
            model(*batch.inputs)
            samples += count
    return {name: found / samples for name, found in total.items()}


def _gradients(
    model: nn.Module, wanted: Iterable[tuple[str, int]], criterion: Criterion, batches: Batches
) -> dict[tuple[str, int], Tensor]:
    """Scores of slices from gradients of the cross-entropy with the labels, averaged over batches.

    `hessian` has the squared gradients of batches for those of samples (see `obd`): a pass per sample would take hours.
    """
    places = sorted(wanted)
    names = sorted({name for name, _ in places})
    parameters = [model.get_parameter(name) for name in names]
    before = [parameter.requires_grad for parameter in parameters]
    total: dict[tuple[str, int], Tensor] = {}
    squares = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    count = 0
    with in_evaluation(model), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in batches:
            loss = F.cross_entropy(logits_of(model(*batch.inputs)).float(), batch.labels)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for name, parameter, gradient in zip(names, parameters, found, strict=True)
            }
            count += 1
            if criterion == "taylor":
                for name, axis in places:
                    score = taylor(model.get_parameter(name).detach(), gradients[name], axis)
                    total[name, axis] = total.get((name, axis), torch.zeros_like(score)) + score
            else:
                for square, name in zip(squares, names, strict=True):
                    square += gradients[name].double().square()
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
    if criterion == "taylor":
        return {place: score / count for place, score in total.items()}
    means = {name: square / count for name, square in zip(names, squares, strict=True)}
    return {(name, axis): obd(model.get_parameter(name).detach(), means[name].float(), axis) for name, axis in places}
