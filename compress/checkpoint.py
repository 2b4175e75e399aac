"""A model on disk: architecture, edits and weights as data, read strictly, without pickle."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import manifest, surgery
from compress.data.base import Input
from compress.edits import Edit
from compress.errors import CheckpointError, CompressError, ModelError
from compress.files import new_folder, readable_json
from compress.manifest import HistoryEntry, InputRecord, Manifest
from compress.measured import PruningSensitivity
from compress.models.factory import Arch, create_empty
from compress.models.state import check_finite, load_state
from compress.names import placeless
from compress.provenance import code_of

Form = str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was read and found whole."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what the model computes."""
        return self.manifest.digest

    @property
    def arch(self) -> Arch:
        """The architecture before any edit."""
        return Arch(self.manifest.arch.factory, self.manifest.arch.kwargs)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What surgery did to it since."""
        return self.manifest.edits

    @property
    def form(self) -> Form:
        """'float', 'int8' or 'exported'."""
        return self.manifest.form

    @property
    def inputs(self) -> tuple[InputRecord, ...]:
        """What the model takes, in this order."""
        return self.manifest.inputs

    @property
    def classes(self) -> tuple[str, ...]:
        """What its logits stand for."""
        return self.manifest.classes

    @property
    def history(self) -> tuple[HistoryEntry, ...]:
        """The stages that made it, oldest first."""
        return self.manifest.history

    def file(self, name: str) -> Path | None:
        """Path of one of its files, None where it has none of that name."""
        return self.path / name if name in self.manifest.files else None

    def build(self, trusted: Collection[str] = ()) -> nn.Module:
        """The float model with its weights, in evaluation mode, bit for bit the one that was saved.

        Args:
            trusted: names of factories outside this package that may run code; built-in ones need no trust.

        Raises:
            CheckpointError: where its code is not trusted or its content does not fit together.
            ModelError: where its factory does not exist here.
        """
        self._check_code(trusted)
        model = create_empty(self.arch, trusted=trusted)
        surgery.apply_all(model, self.edits)
        path = self.path / manifest.WEIGHTS
        try:
            # Clones lie at aligned addresses, as fresh tensors do; on others matrix products round differently.
            state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        try:
            state |= {alias: state[name] for alias, name in self.manifest.aliases.items() if name in state}
            with _all_persistent(model):
                load_state(model, state, str(path), assign=True)
            _tie(model, self.manifest.aliases)
        except ModelError as error:
            raise CheckpointError(str(error)) from None
        empty = [name for name, tensor in _named_tensors(model) if tensor.is_meta]
        if empty:
            raise CheckpointError(f"{path}: brings no values for '{empty[0]}'")
        if self.manifest.memory_format == "channels_last":
            model.to(memory_format=torch.channels_last)
        return model.eval()

    def _check_code(self, trusted: Collection[str]) -> None:
        factory = self.arch.factory
        if factory in trusted and code_of(factory) != self.manifest.arch.code:
            raise CheckpointError(
                f"{self.path}: the code of '{factory}' has changed since this checkpoint was made; "
                "its weights may mean something else now"
            )


@dataclass(frozen=True)
class Draft:
    """A model that is to become a checkpoint: what a stage hands back."""

    arch: Arch
    edits: tuple[Edit, ...]
    model: nn.Module
    form: Form = "float"
    quantization: Mapping[str, JsonValue] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files by name, such as `model.onnx`."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    training: tuple[dict[str, float | int], ...] = ()
    sensitivity: PruningSensitivity | None = None
    """What pruning decided by, where it measured that."""


def save(
    path: Path,
    draft: Draft,
    *,
    inputs: Sequence[Input],
    classes: tuple[str, ...],
    history: tuple[HistoryEntry, ...],
    key: Mapping[str, JsonValue],
) -> Checkpoint:
    """Write a checkpoint folder, whole or not at all.

    Args:
        path: the folder to make; one that was there is replaced.
        draft: model and edits.
        inputs: what the model takes, in this order.
        classes: what its logits stand for.
        history: the stages that made it, this one last.
        key: all that could change it.

    Raises:
        CompressError: where it cannot be written.
        ModelError: where a tensor of the model is not finite.
    """
    layout = _memory_format(draft.model)
    if layout == "channels_last":
        # One layout throughout, so that the model in memory computes to the bit what the reloaded one will.
        draft.model.to(memory_format=torch.channels_last)
    tensors, aliases = _state(draft.model)
    check_finite(draft.model, "the stage's result (did training diverge?)")
    with new_folder(path) as folder:
        try:
            save_file(tensors, folder / manifest.WEIGHTS)
        except SafetensorError as error:
            raise CompressError(f"{path}: cannot be written: {error}") from error
        if draft.quantization is not None:
            (folder / manifest.QUANTIZATION).write_bytes(readable_json(draft.quantization))
        for name, content in draft.files.items():
            (folder / name).write_bytes(content)
        record = manifest.seal(
            {
                "arch": {
                    "factory": draft.arch.factory,
                    "kwargs": dict(draft.arch.kwargs),
                    "code": code_of(draft.arch.factory),
                },
                "edits": draft.edits,
                "form": draft.form,
                "memory_format": layout,
                "aliases": aliases,
                "inputs": [asdict(each) for each in inputs],
                "classes": classes,
                "history": history,
                "key": key,
                "files": {file.name: manifest.describe_file(file) for file in sorted(folder.iterdir())},
            }
        )
        (folder / manifest.FILE_NAME).write_bytes(manifest.dump(record))
    return Checkpoint(path, record)


def load(path: str | Path, trusted: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint folder and check each of its files.

    Args:
        path: the folder.
        trusted: factories of the user's own code as they are called here. Where one of them is the checkpoint's, of the
            same name and content, the checkpoint gets its place: a project may have moved since.

    Raises:
        CheckpointError: naming the first bad file or key.
    """
    folder = Path(path)
    record = manifest.read(folder)
    manifest.verify(folder, record)
    arch = record.arch
    for factory in trusted:
        if placeless(factory) == placeless(arch.factory) and arch.code is not None and code_of(factory) == arch.code:
            record = record.model_copy(update={"arch": arch.model_copy(update={"factory": factory})})
    return Checkpoint(folder, record)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors by name, and the names of tied ones: alias to saved name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    with _all_persistent(model):
        state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"the model's state '{name}' is a {type(tensor).__name__}, not a tensor")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    tensors = dict(_named_tensors(model))
    for alias, name in aliases.items():
        if type(tensors.get(alias)) is not type(tensors.get(name)) or name not in tensors:
            raise CheckpointError(f"the manifest ties '{alias}' to '{name}', which the model does not have")
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, tensors[name])


@contextlib.contextmanager
def _all_persistent(model: nn.Module) -> Iterator[None]:
    """Every buffer counts as part of the state: a constructor need not make the others twice the same."""
    hidden = {module: module._non_persistent_buffers_set for module in model.modules()}
    try:
        for module in hidden:
            module._non_persistent_buffers_set = set()
        yield
    finally:
        for module, names in hidden.items():
            module._non_persistent_buffers_set = names


def _memory_format(model: nn.Module) -> str:
    for parameter in model.parameters():
        channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        if channels_last and not parameter.is_contiguous():  # with one channel or one pixel the two are the same
            return "channels_last"
    return "contiguous"
