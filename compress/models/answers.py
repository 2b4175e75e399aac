"""What a model answers: its outputs by name, the logits among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from compress.errors import ModelError, listed

LOGITS = "logits"


def outputs_of(answer: Any) -> dict[str, Tensor]:
    """The outputs of a forward pass by name, logits first.

    A tensor is the logits. A mapping, or a named tuple, has them under the key 'logits'; its other tensors keep their
    keys. Of another tuple or list the first tensor is the logits, the others are 'output_1', 'output_2', …, or are
    called as the named tuple calls them. What is None is no output.

    Raises:
        ModelError: where the answer is nothing of that kind, has no logits, or holds something else than tensors.
    """
    if isinstance(answer, Tensor):
        return {LOGITS: answer}
    outputs = dict(_named(answer))
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            nested = isinstance(value, (Mapping, tuple, list))
            kind = (
                f"nested outputs: '{name}' is a {type(value).__name__}"
                if nested
                else f"'{name}' as a {type(value).__name__}"
            )
            raise ModelError(f"the forward pass returns {kind}; each output must be one tensor")
    if LOGITS not in outputs:
        has = f"its keys are {listed(outputs)}" if outputs else "it holds no tensor"
        raise ModelError(f"the forward pass returns a {type(answer).__name__} without the key '{LOGITS}' ({has})")
    return {LOGITS: outputs[LOGITS], **outputs}


def logits_of(answer: Any) -> Tensor:
    """The logits (n, classes) of a forward pass.

    Raises:
        ModelError: as `outputs_of`.
    """
    return answer if isinstance(answer, Tensor) else outputs_of(answer)[LOGITS]


def _named(answer: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(answer, Mapping):
        for key, value in answer.items():
            if not isinstance(key, str) or not key:
                raise ModelError(f"the forward pass returns a mapping with the key {key!r}; keys must be names")
            if value is not None:
                yield key, value
        return
    if not isinstance(answer, (tuple, list)):
        raise ModelError(
            f"the forward pass returns a {type(answer).__name__}, not one tensor of logits, nor a mapping or tuple of tensors"
        )
    fields: tuple[str, ...] | None = getattr(answer, "_fields", None)
    given = [(fields[i] if fields else "", value) for i, value in enumerate(answer) if value is not None]
    if not given:
        raise ModelError(f"the forward pass returns a {type(answer).__name__} without a tensor of logits")
    says_which = fields is not None and LOGITS in fields
    for position, (name, value) in enumerate(given):
        yield (LOGITS if position == 0 and not says_which else name or f"output_{position}"), value
