"""Collectives that also mean something in one process: what a lone process gathers is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from protopush.errors import FailedElsewhere, first_line

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without ``torch.distributed``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def all_gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, value)
    return found


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, all of one shape, in the order of the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return [tensor]
    here = _reachable(tensor)
    found = [torch.empty_like(here) for _ in range(size)]
    distributed.all_gather(found, here)
    return [other.to(tensor.device) for other in found]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return tensor
    here = _reachable(tensor).clone()
    distributed.all_reduce(here)
    return here.to(tensor.device)


class _Gather(torch.autograd.Function):
    """All ranks' rows; backwards, each rank's own rows times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return torch.cat(all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, size = rank_and_size()
        return gradients[0][rank * ctx.rows : (rank + 1) * ctx.rows] * size


def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, as many on each, below one another; gradients reach this rank's own rows.

    For a loss that is no mean over samples: every rank computes the loss of the whole batch, and as
    DistributedDataParallel takes the mean of the ranks' gradients, each passes back the ranks' number of times its own
    share. What they end with is the gradient of one process with the whole batch.

    Example:
        >>> all_gather_rows(torch.eye(2)).shape
        torch.Size([2, 2])
    """
    if rank_and_size()[1] == 1:
        return tensor
    rows: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return rows


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Do this rank's part of the work; if it fails on one rank it fails on all, rather than have them wait for it."""
    with raising_on_all_ranks():
        return work()


@contextmanager
def raising_on_all_ranks() -> Iterator[None]:
    """:func:`raise_on_all_ranks` for a block, which must not call collectives itself."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if rank_and_size()[1] > 1:
        problems = all_gather_objects(None if problem is None else first_line(problem))
        failed = next((rank for rank, line in enumerate(problems) if line is not None), None)
        if failed is not None and problem is None:
            raise FailedElsewhere(f"rank {failed}: {problems[failed]}")
    if problem is not None:
        raise problem


def broadcast_from_rank_zero(work: Callable[[], T]) -> T:
    """What the work gives on rank 0, which does it alone while the others wait; if it fails, it fails on all."""
    rank, size = rank_and_size()
    found = [raise_on_all_ranks(lambda: work() if rank == 0 else None)]
    if size > 1:
        distributed.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor where the backend can send it: gloo sends from the CPU, NCCL from the GPU."""
    backend = distributed.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    return tensor.detach().to(device).contiguous()
