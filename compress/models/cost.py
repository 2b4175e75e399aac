"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one sample in convolutions, matrix products and attention.

    Counted by torch's own operator-level counter, which counts a multiply-accumulate as two operations.

    Args:
        model: run once in its present mode, without gradients.
        example: the inputs of a batch of any size; the count is divided by it.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _every_operator_seen(), counter:
        model(*example)
    return int(counter.get_total_flops()) // (2 * len(example[0]))


def output_positions(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, int]:
    """For each layer with a weight matrix, at how many positions of one sample it is applied.

    Those are convolutions, linear layers and attention: its projections count at each position of the queries.

    Args:
        model: run once in its present mode, without gradients.
        example: the inputs of a batch of any size.
    """
    positions: dict[str, int] = {}
    hooks = []

    def remember(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # A transposed convolution applies its weight at each position of its input.
            at = inputs[0] if isinstance(module, nn.modules.conv._ConvTransposeNd) else output
            channels = at.shape[1] if isinstance(module, nn.modules.conv._ConvNd) else at.shape[-1]
            positions[name] = positions.get(name, 0) + at.numel() // (channels * len(example[0]))

        hooks.append(model.get_submodule(name).register_forward_hook(hook))

    def remember_attention(name: str) -> None:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
            for part in (name, f"{name}.out_proj"):  # called as a function, it never reaches its own hook
                found = output[0].numel() // (output[0].shape[-1] * len(example[0]))
                positions[part] = positions.get(part, 0) + found

        hooks.append(model.get_submodule(name).register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            remember(name)
        elif isinstance(module, nn.MultiheadAttention):
            remember_attention(name)
    try:
        with torch.no_grad(), _every_operator_seen():
            model(*example)
    finally:
        for handle in hooks:
            handle.remove()
    return positions


@contextlib.contextmanager
def _every_operator_seen() -> Iterator[None]:
    """Without attention's fast path: one opaque operator that no counter and no hook looks into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
