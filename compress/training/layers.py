"""What the layers of a model give out: listened to by hooks that never stay, tried before they are relied on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.base import Inputs
from compress.errors import listed, nearest
from compress.models.modes import in_evaluation

_SHOWN = 40


@contextlib.contextmanager
def listening(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What layers give out in the forward pass inside, by name; no hook is left afterwards, also after an error."""
    found: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(_keeper(found, name))
            hooks.callback(handle.remove)
        yield found


def _keeper(found: dict[str, Tensor], name: str) -> Any:
    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        found[name] = output

    return keep


@dataclass(frozen=True)
class Layers:
    """What each layer of a model gave out in one forward pass: those that can be compared, and why the others cannot."""

    outputs: Mapping[str, Tensor]
    """In the order in which the layers are done: what is around others comes after them."""
    refused: Mapping[str, str]

    def why_not(self, name: str, owner: str) -> str | None:
        """Why a layer of `owner`, such as 'the student', cannot be compared; None where it can.

        Where there is no such layer, all there are stand in the answer.
        """
        if name in self.outputs:
            return None
        if name in self.refused:
            return f"'{name}' of {owner} cannot be compared: it {self.refused[name]}"
        # Whole stages and blocks first: they are what is compared most.
        names = sorted(self.outputs, key=lambda known: known.count("."))
        shapes = listed((f"{known} {shape_of(self.outputs[known])}" for known in names), _SHOWN)
        return f"{owner} has no layer '{name}'{nearest(name, names)} (there are: {shapes})"


def shape_of(output: Tensor) -> str:
    """The shape of what a layer gives out, with n for the number of samples."""
    return f"({', '.join(['n', *map(str, output.shape[1:])])})"


def places_of(output: Tensor) -> tuple[int, ...]:
    """Height and width of a feature map, the number of tokens of a sequence: all axes but those of samples and channels."""
    return tuple(output.shape[2:] if output.dim() == 4 else output.shape[1:-1])


def alike(one: Layers, other: Layers, most: int) -> list[str]:
    """The layers of one name in both that stand for a stage each, in the order in which they are done.

    That is, of those with the same places in both models, and more than one, the last at each; the last `most` of these.
    """
    last = {
        places_of(output): name
        for name, output in one.outputs.items()
        if name in other.outputs
        and output.dim() == other.outputs[name].dim()
        and places_of(output) == places_of(other.outputs[name])
        and math.prod(places_of(output)) > 1
    }
    order = list(one.outputs)
    return sorted(last.values(), key=order.index)[-most:]


def try_layers(model: nn.Module, example: Inputs) -> Layers:
    """Run a model once, in evaluation mode, and look at what each of its layers gives out."""
    calls: dict[str, list[tuple[Any, int]]] = {}
    done: list[str] = []
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    with contextlib.ExitStack() as hooks:
        for name, module in named:
            hooks.callback(module.register_forward_hook(_recorder(calls.setdefault(name, []), done, name)).remove)
        with in_evaluation(model), torch.no_grad():
            model(*example)
    outputs: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys([*done, *calls]):
        of_layer = calls[name]
        reason = _why_refused(of_layer, len(example[0]))
        if reason is None:
            outputs[name] = of_layer[0][0]
        else:
            refused[name] = reason
    return Layers(outputs, refused)


def _recorder(calls: list[tuple[Any, int]], done: list[str], name: str) -> Any:
    def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        done.append(name)
        calls.append((output, output._version if isinstance(output, Tensor) else 0))

    return record


def _why_refused(calls: Sequence[tuple[Any, int]], samples: int) -> str | None:
    """Why what a layer gives out cannot be compared, from its outputs, each with its version at the time."""
    if not calls:
        return "is not called in a forward pass"
    output, version = calls[0]
    if not isinstance(output, Tensor):
        return f"gives out a {type(output).__name__}, not one tensor; name a layer inside it"
    if len(calls) > 1:
        return f"is called {len(calls)} times in a forward pass; name a layer around one of them"
    if output.dim() < 2 or output.shape[0] != samples:
        return f"gives out the shape {tuple(output.shape)} for {samples} samples, not one row per sample"
    if not output.is_floating_point():
        return f"gives out {str(output.dtype).removeprefix('torch.')}, not fractions"
    if output._version != version:
        return "is overwritten in place by a later one; name that one, or the block around them"
    return None
