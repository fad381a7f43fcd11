"""The exact nearest-patch search: one pass, nothing collected, memory O(prototypes * M * D)."""

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

_SPREAD = -7046029254386353131  # 2**64 / golden ratio: multiples of it lie far apart, so that cells fit between ids


class Patches(NamedTuple):
    """A batch of embedded images, on the prototypes' device but for ``labels``.

    Attributes:
        embeddings: float32 (B, L, D), of any norm.
        norm: float32 (B, L), their norms.
        labels: int64 (B,), on the CPU: which classes a batch holds is then known without waiting for the device.
        ids: int64 (B,).
        keys: int64 (B,): of patches with the same key, a prototype keeps one candidate (the sample, or its group).
        allowed: bool (B, L): patches that may be chosen; none of norm 0 or not finite.
        vectors: (B, L, W), what is kept of a candidate: the embedding, or the feature it was made of.
    """

    embeddings: Tensor
    norm: Tensor
    labels: Tensor
    ids: Tensor
    keys: Tensor
    allowed: Tensor
    vectors: Tensor


class Ranked(NamedTuple):
    """Candidates, best first along dim 1; all (C, M, K).

    Attributes:
        similarity: float32, -inf where nothing was found.
        ids, cells, keys: int64.
        place: int64, where the candidate's vector lies.
    """

    similarity: Tensor
    ids: Tensor
    cells: Tensor
    keys: Tensor
    place: Tensor

    def cat(self, other: Ranked) -> Ranked:
        """Both, one after the other."""
        return Ranked(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))

    def best(self, depth: int, by_patch: bool = False) -> tuple[Ranked, Tensor]:
        """The best ``depth`` with different keys, and where they stood along dim 1.

        The order is (similarity, smaller sample id, smaller cell), where similarities closer than :data:`TIE` are
        equal. Where there are fewer, the rest is empty: similarity -inf, id :data:`NO_ID`.
        """
        order = _ranking(self.similarity, self.ids, self.cells if by_patch else None)
        if depth > 1:
            again = _seen_before(self.keys.gather(1, order))
            last = again.to(torch.uint8).argsort(dim=1, stable=True)
            order, again = order.gather(1, last), again.gather(1, last)
        keep = order[:, :depth]
        similarity, ids, cells, keys, place = (values.gather(1, keep) for values in self)
        empty = similarity == -torch.inf
        if depth > 1:
            empty = empty | again[:, :depth]
        similarity = similarity.masked_fill(empty, -torch.inf)
        return Ranked(similarity, ids.masked_fill(empty, NO_ID), cells, keys.masked_fill(empty, NO_ID), place), keep


