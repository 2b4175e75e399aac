"""What the finished parts of a pruning leave behind, so that a killed run does none of them again.

One file, replaced as a whole after each part: the model as it is now, the edits that made its shapes, and all that is told of
the way so far. A part that was killed half-way goes on by itself, from the state of its training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress import surgery
from compress.edits import EDITS, Edit
from compress.errors import CheckpointError, StageError
from compress.files import canonical_json, write_file

_FILE = "parts.safetensors"
_TOLD = "told"
Row = dict[str, float | int]


@dataclass(frozen=True)
class Trail:
    """The way from the whole model to the present one."""

    done: int = 0
    """Parts that are finished."""
    edits: tuple[Edit, ...] = ()
    """Of all cuts so far, in order."""
    pruned: tuple[str, ...] = ()
    """Groups that lost channels, each once."""
    channels: dict[str, int] | None = None
    """Of the groups before the first cut; None before anybody looked."""
    rows: tuple[Row, ...] = ()
    """Epochs of all trainings so far, numbered from 1 on throughout."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def longer(self, rows: tuple[Row, ...]) -> Trail:
        """With the epochs of a further training, numbered on."""
        before = len(self.rows)
        return replace(self, rows=(*self.rows, *({**row, "epoch": before + n} for n, row in enumerate(rows, 1))))

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write it, and the model as it is now."""
        told = {**asdict(replace(self, edits=())), "edits": EDITS.dump_python(self.edits, mode="json")}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(model).items()}
        write_file(folder / _FILE, save(tensors, metadata={_TOLD: canonical_json(told).decode()}))

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> Trail | None:
        """What was written last, put into `model`; None where nothing was.

        Args:
            folder: where it was written.
            model: the whole model, which is cut and gets its weights in place.

        Raises:
            StageError: where the file cannot be read, or is of another model.
        """
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads(file.metadata()[_TOLD])
            trail = _TRAIL.validate_json(canonical_json(told))
            surgery.apply_all(model, trail.edits)
            # As a training leaves it: in another layout the next one might round differently.
            model.to(memory_format=torch.contiguous_format)
            _fill(model, load_file(path))
        except (OSError, SafetensorError, CheckpointError, ValidationError, KeyError, TypeError, ValueError) as error:
            raise StageError(f"{path}: cannot be read; remove {folder} to begin anew") from error
        return trail


_TRAIL = TypeAdapter(Trail)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are no part of the state as well."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = _tensors(model)
    if own.keys() != tensors.keys():
        raise ValueError(f"names differ: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: {tuple(tensors[name].shape)} is not {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])
