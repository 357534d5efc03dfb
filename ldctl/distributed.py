"""The few facts about other ranks that a step needs; everything degrades to one rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")

_is_alone = False


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute as if it were the only rank, for what ranks may not all come to the end of."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def reduce_mean(value: Tensor) -> Tensor:
    """Average over the ranks; `value` itself without a process group. Not differentiable."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def broadcast(values: list[Tensor]) -> None:
    """Overwrite the values with those of the first rank."""
    if world_size() > 1:
        for value in values:
            dist.broadcast(value, src=0)


def gather_rows(value: Shaped[Tensor, "N *S"]) -> Shaped[Tensor, "_ *S"]:
    """Concatenate the ranks' tensors, of one shape, in rank order; `value` itself without a process group.

    Rank `r` finds its own at rows `r * N` to `(r + 1) * N`. Not differentiable.
    """
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def gather(items: list[T]) -> list[T]:
    """Return the items of all ranks in rank order, on every rank."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def is_main() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0
