"""In which order images are read: the same for an epoch however often it is asked, and shared among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from protopush.distributed import rank_and_size


def seed_of(*numbers: int) -> int:
    """One seed from several numbers (seed, epoch, rank), far from those of their neighbours.

    Example:
        >>> seed_of(0, 1) != seed_of(1, 0)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Order(Sampler[int]):
    """The indices that this process reads in an epoch.

    Batches of all processes together are those of one process whose batches are as many times larger. Where the number
    of samples can't be divided among the processes, some at the beginning are read twice.

    Args:
        labels: of the samples.
        seed: together with the epoch it decides the order.
        balanced: each draw takes each class with the same chance; in an epoch there are as many draws as samples.

    Example:
        >>> order = Order([0, 0, 0, 1], seed=0)
        >>> sorted(order)
        [0, 1, 2, 3]
    """

    def __init__(self, labels: Sequence[int], seed: int, balanced: bool = False) -> None:
        self.labels = torch.tensor(labels)
        self.seed = seed
        self.balanced = balanced
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        count = len(self.labels)
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        if self.balanced:
            sizes = torch.bincount(self.labels)
            order = torch.multinomial(1.0 / sizes[self.labels], count, replacement=True, generator=generator)
        else:
            order = torch.randperm(count, generator=generator)
        rank, size = rank_and_size()
        places = torch.arange(rank, count + -count % size, size) % count
        yield from order[places].tolist()

    def __len__(self) -> int:
        return -(-len(self.labels) // rank_and_size()[1])


def share(count: int) -> Sequence[int]:
    """The indices of this process where each is to be read once, by whichever process: none is read twice.

    Example:
        >>> list(share(3))
        [0, 1, 2]
    """
    rank, size = rank_and_size()
    return range(rank, count, size)
