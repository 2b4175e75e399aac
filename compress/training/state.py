"""What an epoch leaves behind, so that a killed training goes on at the same bits.

There are no random states in it: everything random in an epoch is derived from the seed and the epoch's number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.events import EpochResult, Progress
from compress.files import canonical_json, write_file
from compress.methods.epochs import Validated, best
from compress.training.average import Average
from compress.training.objective import Objective

_STATE = "training.safetensors"
_SHOWN = 60
Row = dict[str, float | int]


@dataclass(frozen=True)
class Moving:
    """Everything that a step changes."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by a name that says whose they are."""
        found = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return found

    def statistics(self) -> Iterator[Tensor]:
        """What each process finds from its own samples: buffers, such as those of batch norms, and averages of them."""
        yield from self.objective.buffers()
        if self.average is not None:
            yield from self.average.tensors.values()

    def scalars(self) -> dict[str, Any]:
        """The numbers beside them, as JSON takes them."""
        return self.scaler.state_dict()

    def load(self, tensors: Mapping[str, Tensor], scalars: dict[str, Any]) -> None:
        """Take what `tensors` and `scalars` gave, each tensor in the layout it has here."""
        self.objective.load_state_dict(_under("objective.", tensors))
        if self.average is not None:
            for name, tensor in _under("average.", tensors).items():
                self.average.tensors[name].copy_(tensor)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scalars)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, slot = name.split(".", 1)
            like = parameters[int(index)]
            # The layout of its parameter again: another one computes more slowly, and may round differently.
            value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape and slot != "step" else tensor
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})


class State:
    """What an epoch leaves behind: rows so far, the best weights, and under which conditions they came about."""

    def __init__(self, conditions: Mapping[str, str]) -> None:
        """Begin.

        Args:
            conditions: whatever decides about the bits besides what `Moving` holds, by a name for messages.
        """
        self._conditions = dict(conditions)
        self.rows: list[Row] = []
        self.best: dict[str, Tensor] = {}

    @property
    def validated(self) -> list[Validated]:
        """What validation said after each epoch."""
        return [Validated(float(row["validation_percent"]), float(row["validation_loss"])) for row in self.rows]

    def add(self, result: EpochResult, weights: Mapping[str, Tensor], *, latest: bool = False) -> None:
        """Take in an epoch, and the weights that were validated where it is the best so far, or where the latest is kept."""
        self.rows.append(asdict(result))
        if latest or best(self.validated) == len(self.rows) - 1:
            self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def save(self, scratch: Path, moving: Moving) -> None:
        """Write everything that a killed training needs."""
        tensors = moving.tensors() | {f"best.{name}": tensor for name, tensor in self.best.items()}
        # safetensors takes contiguous tensors of their own memory only.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        told = {"rows": self.rows, "scalars": moving.scalars(), "conditions": self._conditions}
        metadata = {name: canonical_json(value).decode() for name, value in told.items()}
        write_file(scratch / _STATE, save(own, metadata=metadata))

    @classmethod
    def resume(cls, scratch: Path, moving: Moving, conditions: Mapping[str, str], progress: Progress) -> State:
        """The state after the last saved epoch, put into `moving`; a new one where none was saved.

        A new one, too, where it cannot be read, or came about under other conditions: `progress` is told which.
        """
        state, path = cls(conditions), scratch / _STATE
        if not path.exists():
            return state
        try:
            with safe_open(path, framework="pt") as file:
                told = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = load_file(path)
            rows, scalars, before = told["rows"], told["scalars"], told["conditions"]
        except (OSError, SafetensorError, AttributeError, KeyError, ValueError):
            progress.note("training begins anew: the state it left behind cannot be read")
            return state
        changed = [name for name in conditions if before.get(name) != conditions[name]]
        if changed:
            progress.note(
                f"training begins anew: {_told(changed[0], before.get(changed[0]), conditions)} since epoch {len(rows)}"
            )
            return state
        moving.load(tensors, scalars)
        state.rows, state.best = rows, _under("best.", tensors)
        return state


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model, whatever their device and layout."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _told(name: str, before: str | None, conditions: Mapping[str, str]) -> str:
    """Such as 'threads changed from 4 to 2'; digests are not shown."""
    if before is None or len(before) > _SHOWN:
        return f"{name} changed"
    return f"{name} changed from {before} to {conditions[name]}"
