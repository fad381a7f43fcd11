"""Lists of the M best patches of each prototype, merged batch by batch in memory O(prototypes * M * D)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NO_ID = torch.iinfo(torch.int64).max

# Cosines that differ by less are equal, and the sample id decides. The same image gives embeddings that differ by a few
# units of float32's last place from one batch size to another; without this, noise would choose between duplicates.
TIE = 2.0**-21

# Candidates wait to be merged: so many vectors, and so many bytes of them, at most.
WAITING_ROWS, WAITING_BYTES = 2**13, 2**23


class Ranked(NamedTuple):
    """Candidates, best first along dim 1; all (C, M, K).

    Attributes:
        similarity: float32, -inf where nothing was found.
        ids, cells, keys: int64.
    """

    similarity: Tensor
    ids: Tensor
    cells: Tensor
    keys: Tensor

    def best(self, depth: int) -> tuple[Ranked, Tensor]:
        """The best ``depth`` with different keys, and where they stood along dim 1.

        The order is (similarity, smaller sample id, smaller cell), where similarities closer than :data:`TIE` are
        equal. Where there are fewer, the rest is empty: similarity -inf, id :data:`NO_ID`.
        """
        order = _ranking(self.similarity, self.ids, self.cells)
        again = _seen_before(self.keys.gather(1, order))
        first = again.to(torch.uint8).argsort(dim=1, stable=True)[:, :depth]  # those whose key is new, in their order
        keep = order.gather(1, first)
        similarity, ids, cells, keys = (values.gather(1, keep) for values in self)
        empty = (similarity == -torch.inf) | again.gather(1, first)
        similarity = similarity.masked_fill(empty, -torch.inf)
        return Ranked(similarity, ids.masked_fill(empty, NO_ID), cells, keys.masked_fill(empty, NO_ID)), keep


class TopM:
    """The M best patches of each prototype among the samples of its own class, each with another key.

    Invariant: after :meth:`flush`, ``ranked[c, :, k]`` are the M best, with different keys, of all patches of class c
    that were taken in. Merging keeps it, because what isn't among the best M of a part isn't among those of the whole.

    Args:
        prototypes: (C, K, D) unit vectors.
        used: bool (C, K), the slots in use.
        depth: M.
        width: W, the size of the vectors that are kept; by default D.

    Attributes:
        ranked: (C, M, K).
        vectors: float32 (C, M, K, W), those of ``ranked``; of an empty place, any.
    """

    def __init__(self, prototypes: Tensor, used: Tensor, depth: int, width: int | None = None) -> None:
        classes, slots, dim = prototypes.shape
        self.prototypes, self.used, self.depth = prototypes.float(), used, depth
        self.ranked = _empty((classes, depth, slots), prototypes.device)
        self.vectors = torch.zeros((classes, depth, slots, width or dim), device=prototypes.device)
        self._waiting: list[tuple[Tensor, ...]] = []  # candidates of batches that are still to be merged
        self._filled = 0  # and the number of their vectors

    def update(
        self,
        embeddings: Tensor,
        norm: Tensor,
        labels: Tensor,
        ids: Tensor,
        keys: Tensor,
        allowed: Tensor,
        vectors: Tensor,
    ) -> None:
        """Take in a batch, on the prototypes' device but for ``labels``; call :meth:`flush` after the last one.

        Args:
            embeddings: float32 (B, L, D), of any norm.
            norm: float32 (B, L), their norms.
            labels: int64 (B,), on the CPU: which classes a batch holds is then known without waiting for the device.
            ids: int64 (B,).
            keys: int64, of patches with the same key a prototype keeps the best: (B, 1), one for all patches of an
                image, or (B, L), another for each patch.
            allowed: bool (B, L): patches that may be chosen; none of norm 0 or not finite.
            vectors: (B, L, W), what is kept of a candidate: the embedding, or the feature that it was made of.
        """
        classes = labels.to(embeddings.device, non_blocking=True)
        every = self.prototypes.index_select(0, classes) @ embeddings.transpose(1, 2)  # (B, K, L)
        every = (every / norm.unsqueeze(1)).masked_fill_(~allowed.unsqueeze(1), -torch.inf)
        if keys.shape[1] == 1:  # of equals the first: the smaller cell
            tied = every >= every.amax(dim=2, keepdim=True) - TIE
            cells = tied.view(torch.uint8).argmax(dim=2, keepdim=True).transpose(1, 2)
            every = every.transpose(1, 2)
        else:
            every = every.transpose(1, 2)
            numbers = torch.arange(every.shape[1], device=every.device).view(1, -1, 1).expand_as(every)
            cells = _ranking(every, numbers)[:, : self.depth]
        # From here on (B, n, K): n candidates of each image for each prototype of its class
        similarity = every.gather(1, cells).masked_fill(~self.used[classes].unsqueeze(1), -torch.inf)
        ids = ids.view(-1, 1, 1).expand_as(cells)
        keys = keys.expand_as(norm).unsqueeze(2).expand_as(every).gather(1, cells)
        first = torch.arange(0, norm.numel(), norm.shape[1], device=cells.device).view(-1, 1, 1)
        vectors = vectors.flatten(0, 1).index_select(0, (first + cells).flatten()).float()
        if self._filled + len(vectors) > max(len(vectors), min(WAITING_ROWS, WAITING_BYTES // (4 * vectors.shape[1]))):
            self.flush()
        self._waiting.append((labels, similarity, ids, cells, keys, vectors))
        self._filled += len(vectors)

    def flush(self) -> None:
        """Merge what waits into the lists: many small batches at once cost little more than one."""
        if not self._waiting:
            return
        labels, *waiting, vectors = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._filled = [], 0
        present, row_class = torch.unique(labels, return_inverse=True)  # on the CPU, as the labels are
        column, most = place_within(row_class, len(present))
        device = vectors.device
        present, row_class, column = (values.to(device, non_blocking=True) for values in (present, row_class, column))

        # The lists of the classes at hand, (P, M, K), and beside them the images of each class, (P, most * n, K)
        lists, held = [values[present] for values in self.ranked], self.vectors[present].flatten(0, 2)
        shape = (len(present), most, *waiting[0].shape[1:])
        fresh = _empty(shape, device)
        row = torch.zeros(shape, dtype=torch.int64, device=device)  # of a candidate's vector: those held, then waiting
        number = torch.arange(len(held), len(held) + len(vectors), device=device).view_as(waiting[0])
        for target, values in zip((*fresh, row), (*waiting, number), strict=True):
            target[row_class, column] = values
        row = torch.cat([torch.arange(len(held), device=device).view_as(lists[0]), row.flatten(1, 2)], dim=1)
        both = (torch.cat([old, new.flatten(1, 2)], dim=1) for old, new in zip(lists, fresh, strict=True))
        best, keep = Ranked(*both).best(self.depth)
        kept = torch.cat([held, vectors])[row.gather(1, keep)]
        for target, values in zip((*self.ranked, self.vectors), (*best, kept), strict=True):
            target[present] = values


def _empty(shape: tuple[int, ...], device: torch.device) -> Ranked:
    ids = torch.full(shape, NO_ID, device=device)
    cells = torch.zeros(shape, dtype=torch.int64, device=device)
    return Ranked(torch.full(shape, -torch.inf, device=device), ids, cells, ids.clone())


def _ranking(similarity: Tensor, *numbers: Tensor) -> Tensor:
    """The order along dim 1: by falling similarity, equals (see :data:`TIE`) by the numbers, the first ones first."""
    falling, order = similarity.sort(dim=1, descending=True)
    gaps = (falling[:, :-1] - falling[:, 1:]) > TIE  # -inf beside -inf gives NaN: no gap
    level = torch.zeros_like(order)
    level[:, 1:] = gaps.cumsum(dim=1)
    keys = [level, *(values.gather(1, order) for values in numbers)]
    by = keys.pop().argsort(dim=1, stable=True)
    while keys:  # from the last key to the first: a stable sort leaves the order of equals as it was
        by = by.gather(1, keys.pop().gather(1, by).argsort(dim=1, stable=True))
    return order.gather(1, by)


def _seen_before(keys: Tensor) -> Tensor:
    """Whether a key stood earlier along dim 1."""
    by_key = keys.argsort(dim=1, stable=True)
    ordered = keys.gather(1, by_key)
    same = torch.zeros_like(keys, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter(1, by_key, same)


def place_within(groups: Tensor, count: int) -> tuple[Tensor, int]:
    """The running number of each row within its group, and the size of the largest group. (CPU)"""
    ones = F.one_hot(groups, count)
    running = ones.cumsum(dim=0).gather(1, groups.unsqueeze(1)).squeeze(1) - 1
    return running, int(ones.sum(dim=0).max())
