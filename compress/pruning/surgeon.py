"""Groups of channels that can be removed, each proven on a copy; all others are left alone, with the reason."""

from __future__ import annotations

import copy
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from compress import surgery
from compress.data.base import Inputs
from compress.edits import Attribute, Edit, Keep
from compress.errors import StageError, first_line
from compress.methods import attention
from compress.methods.groups import (
    ChannelGraph,
    ChannelGroup,
    aliasing_copy,
    copy_on_cpu,
    outputs_of,
    sharing_copy,
)
from compress.methods.silence import CANNOT_TELL, Seen, Whole, in_float64, outputs_for, random_copy, seen
from compress.methods.trial import find_broken
from compress.pruning.memory import give_back

_MOST_SIZES = 16
"""Ways tried to set the sizes that a model remembers."""
_LEAST_SAMPLES = 2
"""As a model may take a batch of one for something else."""
_OUTPUTS = "they are outputs of the model"
Removed = Mapping[str, Sequence[int]]
"""Channels to remove, by the name of their group."""


class BrokenError(Exception):
    """Channels that cannot be removed; its text says why."""


class Surgeon:
    """Finds the groups whose channels can go, and proves what becomes of the model without them."""

    def __init__(
        self, model: nn.Module, example: Inputs, samples: Inputs, protect: Sequence[str], warn: Callable[[str], None]
    ) -> None:
        """Trace the model; nothing is tried yet.

        Args:
            model: stays as it is.
            example: a batch of each input.
            samples: a few real ones, on which a trial compares outputs.
            protect: names of layers, with * and ?, whose output channels stay.
            warn: told of every group that cannot be pruned and is no surprise.

        Raises:
            StageError: where torch-pruning cannot trace the model.
        """
        self.model, self._example, self._protect, self._warn = _on_cpu(model), example, protect, warn
        self.left_alone: dict[str, str] = {}
        """Why a group stays whole, by its name."""
        self.groups: list[ChannelGroup] = self._candidates()
        """Those that may be pruned, as far as is known."""
        self._by_name = {group.name: group for group in self.groups}
        self._tried = samples
        self._proven_before: dict[frozenset[tuple[str, tuple[int, ...]]], tuple[Edit, ...]] = {}
        """Edits that were proven, by the channels that go."""
        self._needed: set[tuple[str, str]] = set()
        """Sizes that the model remembers and that a trial has found to be needed."""

    def exclude(self, reasons: Mapping[str, str]) -> None:
        """Leave groups alone for reasons of the caller."""
        self.left_alone |= reasons
        self._forget()

    def try_groups(self, removed: Removed) -> None:
        """Remove these channels on trial, and leave the groups alone that do not survive it."""
        read = [group for group in self.groups if group.is_read]
        for group in self.groups:
            if not group.is_read:
                if self._are_outputs({group.name: removed[group.name]}):  # no surprise
                    self.left_alone[group.name] = _OUTPUTS
                else:
                    self._leave_alone([(group, "what reads them is no layer that this tool knows to cut")])
        shown = self._seen(read)
        give_back()
        dark = set(shown.dark)
        reason = f"{CANNOT_TELL} they make no difference to the outputs for {len(self._tried[0])} training samples"
        if (samples := max(_LEAST_SAMPLES, shown.samples)) < len(self._tried[0]):
            self._tried = tuple(tensor[:samples] for tensor in self._tried)
            self.__dict__.pop("_whole", None)
        self._leave_alone([(group, reason) for group in read if group.name in dark])
        self._try([group for group in read if group.name not in dark], removed)

    def edits(self, removed: Removed) -> tuple[Edit, ...] | None:
        """What removing these channels means for every tensor, proven on random weights.

        None where it cannot be done as a whole, although each group survived its trial: those to blame are left alone now.
        """
        try:
            return self._edits(removed)
        except BrokenError:
            self._try([group for group in self.groups if removed[group.name]], removed)
            return None

    def _try(self, groups: Sequence[ChannelGroup], removed: Removed) -> None:
        def why_not(some: Sequence[ChannelGroup]) -> str | None:
            return self._why_not({group.name: removed[group.name] for group in some})

        self._leave_alone(find_broken(groups, why_not))
        self._forget()

    def _forget(self) -> None:
        self.groups = [group for group in self.groups if group.name not in self.left_alone]

    @functools.cached_property
    def _answered(self) -> list[torch.Size]:
        """The shapes of the model's outputs for the example."""
        return [tensor.shape for tensor in outputs_for(self.model, self._example)]

    @functools.cached_property
    def _random(self) -> nn.Module:
        """The model with random weights, in float32; made once the throwaway copy of the first trace is gone."""
        return random_copy(self.model)

    @functools.cached_property
    def _whole(self) -> Whole:
        """It again, with all channels, as it computes for the samples of the trials."""
        return Whole(self._random, self._tried)

    def _seen(self, groups: Sequence[ChannelGroup]) -> Seen:
        """Which groups a proof can tell anything of, and how many samples that takes."""
        shown = seen(self._random, groups, self._tried)
        if not shown.dark:
            return shown
        # A gate that float32 rounds to one is not closed; float64 tells, with a copy that is twice as large.
        try:
            return seen(copy.deepcopy(self._random).double(), groups, in_float64(self._tried))
        except Exception:  # noqa: BLE001  # a forward that makes float32 tensors of its own may raise anything
            return shown

    def _candidates(self) -> list[ChannelGroup]:
        """Groups that may be tried; the others are remembered with the reason."""
        try:
            self._traced: ChannelGraph | None = ChannelGraph(aliasing_copy(self.model), self._example)
            found = list(self._traced.groups())
        except Exception as error:  # torch-pruning raises whatever it stumbles over
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StageError(f"prune: torch-pruning cannot trace the dependencies of this model: {reason}") from error
        candidates = []
        for group in found:
            if pattern := self._protecting(group):
                self.left_alone[group.name] = f"protected by '{pattern}'"
            elif layer := self._parametrized(group):
                reason = f"'{layer}' computes its weight (weight_norm?): remove the parametrization first"
                self._leave_alone([(group, reason)])
            else:
                candidates.append(group)
        return candidates

    def _parametrized(self, group: ChannelGroup) -> str | None:
        return next((name for name in group.layers if is_parametrized(self.model.get_submodule(name))), None)

    def _protecting(self, group: ChannelGroup) -> str | None:
        return next((p for p in self._protect if any(fnmatch.fnmatchcase(name, p) for name in group.producers)), None)

    def _leave_alone(self, broken: Sequence[tuple[ChannelGroup, str]]) -> None:
        for group, found in broken:
            reason = f"{found}; {group.obstacle}" if group.obstacle else found
            self.left_alone[group.name] = reason
            others = f" with {len(group.layers) - 1} layers behind it" if len(group.layers) > 1 else ""
            self._warn(
                f"the channels of '{group.name}'{others} are left alone: pruning them breaks the model: {reason}"
            )

    def _why_not(self, removed: Removed) -> str | None:
        try:
            self._edits(removed)
        except BrokenError as error:
            return str(error)
        return None

    def _are_outputs(self, removed: Removed) -> bool:
        """Whether the outputs of the model get other shapes without these channels."""
        try:
            found = outputs_for(cut(sharing_copy(self.model), self._derived(removed)), self._example)
        except Exception:  # noqa: BLE001  # torch-pruning and a user's forward may raise anything
            return False
        return [tensor.shape for tensor in found] != self._answered

    def _edits(self, removed: Removed) -> tuple[Edit, ...]:
        """What torch-pruning makes of the removal, as edits, and proven on random weights.

        Raises:
            BrokenError: where it fails, or the result computes something else than the model with the channels silenced.
        """
        removed = {name: gone for name, gone in removed.items() if gone}
        if not removed:
            return ()
        asked = frozenset((name, tuple(gone)) for name, gone in removed.items())
        if asked in self._proven_before:
            return self._proven_before[asked]
        try:
            edits = self._derived(removed)
        except Exception as error:  # torch-pruning may raise anything; each is the answer
            raise BrokenError(first_line(error)) from error
        if pair := surgery.unties(self.model, edits):
            raise BrokenError(f"'{pair[0]}' and '{pair[1]}' share one weight, of which only one would be cut")
        proven = self._proven_before[asked] = self._proven(edits, removed)
        return proven

    def _derived(self, removed: Removed) -> tuple[Edit, ...]:
        """What torch-pruning makes of the removal, as edits that nothing has proven.

        Raises:
            Exception: whatever torch-pruning raises.
        """
        graph = self._traced or ChannelGraph(aliasing_copy(self.model), self._example)
        self._traced = None  # it can be cut once
        gone = outputs_of([self._by_name[name] for name in removed], removed)
        with surgery.PositionsWhenRead(graph.model):
            throwaway = graph.remove(gone)
        edits = surgery.derive(self.model, throwaway)
        for (
            module
        ) in throwaway.modules():  # torch-pruning's graph holds it in a circle, which would wait for the collector
            module._parameters.clear()
        give_back()
        return edits

    def _proven(self, edits: tuple[Edit, ...], removed: Removed) -> tuple[Edit, ...]:
        """The edits, with sizes corrected that the model keeps in attributes of its own, where it needs them."""
        whole = self._whole
        try:
            expected = whole.silenced([self._by_name[name] for name in removed], removed)
        except Exception as error:  # a user's forward may raise anything; each is the answer
            raise BrokenError(first_line(error)) from error
        give_back()

        def difference(edits: Sequence[Edit]) -> str | None:
            try:
                return whole.missed_by(cut(sharing_copy(whole.model), edits, whole.dtype), expected)
            except Exception as error:  # noqa: BLE001  # as above
                return first_line(error)

        reason = difference(edits)
        if reason is None:
            return edits
        for sizes in self._remembered_sizes(edits):
            known = [size for size in sizes if (size.module, size.name) in self._needed]
            if known and difference((*edits, *known)) is None:
                return (*edits, *known)
            if difference((*edits, *sizes)) is None:
                needed = list(sizes)
                for size in sizes:  # many are needed by nobody, and only equal the width by chance
                    others = [other for other in needed if other is not size]
                    if difference((*edits, *others)) is None:
                        needed = others
                self._needed |= {(size.module, size.name) for size in needed}
                return (*edits, *needed)
        raise BrokenError(reason)

    def _remembered_sizes(self, edits: Iterable[Edit]) -> Iterator[tuple[Attribute, ...]]:
        """Ways to set attributes, of modules that are no plain layers, that equal the old size of an axis that was cut.

        Such as `VisionTransformer.hidden_dim`, which torch-pruning does not know of. Where axes of one size get different
        ones, each is tried.
        """
        widths: dict[int, set[int]] = {}
        for edit in edits:
            if isinstance(edit, Keep):
                widths.setdefault(edit.size, set()).add(len(edit.kept))
        found = [
            (path, key, value)
            for path, module in self.model.named_modules()
            if not is_layer(module)
            for key, value in vars(module).items()
            if type(value) is int and not key.startswith("_") and value in widths
        ]
        if not found:
            return
        used = sorted({value for _, _, value in found})
        ways = itertools.product(*(sorted(widths[value]) for value in used))
        for way in itertools.islice(ways, _MOST_SIZES):
            chosen = dict(zip(used, way, strict=True))
            yield tuple(Attribute(module=path, name=key, value=chosen[value]) for path, key, value in found)


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model on the CPU, in float32 and evaluation mode: other modules, but its own weights where they are so already."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    fits = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return sharing_copy(model).eval() if fits else copy_on_cpu(model)


def cut(model: nn.Module, edits: Sequence[Edit], scaled: torch.dtype | None = None) -> nn.Module:
    """Apply edits in place, attention's scale kept; returns the same model.

    Args:
        model: before.
        edits: in their order.
        scaled: the type of weights that take up a new scale, where it is not that of all others.
    """
    widths = attention.head_widths(model)
    surgery.apply_all(model, edits)
    attention.keep_scale(model, widths, scaled)
    return model


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, or made of one, whose sizes torch-pruning keeps."""
    kinds = (base.__module__ for base in type(module).__mro__)
    return any(kind.startswith("torch.nn.modules.") and not kind.endswith((".module", ".container")) for kind in kinds)
