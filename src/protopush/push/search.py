"""The exact nearest-patch search: one pass, nothing collected, memory O(prototypes * M * D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_ID = torch.iinfo(torch.int64).max

# Cosines that differ by less are equal, and the sample id decides. The same image gives embeddings that differ by a few
# units of float32's last place from one batch size to another; without this, noise would choose between duplicates.
TIE = 2.0**-21


class TopM:
    """The M best patches of each prototype among the samples of its own class, each from another sample.

    The order is (similarity, smaller sample id, smaller cell), where similarities closer than :data:`TIE` are equal, so
    that how the data was cut into batches does not decide between two patches.

    Args:
        prototypes: (C, K, D) unit vectors.
        used: bool (C, K), the slots in use.
        depth: M.

    Attributes:
        similarity: float32 (C, M, K), descending along M; -inf where nothing was found.
        ids, cells: int64 (C, M, K).
        embeddings: float32 (C, M, K, D), unit norm.
    """

    def __init__(self, prototypes: Tensor, used: Tensor, depth: int = 1) -> None:
        classes, slots, dim = prototypes.shape
        device = prototypes.device
        self.prototypes = prototypes.to(search_dtype(device))
        self.used = used
        self.depth = depth
        self.similarity = torch.full((classes, depth, slots), -torch.inf, device=device)
        self.ids = torch.full((classes, depth, slots), _NO_ID, device=device)
        self.cells = torch.zeros((classes, depth, slots), dtype=torch.int64, device=device)
        self.embeddings = torch.zeros((classes, depth, slots, dim), device=device)

    def update(self, embeddings: Tensor, labels: Tensor, ids: Tensor, allowed: Tensor) -> None:
        """Take in a batch.

        Args:
            embeddings: (B, L, D), unit norm, on the prototypes' device.
            labels: int64 (B,), on the CPU: what classes a batch holds is then known without waiting for the device.
            ids: int64 (B,), on the device.
            allowed: bool (B, L), on the device: patches that may be chosen.
        """
        device = embeddings.device
        present, row_class = torch.unique(labels, return_inverse=True)
        place, most = _place_within(row_class, len(present))
        row_class, place, present = row_class.to(device), place.to(device), present.to(device)

        own = self.prototypes[present][row_class]  # (B, K, D)
        every = (own @ embeddings.transpose(1, 2)).float()  # (B, K, L)
        every = every.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        every = every.masked_fill(~self.used[present][row_class].unsqueeze(2), -torch.inf)
        tied = every >= every.amax(dim=2, keepdim=True) - TIE
        cell = tied.int().argmax(dim=2)  # the first of equals: the smaller cell
        best = every.gather(2, cell.unsqueeze(2)).squeeze(2)

        # Images of one class side by side: (present classes, images, K), as the state has (classes, M, K)
        shape = (len(present), most, best.shape[1])
        similarity = torch.full(shape, -torch.inf, device=device)
        cells = torch.zeros(shape, dtype=torch.int64, device=device)
        numbers = torch.full(shape[:2], _NO_ID, device=device)
        rows = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        similarity[row_class, place] = best
        cells[row_class, place] = cell
        numbers[row_class, place] = ids
        rows[row_class, place] = torch.arange(len(ids), device=device)
        self._merge(present, similarity, cells, numbers.unsqueeze(2).expand(shape), rows, embeddings)

    def _merge(
        self, present: Tensor, similarity: Tensor, cells: Tensor, numbers: Tensor, rows: Tensor, embeddings: Tensor
    ) -> None:
        """Keep the best M of the state and the batch."""
        similarity = torch.cat([self.similarity[present], similarity], dim=1)
        numbers = torch.cat([self.ids[present], numbers], dim=1)
        cells = torch.cat([self.cells[present], cells], dim=1)
        keep = _ranking(similarity, numbers)[:, : self.depth]  # (present, M, K)
        cell = cells.gather(1, keep)

        fresh = keep >= self.depth
        group = torch.arange(len(present), device=keep.device).view(-1, 1, 1).expand_as(keep)
        row = rows[group, (keep - self.depth).clamp(min=0)]
        new = embeddings[row, cell.masked_fill(~fresh, 0)].float()
        kept = keep.clamp(max=self.depth - 1).unsqueeze(-1).expand_as(new)
        old = self.embeddings[present].gather(1, kept)
        self.embeddings[present] = torch.where(fresh.unsqueeze(-1), new, old)
        self.similarity[present] = similarity.gather(1, keep)
        self.ids[present] = numbers.gather(1, keep)
        self.cells[present] = cell


def _ranking(similarity: Tensor, numbers: Tensor) -> Tensor:
    """The order along dim 1: by similarity, equals (see :data:`TIE`) by number."""
    falling, order = similarity.sort(dim=1, descending=True)
    gaps = (falling[:, :-1] - falling[:, 1:]) > TIE  # -inf beside -inf gives NaN: no gap
    level = torch.zeros_like(order)
    level[:, 1:] = gaps.cumsum(dim=1)
    by_number = numbers.gather(1, order).argsort(dim=1, stable=True)
    by_level = level.gather(1, by_number).argsort(dim=1, stable=True)
    return order.gather(1, by_number.gather(1, by_level))


def search_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


def unit_embeddings(projected: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalise in the search's precision.

    Args:
        projected: (B, L, D), any precision.

    Returns:
        Unit vectors (B, L, D), zeros where a vector has no direction; and bool (B, L), which do have one.
    """
    precise = projected.detach().to(search_dtype(projected.device))
    finite = precise.isfinite().all(dim=2)
    norm = torch.linalg.vector_norm(precise, dim=2)
    allowed = finite & (norm > 0)
    unit = F.normalize(precise, dim=2).masked_fill(~allowed.unsqueeze(2), 0.0)
    return unit, allowed


