"""The penalty of a sparsity training: what is read of the model, and handed to the mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.config.prune import SparsityConfig
from compress.methods.groups import ChannelGroup, Coupled
from compress.methods.sparsity import channel_squares, group_lasso, growing_decay, relative_strength
from compress.pruning.surgeon import Removed


class SparsityPenalty:
    """Draws channels of groups towards zero; a `Penalty` of the training engine."""

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], config: SparsityConfig, going: Removed
    ) -> None:
        """Take the model's groups, how they are drawn, and which of their channels are to go, by group."""
        self._groups = [dataclasses.replace(group, coupled=_within(model, group)) for group in groups]
        self._config, self._going = config, going
        self._places: dict[torch.device, list[tuple[list[Tensor], list[Tensor], Tensor]]] = {}

    def __call__(self, model: nn.Module, position: float) -> Tensor:
        """The penalty at `position` of the training, 0 to 1; a scalar with a gradient."""
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for group, (slices, roots, going) in zip(self._groups, self._on(device), strict=True):
            squares = self._squares(model, group, slices, roots)
            if self._config.kind == "group_lasso":
                total = total + group_lasso(squares, relative_strength(squares))
            else:
                total = total + position * growing_decay(squares, going)
        return self._config.weight * total

    @torch.no_grad()
    def share(self, model: nn.Module) -> float:
        """What the channels that are to go hold of the squared norm of all, 0 to 1; `model` is on the CPU."""
        gone = whole = 0.0
        for group, (slices, roots, going) in zip(self._groups, self._on(torch.device("cpu")), strict=True):
            squares = self._squares(model, group, slices, roots).double()
            gone, whole = gone + float(squares[going].sum()), whole + float(squares.sum())
        return gone / whole if whole > 0 else 0.0

    def _squares(self, model: nn.Module, group: ChannelGroup, slices: list[Tensor], roots: list[Tensor]) -> Tensor:
        weights = [model.get_parameter(item.tensor) for item in group.coupled]
        return channel_squares(weights, [item.axis for item in group.coupled], slices, roots, group.channels)

    def _on(self, device: torch.device) -> list[tuple[list[Tensor], list[Tensor], Tensor]]:
        """Of each group where its channels lie in its tensors, and which are to go; made once per device."""
        if device not in self._places:
            self._places[device] = [
                (
                    [torch.tensor(item.slices, device=device) for item in group.coupled],
                    [torch.tensor(item.roots, device=device) for item in group.coupled],
                    _mask(group.channels, self._going.get(group.name, ())).to(device),
                )
                for group in self._groups
            ]
        return self._places[device]


def _within(model: nn.Module, group: ChannelGroup) -> tuple[Coupled, ...]:
    """What the channels go through; of a bare parameter it is a guess which of its axes they are."""
    sizes = [model.get_parameter(item.tensor).shape[item.axis] for item in group.coupled]
    return tuple(item for item, size in zip(group.coupled, sizes, strict=True) if max(item.slices) < size)


def _mask(channels: int, chosen: Sequence[int]) -> Tensor:
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask
