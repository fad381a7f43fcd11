"""Nearest patches: one pass over the data, exact, in memory that does not grow with the number of images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protopush.data.dataset import Provenance
from protopush.distributed import all_gather, all_gather_objects, all_reduce_sum, raising_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.push.options import PushOptions
from protopush.push.protocol import Pushable, Slots, live_features_of
from protopush.push.reader import DatasetReader, Reader, check_labels
from protopush.push.top_candidates import NO_ID, Patches, Ranked, TopM, place_within

logger = logging.getLogger("protopush.push")

LOG_EVERY = 50  # batches

Rule = Callable[[Reader, Tensor, Tensor], Tensor]
"""(reader, ids (B, 1), cells (L,)) to int64 keys, all on the CPU: (B, 1), one for all patches of an image, or (B, L),
another for each patch. Of patches with the same key, a prototype keeps the best, and its class uses one."""


@dataclass(frozen=True)
class Candidates:
    """The M nearest patches of each prototype, of all ranks, and which of them it takes. Tensors are (C, M, K).

    Attributes:
        ranked: best first.
        mine: bool, those that this rank has read.
        vectors: float32 (C, M, K, W), their embeddings, or the features they were made of; 0 where not ``mine``.
        grid: (rows, columns) of the patches.
        patches, images: int64 (C,), how many were seen.
        taken: int64 (C, K): 0 for the nearest, 1 where that one went to another prototype, ...
        unique: the selection rule that holds, a word for each class.
        notes: where a class had too few for the rule that was asked for.
    """

    ranked: Ranked
    mine: Tensor
    vectors: Tensor
    grid: tuple[int, int]
    patches: Tensor
    images: Tensor
    taken: Tensor
    unique: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def of_taken(self, values: Tensor) -> Tensor:
        """The values (C, M, K) of the candidates that are taken, (C, K)."""
        return values.gather(1, self.taken.unsqueeze(1)).squeeze(1)

    def taken_vectors(self) -> Tensor:
        """The vectors of the candidates that are taken, (C, K, W), the same on every rank."""
        at = self.taken[:, None, :, None].expand(-1, -1, -1, self.vectors.shape[3])
        return all_reduce_sum(self.vectors.gather(1, at).squeeze(1))

    def origins(self, reader: Reader) -> dict[int, Provenance]:
        """Where the samples that are taken come from; each is described by the rank that has read it."""
        mine = self.of_taken(self.mine & self.ranked.similarity.isfinite())
        here = {i: reader.describe(i) for i in sorted(set(self.of_taken(self.ranked.ids)[mine].tolist()))}
        return {i: origin for part in all_gather_objects(here) for i, origin in part.items()}

    def with_classes(self, classes: list[int], other: Candidates) -> Candidates:
        """These candidates, but for some classes those of another search, which has as many of them or fewer."""

        def joined(mine: Tensor, theirs: Tensor) -> Tensor:
            found = mine.clone()
            found[classes, : theirs.shape[1]] = theirs[classes]
            return found

        empty = self.ranked.similarity.clone()
        empty[classes] = -torch.inf
        pairs = zip(self.ranked._replace(similarity=empty), other.ranked, strict=True)
        return replace(
            self,
            ranked=Ranked(*(joined(mine, theirs) for mine, theirs in pairs)),
            mine=joined(self.mine, other.mine),
            vectors=joined(self.vectors, other.vectors),
            taken=joined(self.taken, other.taken),
            unique=tuple(other.unique[c] if c in classes else word for c, word in enumerate(self.unique)),
        )


def nearest_patches(
    net: Pushable, reader: Reader, slots: Slots, options: PushOptions, rule: Rule, depth: int
) -> Candidates:
    """The ``depth`` nearest patches of each prototype among the samples of its own class, with different keys.

    Streaming and exact: each batch is embedded, compared with the prototypes of its samples' own classes alone, and
    merged into a list of ``depth`` candidates a prototype. There is no loop over prototypes or images, and nothing in
    the batch loop waits for the device. The order is (similarity, sample id, cell), so that the result is the same for
    any batch size, order, number of workers and of ranks; every rank must call it.

    Args:
        net: the model, in eval mode.
        reader: the samples.
        slots: the prototypes.
        options: ``use_local``, ``allow``, ``max_patches_per_class`` and its ``seed`` are read.
        rule: gives the keys of patches: of those with the same key, a prototype keeps the best.
        depth: M.

    Raises:
        InputError: on every rank, whatever went wrong on one of them; non-finite features name their samples.
    """
    device, classes = slots.unit.device, len(slots.rows)
    live = live_features_of(net)  # live anchors keep features, not embeddings
    top = TopM(slots.unit, slots.used, depth, None if live is None else live.shape[1])
    bad, grid = NonFinite(device), None
    with raising_on_all_ranks():
        reader, cap = _capped(net, reader, options, classes, device)
        for number, (images, labels, ids) in enumerate(reader.batches(), start=1):
            check_labels(labels, ids, classes)
            pooled, patches = net.extract_features(images.to(device, non_blocking=True))
            features = patches if options.use_local else pooled
            if grid is None:
                log_shapes(pooled, patches, options.use_local)
                grid = grid_of(features.shape[1], images) if options.use_local else (1, 1)
            embeddings = net.head.proj(features).float()
            norm = torch.linalg.vector_norm(embeddings, dim=2)
            allowed = norm.isfinite() & (norm > 0)
            for limit in (cap.take(labels, ids, norm.shape[1]), options.allow and options.allow(ids, grid)):
                if limit is not None:
                    allowed = allowed & limit.to(device, non_blocking=True)
            keys = rule(reader, ids.unsqueeze(1), torch.arange(norm.shape[1])).to(device, non_blocking=True)
            ids = ids.to(device, non_blocking=True)
            bad.update(norm, ids)
            vectors = embeddings if live is None else features
            top.update(Patches(embeddings, norm, labels, ids, keys, allowed, vectors))
            if number % LOG_EVERY == 0:
                logger.info("  Processed %d batches...", number)
            if cap.filled:
                break
        top.flush()
    refuse_non_finite(bad, reader)
    grids = [other for other in all_gather_objects(grid) if other is not None]
    if not grids:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    return _merged(top, cap, reader, grids[0])


def _merged(top: TopM, cap: PatchCap, reader: Reader, grid: tuple[int, int]) -> Candidates:
    """The lists of all ranks as one."""
    rank, _ = rank_and_size()
    ranked, keep = Ranked(*(torch.cat(all_gather(values), dim=1) for values in top.ranked)).best(top.depth)
    mine = keep // top.depth == rank  # the lists of the ranks lie one after the other
    at = (keep % top.depth).unsqueeze(3).expand_as(top.vectors)
    vectors = top.vectors.gather(1, at).masked_fill(~mine.unsqueeze(3), 0.0)
    counts = torch.stack([cap.patches, cap.images])
    patches, images = all_reduce_sum(counts if reader.divided or rank == 0 else torch.zeros_like(counts))
    return Candidates(ranked, mine, vectors, grid, patches, images, torch.zeros_like(keep[:, 0]))


class PatchCap:
    """Counts the patches of each class, and says which may still be taken under a cap. (CPU)

    Args:
        num_classes: number of classes.
        cap: most patches per class; None: all.
        seed: of the choice of cells in an image that only partly fits.
        planned: int64 (N,), the patches to take of each sample, where that is settled beforehand.
    """

    def __init__(self, num_classes: int, cap: int | None, seed: int = 0, planned: Tensor | None = None) -> None:
        self.cap, self.seed, self.planned = cap, seed, planned
        self.patches = torch.zeros(num_classes, dtype=torch.int64)
        self.images = torch.zeros(num_classes, dtype=torch.int64)

    def take(self, labels: Tensor, ids: Tensor, cells: int) -> Tensor | None:
        """Which of the ``cells`` patches of each image count, bool (B, cells); None: all of them."""
        if self.planned is not None:
            take = self.planned[ids]
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
    def filled(self) -> bool:
        """Whether every class has its fill, so that nothing more need be read."""
        return self.cap is not None and self.planned is None and bool((self.patches >= self.cap).all())


def _capped(
    net: Pushable, reader: Reader, options: PushOptions, classes: int, device: torch.device
) -> tuple[Reader, PatchCap]:
    """The samples that count under the cap and no others, where labels are known; else they are counted as read."""
    cap, seed = options.max_patches_per_class, options.seed
    if cap is not None and not isinstance(reader, DatasetReader):  # each rank has its own stream, and its own share
        rank, size = rank_and_size()
        return reader, PatchCap(classes, cap // size + (rank < cap % size), seed)
    if cap is None or not isinstance(reader, DatasetReader):
        return reader, PatchCap(classes, None)
    if reader.labels is None or not reader.ids:
        # What counts depends on all that was read before: each rank must see all of it.
        return replace(reader, divided=False), PatchCap(classes, cap, seed)
    first = next(replace(reader, ids=reader.ids[:1], divided=False).batches())
    pooled, patches = net.extract_features(first.images.to(device))
    cells = (patches if options.use_local else pooled).shape[1]
    ids = torch.as_tensor(reader.ids, dtype=torch.int64)
    own = reader.labels[ids].clamp(0, classes - 1)  # a wrong label is refused when its sample is read
    take = (cap - place_within(own, classes)[0] * cells).clamp(min=0, max=cells)
    planned = torch.zeros(len(reader.labels), dtype=torch.int64)
    planned[ids] = take
    return reader.subset(ids[take > 0].tolist()), PatchCap(classes, cap, seed, planned)


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


def refuse_non_finite(bad: NonFinite, reader: Reader) -> None:
    """Name the samples, of all ranks, whose features aren't finite.

    Raises:
        InputError: there are some.
    """
    count, ids = bad.found()
    parts = all_gather_objects((count, [(i, reader.describe(i).sample_id) for i in ids]))
    count = sum(number for number, _ in parts)
    if count:
        every = sorted((item for _, named in parts for item in named), key=lambda item: item[0])
        names = [name for _, name in every][: len(bad.smallest)]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise InputError(
            f"NaN or infinite features in {count} samples: {listing(names, len(names))}{more}; expected finite ones; "
            "check these images and the weights; nothing was changed"
        )


def grid_of(cells: int, images: Tensor) -> tuple[int, int]:
    """(rows, columns) with rows * columns == cells, of the shape nearest to the images' (or to a square)."""
    height, width = images.shape[-2:] if images.ndim == 4 else (1, 1)
    shapes = [(rows, cells // rows) for rows in range(1, cells + 1) if cells % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def log_shapes(pooled: Tensor, patches: Tensor, use_local: bool) -> None:
    """Log what is read, under the names of the protocol, and refuse features that aren't (batch, cells, channels)."""
    for name, features in (("x_fu1", patches), ("x_fu", pooled)):
        if features.ndim != 3:
            raise InputError(f"{name} has the shape {tuple(features.shape)}; expected (batch, cells, channels)")
    local, whole = (
        f"x_fu1 (B, {patches.shape[1]}, {patches.shape[2]})",
        f"x_fu (B, {pooled.shape[1]}, {pooled.shape[2]})",
    )
    logger.info("  Using %s instead of %s", *((local, whole) if use_local else (whole, local)))
