"""Which samples come in which batch: order, whole batches, and the part of a process in each."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from compress.data.base import Shard
from compress.seeds import derive_seed


def shuffled(n: int, seed: int | None) -> tuple[Int64[Tensor, " n"], torch.Generator]:
    """Positions of `n` samples, in order without a seed, and the generator that goes on drawing after them."""
    generator = torch.Generator()
    if seed is None:
        return torch.arange(n), generator
    generator.manual_seed(seed)
    return torch.randperm(n, generator=generator), generator


def grouped(
    order: Int64[Tensor, " n"], batch_size: int, *, drop_last: bool, shard: Shard
) -> list[Int64[Tensor, " some"]]:
    """The part of one process in each batch of all of them.

    Every process gets as many parts as there are batches, so that they meet after each; a part is empty where a batch has
    fewer samples than there are processes. In the order of the ranks the parts of a batch are the batch.

    Args:
        order: positions of all samples.
        batch_size: samples of a batch, over all processes together.
        drop_last: whether a last batch of fewer samples is left out.
        shard: the process.
    """
    assert batch_size >= 1
    assert 0 <= shard.rank < shard.world
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    return [batch.tensor_split(shard.world)[shard.rank] for batch in batches]


def view_seed(seed: int, view: int) -> int:
    """What the augmented version `view` of a split is drawn from; depends on the seed of the data and nothing else."""
    return derive_seed(seed, "view", view)