class TopM:
    """The M best patches of each prototype among the samples of its own class, each with another key.

    Args:
        prototypes: (C, K, D) unit vectors.
        used: bool (C, K), the slots in use.
        depth: M.
        width: W, the size of the vectors that are kept; by default D.
        by_patch: several patches of one sample may be candidates (then every patch is its own key).
    """

    def __init__(
        self, prototypes: Tensor, used: Tensor, depth: int = 1, width: int | None = None, by_patch: bool = False
    ) -> None:
        classes, slots, dim = prototypes.shape
        device = prototypes.device
        self.prototypes = prototypes.float()
        self.used = used
        self.depth = depth
        self.by_patch = by_patch
        shape = (classes, depth, slots)
        place = torch.arange(depth, device=device).view(1, -1, 1).expand(shape)
        self.ranked = _empty(shape, device)._replace(place=place.clone())
        # One place more than there are candidates: what isn't kept is written there, so that the number of writes
        # never has to be known.
        self.vectors = torch.zeros((classes, depth + 1, slots, width or dim), device=device)
        self._waiting: list[tuple[Tensor, ...]] = []  # candidates of batches that are still to be merged,
        self._held, self._filled = torch.empty((0, 0), device=device), 0  # and their vectors, row after row

    def update(self, batch: Patches) -> None:
        """Take in a batch; call :meth:`flush` after the last one."""
        classes = batch.labels.to(batch.embeddings.device, non_blocking=True)
        similarity, cells = self._best_cells(batch, classes)  # (B, n, K)
        ids = batch.ids.view(-1, 1, 1).expand_as(cells)
        keys = ids * _SPREAD + cells if self.by_patch else batch.keys.view(-1, 1, 1).expand_as(cells)
        first = torch.arange(0, batch.norm.numel(), batch.norm.shape[1], device=cells.device).view(-1, 1, 1)
        self._keep(batch.vectors.flatten(0, 1), (first + cells).flatten())
        self._waiting.append((batch.labels, similarity, ids, cells, keys))

    def _keep(self, vectors: Tensor, rows: Tensor) -> None:
        """Copy rows of (B * L, W) to where they wait, after a merge if there is no room."""
        if self._filled + len(rows) > len(self._held):
            self.flush()
        if len(rows) > len(self._held):
            size = max(len(rows), min(WAITING_ROWS, WAITING_BYTES // (4 * vectors.shape[1])))
            self._held = torch.empty((size, vectors.shape[1]), device=vectors.device)
        room = self._held[self._filled : self._filled + len(rows)]
        if vectors.dtype == room.dtype:
            torch.index_select(vectors, 0, rows, out=room)
        else:
            room.copy_(vectors.index_select(0, rows))
        self._filled += len(rows)

    def flush(self) -> None:
        """Merge what waits into the state: many small batches at once cost little more than one."""
        if not self._waiting:
            return
        labels, similarity, ids, cells, keys = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        vectors = self._held[: self._filled].view(*cells.shape, -1)
        self._waiting, self._filled = [], 0
        device = similarity.device
        present, row_class = torch.unique(labels, return_inverse=True)
        column, most = place_within(row_class, len(present))
        row_class, column = row_class.to(device, non_blocking=True), column.to(device, non_blocking=True)
        present = present.to(device, non_blocking=True)

        # Images of one class side by side: (present classes, images * n, K), as the state has (classes, M, K)
        shape = (len(present), most, *similarity.shape[1:])
        fresh = _empty(shape, device)
        for target, values in zip(fresh, (similarity, ids, cells, keys), strict=False):
            target[row_class, column] = values
        place = self._merge(present, Ranked(*(values.flatten(1, 2) for values in fresh)))
        place = place.view(shape)[row_class, column]
        slot = torch.arange(shape[-1], device=device)
        self.vectors[present[row_class].view(-1, 1, 1), place, slot] = vectors

    def _best_cells(self, batch: Patches, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities and cells of each image's candidates for the prototypes of its class, (B, n, K)."""
        every = self.prototypes.index_select(0, classes) @ batch.embeddings.transpose(1, 2)  # (B, K, L)
        every = (every / batch.norm.unsqueeze(1)).masked_fill_(~batch.allowed.unsqueeze(1), -torch.inf)
        if self.by_patch:
            every = every.transpose(1, 2)
            cells = torch.arange(every.shape[1], device=every.device).view(1, -1, 1).expand_as(every)
            cells = _ranking(every, cells)[:, : self.depth]
            similarity = every.gather(1, cells)
        else:
            tied = every >= every.amax(dim=2, keepdim=True) - TIE
            cells = tied.view(torch.uint8).argmax(dim=2, keepdim=True)  # the first of equals: the smaller cell
            similarity = every.gather(2, cells).transpose(1, 2)
            cells = cells.transpose(1, 2)
        return similarity.masked_fill(~self.used[classes].unsqueeze(1), -torch.inf), cells

    def _merge(self, present: Tensor, fresh: Ranked) -> Tensor:
        """Keep the best M of state and batch; where the vector of each new candidate goes, (present, n, K)."""
        depth = self.depth
        state = Ranked(*(values[present] for values in self.ranked))
        best, keep = state.cat(fresh).best(depth, self.by_patch)
        stays = keep < depth
        # A candidate that stays keeps its place, new ones take the places of those that go.
        taken = torch.zeros_like(state.place, dtype=torch.uint8)
        taken.scatter_add_(1, best.place.masked_fill(~stays, 0), stays.to(torch.uint8))
        free = taken.argsort(dim=1, stable=True)
        number = (~stays).cumsum(dim=1) - 1
        place = torch.where(stays, best.place, free.gather(1, number.clamp(min=0)))
        for target, values in zip(self.ranked, best._replace(place=place), strict=True):
            target[present] = values
        nowhere = torch.full_like(torch.cat([state.place, fresh.place], dim=1), depth)
        return nowhere.scatter(1, keep, place)[:, depth:]


def _empty(shape: tuple[int, ...], device: torch.device) -> Ranked:
    ids = torch.full(shape, NO_ID, device=device)
    zeros = torch.zeros(shape, dtype=torch.int64, device=device)
    return Ranked(torch.full(shape, -torch.inf, device=device), ids, zeros, ids.clone(), zeros.clone())


def _ranking(similarity: Tensor, numbers: Tensor, then: Tensor | None = None) -> Tensor:
    """The order along dim 1: by similarity, equals (see :data:`TIE`) by number, then by ``then``."""
    falling, order = similarity.sort(dim=1, descending=True)
    gaps = (falling[:, :-1] - falling[:, 1:]) > TIE  # -inf beside -inf gives NaN: no gap
    level = torch.zeros_like(order)
    level[:, 1:] = gaps.cumsum(dim=1)
    keys = [level, numbers.gather(1, order)] + ([] if then is None else [then.gather(1, order)])
    by = keys.pop().argsort(dim=1, stable=True)
    while keys:
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
