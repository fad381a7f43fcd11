"""Collectives that also mean something in one process: what a lone process gathers is its own."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without ``torch.distributed``."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, value)
    return found


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, all of one shape, in the order of the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return [tensor]
    here = _reachable(tensor)
    found = [torch.empty_like(here) for _ in range(size)]
    distributed.all_gather(found, here)
    return [other.to(tensor.device) for other in found]


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    _, size = rank_and_size()
    if size == 1:
        return tensor
    here = _reachable(tensor).clone()
    distributed.all_reduce(here)
    return here.to(tensor.device)


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor where the backend can send it: gloo sends from the CPU, NCCL from the GPU."""
    backend = distributed.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    return tensor.detach().to(device).contiguous()