def _place_within(groups: Tensor, count: int) -> tuple[Tensor, int]:
    """The running number of each row within its group, and the size of the largest group. (CPU)"""
    ones = F.one_hot(groups, count)
    running = ones.cumsum(dim=0).gather(1, groups.unsqueeze(1)).squeeze(1) - 1
    return running, int(ones.sum(dim=0).max())


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

    def take(self, labels: Tensor, cells: int) -> Tensor:
        """Which of the ``cells`` patches of each image count, bool (B, cells)."""
        if self.cap is None:
            take = torch.full_like(labels, cells)
        else:
            place, _ = _place_within(labels, len(self.patches))
            take = (self.cap - self.patches[labels] - place * cells).clamp(min=0, max=cells)
        self.patches.index_add_(0, labels, take)
        self.images.index_add_(0, labels, (take > 0).long())
        # Of an image that only partly fits, a seeded choice of cells: the first ones would favour its top edge.
        rank = torch.randperm(cells, generator=torch.Generator().manual_seed(self.seed))
        return rank.unsqueeze(0) < take.unsqueeze(1)

    def full(self, label: int) -> bool:
        """Whether a class has its fill."""
        return self.cap is not None and int(self.patches[label]) >= self.cap

    @property
    def done(self) -> bool:
        """Whether every class has its fill."""
        return self.cap is not None and bool((self.patches >= self.cap).all())


class NonFinite:
    """Remembers, without waiting for the device, the smallest ids of samples with NaN or infinite features.

    Args:
        device: where the features are.
        keep: ids to remember at most.
        first_batch_only: later batches don't count, because in training they are bad for the first one's sake.
    """

    def __init__(self, device: torch.device, keep: int = 20, first_batch_only: bool = False) -> None:
        self.first_batch_only = first_batch_only
        self.smallest = torch.full((keep,), _NO_ID, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, projected: Tensor, ids: Tensor) -> None:
        """Take in a batch: projected (B, L, D), ids (B,)."""
        bad = ~projected.isfinite().flatten(1).all(dim=1)
        if self.first_batch_only:
            bad = bad & (self.count == 0)
        candidates = torch.cat([self.smallest, ids.masked_fill(~bad, _NO_ID)])
        self.smallest = candidates.sort().values[: len(self.smallest)]
        self.count += bad.sum()

    def found(self) -> tuple[int, list[int]]:
        """How many samples were bad, and the smallest of their ids. (Waits for the device.)"""
        return int(self.count), [i for i in self.smallest.tolist() if i != _NO_ID]
