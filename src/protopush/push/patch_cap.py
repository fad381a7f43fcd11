"""What a pass counts: patches of each class under a cap, and samples whose features aren't finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protopush.push.top_candidates import NO_ID, place_within


class Tally:
    """How many patches of each class were seen, and which may still be, under a cap per class. (CPU)

    Args:
        num_classes: number of classes.
        cap: most patches per class; None: all.
        seed: of the choice of cells in an image that only partly fits.
    """

    def __init__(self, num_classes: int, cap: int | None = None, seed: int = 0) -> None:
        self.cap = cap
        self.seed = seed
        self.patches = torch.zeros(num_classes, dtype=torch.int64)
        self.images = torch.zeros(num_classes, dtype=torch.int64)
        self._planned: Tensor | None = None  # patches to take, by sample id

    def plan(self, order: Sequence[int], labels: Tensor, cells: int) -> list[int]:
        """Settle beforehand which samples count, from the labels (N,) of all of them; those that do, in order."""
        if self.cap is None:
            return list(order)
        ids = torch.as_tensor(order, dtype=torch.int64)
        own = labels[ids].clamp(0, len(self.patches) - 1)  # a wrong label is refused when its sample is read
        place, _ = place_within(own, len(self.patches))
        take = (self.cap - place * cells).clamp(min=0, max=cells)
        self._planned = torch.zeros(len(labels), dtype=torch.int64)
        self._planned[ids] = take
        return [int(i) for i in ids[take > 0]]

    def take(self, labels: Tensor, ids: Tensor, cells: int) -> Tensor | None:
        """Which of the ``cells`` patches of each image count, bool (B, cells); None: all of them."""
        if self._planned is not None:
            take = self._planned[ids]
        elif self.cap is None:
            take = torch.full_like(labels, cells)
        else:
            place, _ = place_within(labels, len(self.patches))
            take = (self.cap - self.patches[labels] - place * cells).clamp(min=0, max=cells)
        self.patches.index_add_(0, labels, take)
        self.images.index_add_(0, labels, (take > 0).long())
        if self.cap is None:
            return None
        # Of an image that only partly fits, a seeded choice of cells: the first ones would favour its top edge.
        rank = torch.randperm(cells, generator=torch.Generator().manual_seed(self.seed))
        return rank.unsqueeze(0) < take.unsqueeze(1)

    @property
    def done(self) -> bool:
        """Whether every class has its fill, so that nothing more need be read."""
        return self.cap is not None and self._planned is None and bool((self.patches >= self.cap).all())


class NonFinite:
    """Remembers, without waiting for the device, the smallest ids of samples with NaN or infinite features.

    Args:
        device: where the features are.
        keep: ids to remember at most.
        first_batch_only: later batches don't count, because in training they are bad for the first one's sake.
    """

    def __init__(self, device: torch.device, keep: int = 20, first_batch_only: bool = False) -> None:
        self.first_batch_only = first_batch_only
        self.smallest = torch.full((keep,), NO_ID, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, values: Tensor, ids: Tensor) -> None:
        """Take in a batch: values (B, ...), ids (B,)."""
        bad = ~values.isfinite().flatten(1).all(dim=1)
        if self.first_batch_only:
            bad = bad & (self.count == 0)
        candidates = torch.cat([self.smallest, ids.masked_fill(~bad, NO_ID)])
        self.smallest = candidates.sort().values[: len(self.smallest)]
        self.count += bad.sum()

    def found(self) -> tuple[int, list[int]]:
        """How many samples were bad, and the smallest of their ids. (Waits for the device.)"""
        return int(self.count), [i for i in self.smallest.tolist() if i != NO_ID]
