"""A model ready to use: made by its factory, filled with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.factory import Arch, create
from compress.models.state import Note, check_finite, fitting, ignore, load_state, with_ties
from compress.models.weights import published_weights, read_weights
from compress.names import is_weights_file


def make_model(arch: Arch, weights: str | None, seed: int, *, at: str = "model", note: Note = ignore) -> nn.Module:
    """A model in evaluation mode on the CPU.

    Args:
        arch: its factory and arguments.
        weights: a file, or the name of published weights; None for a seeded initialisation.
        seed: of the initialisation.
        at: the key of the pipeline file where the model is described, for messages.
        note: told what became of the weights on their way: half precision made float32, other sets left aside.

    Raises:
        ModelError: where the factory does not exist, or the weights do not fit or are not finite.
    """
    with _described_at(at):
        model = create(arch, seed=seed)
        if weights is None:
            return model.eval()
        own, what = model.state_dict(), f"model.weights: {Path(weights).name}"
        if is_weights_file(weights):
            state: Mapping[str, Tensor] = fitting(read_weights(Path(weights), note), own, what, note)
        else:
            state = published_weights(arch, weights)
        state = with_ties(state, own, what)
        load_state(model, state, what)
        check_finite(model, what)
        _tell_precision(model.state_dict(), state, Path(weights).name, note)
        return model.eval()


def _tell_precision(loaded: Mapping[str, Tensor], state: Mapping[str, Tensor], file: str, note: Note) -> None:
    others = {
        str(tensor.dtype).removeprefix("torch.")
        for name, tensor in state.items()
        if tensor.is_floating_point() and name in loaded and tensor.dtype != loaded[name].dtype
    }
    if others:
        into = next(str(tensor.dtype) for tensor in loaded.values() if tensor.is_floating_point())
        note(f"{file}: holds {' and '.join(sorted(others))}; the weights are loaded as {into.removeprefix('torch.')}")


@contextmanager
def _described_at(key: str) -> Iterator[None]:
    """Errors speak of `model.…`; for a student that is not where it stands."""
    try:
        yield
    except ModelError as error:
        told = str(error)
        if key == "model" or not told.startswith("model"):
            raise
        raise ModelError(key + told.removeprefix("model")) from error
