"""The processes that train one model together: who they are, and what they tell each other.

torchrun, or accelerate launch, starts them and tells each its number through environment variables. The first one leads: it
decides, writes and measures; the others train along.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from pydantic import JsonValue
from torch import Tensor
from torch import distributed as dist

from compress import machine
from compress.data.base import WHOLE, Shard
from compress.errors import TrainingError, first_line

# While the first process measures, or asks a teacher, the others wait for it; one that dies is noticed at once all the same.
_PATIENCE = datetime.timedelta(days=7)
_ANOTHER = "the connection to another process is lost, its own message says why"
# How gloo's messages begin, and what of it is said where the system closes a connection.
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Group:
    """Processes that meet at the same calls in the same order: each call here returns when all have come to it."""

    def __init__(self, shard: Shard = WHOLE) -> None:
        """Take the number of this process, and how many there are."""
        self.shard = shard

    @property
    def leads(self) -> bool:
        """Whether this process is the one that decides, writes and measures."""
        return self.shard.rank == 0

    def told(self, value: JsonValue = None) -> JsonValue:
        """What the leader gives here; the others' values do not count."""
        if self.shard.world == 1:
            return value
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0)
        if not self.leads:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0)
        found: JsonValue = json.loads(content.numpy().tobytes())
        return found

    def shared(self, values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """What the leader gives here, by name."""
        found = self.told(dict(values))
        assert isinstance(found, dict)
        return found

    def meet(self) -> None:
        """Wait until everybody is here: what one of them does next may take away what another still reads."""
        self.sum(torch.zeros(1))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensors, all of one shape; the one given may be overwritten."""
        if self.shard.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def follow_leader(self, tensors: Iterable[Tensor]) -> None:
        """Give these tensors, in place, the values that they have in the leader."""
        if self.shard.world == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.detach().copy_(values)

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Check that everybody has the same facts as the leader.

        Raises:
            TrainingError: in all processes where one does not; in that one, naming the first that differs.
        """
        lead = self.shared(facts)
        differing = [name for name, fact in facts.items() if lead[name] != fact]
        if int(self.sum(torch.tensor(len(differing)))) == 0:
            return
        if not differing:
            raise TrainingError(_ANOTHER)
        raise TrainingError(
            f"process {self.shard.rank} of {self.shard.world} cannot train along: {differing[0]} is not what it is in process "
            "0; all need the same code, data and libraries, and one folder of runs that all of them see"
        )


ALONE = Group()
"""One process that needs nobody."""


@contextmanager
def joined() -> Iterator[Group]:
    """Inside, the processes that were started together are a group; one alone where nothing says otherwise.

    Raises:
        TrainingError: where processes and GPUs of this machine do not fit, and where one of them ends early.
    """
    if not machine.is_launched():
        yield ALONE
        return
    # Else accelerate sets a thread count of its own, and warns.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    backend = "gloo"
    if torch.cuda.is_available():
        if machine.processes_here() > torch.cuda.device_count():
            raise TrainingError(
                f"{machine.processes_here()} processes on a machine with {torch.cuda.device_count()} GPUs: start at most one "
                "for each; with CUDA_VISIBLE_DEVICES= (empty) and device: cpu they train on the CPU"
            )
        if "LOCAL_RANK" not in os.environ:
            raise TrainingError(
                "LOCAL_RANK: not set, so that no process knows its GPU: start them by torchrun, or set it to the number of the "
                "process on its machine"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # who waits for the leader on gloo sleeps, on NCCL it would keep a core busy
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Group(Shard(dist.get_rank(), dist.get_world_size()))
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error) for word in _GLOO):
            raise TrainingError(f"{_ANOTHER}: {first_line(error)}") from error
        raise
    # Only where all went well: NCCL waits here for processes that may be waiting for this one's next call.
    dist.destroy_process_group()
