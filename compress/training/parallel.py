"""An objective that several processes minimise together, each on its part of every batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.distributed import Group
from compress.training.objective import Objective


def shared(
    objective: Objective, accelerator: Accelerator, group: Group, loss_of: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """The objective such that after a backward pass each parameter's gradient is the mean over all processes.

    Args:
        objective: in training mode, on its device, the same in all processes.
        accelerator: knows the processes.
        group: the same processes.
        loss_of: calls the module it is given for the loss of some samples; leaves behind no change but in buffers.
    """
    buffers = [buffer.clone() for buffer in objective.buffers()]
    # torch waits for the gradient of each parameter, unless told to look which ones there are in each step; doing so
    # takes time, and it complains where there was no need.
    idle = torch.tensor(
        any(parameter.requires_grad for parameter in _unused(objective, loss_of(objective))), dtype=torch.int
    )
    handler = accelerator.ddp_handler
    assert handler is not None
    handler.find_unused_parameters = int(group.sum(idle)) > 0
    wrapped: nn.Module = accelerator.prepare_model(objective)
    # After its first backward pass torch sends gradients in another order, in which sums round differently: a training that
    # goes on would begin in the first order again.
    accelerator.backward(loss_of(wrapped))
    objective.zero_grad(set_to_none=True)
    for buffer, before in zip(objective.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return wrapped


def _unused(module: nn.Module, loss: Tensor) -> list[nn.Parameter]:
    """The parameters that a loss does not depend on."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        function = left.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        found.add(id(getattr(function, "variable", None)))
        left += [following for following, _ in function.next_functions]
    return [parameter for parameter in module.parameters() if id(parameter) not in found]
