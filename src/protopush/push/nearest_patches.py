"""Nearest patches of each prototype: one exact pass over the samples, or over those that a cap lets count."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protopush.data.dataset import Provenance
from protopush.data.regions import Regions
from protopush.distributed import all_gather, all_gather_objects, all_reduce_sum, raising_on_all_ranks, rank_and_size
from protopush.errors import InputError
from protopush.push.embedding import embedded
from protopush.push.options import PushOptions
from protopush.push.protocol import Pushable, Slots, live_features_of
from protopush.push.reader import DatasetReader, Reader, describe_all
from protopush.push.top_candidates import Ranked, TopM, place_within

logger = logging.getLogger("protopush.push")

LOG_EVERY = 50  # batches

Rule = Callable[[Reader, Tensor, Tensor], Tensor]
"""(reader, ids (B, 1), cells (L,)) to int64 keys, all on the CPU: (B, 1), one for all patches of an image, or (B, L),
another for each patch. Of patches with the same key, a prototype keeps the best, and its class uses one."""


@dataclass(frozen=True)
class Candidates:
    """The M nearest patches of each prototype, of all ranks, and which of them it takes.

    Attributes:
        ranked: (C, M, K), best first.
        mine: bool (C, M, K), those that this rank has read.
        vectors: float32 (C, M, K, W), their embeddings, or the features they were made of; 0 where not ``mine``.
        regions: of the patches.
        patches, images: int64 (C,), how many were seen.
        taken: int64 (C, K): 0 for the nearest, 1 where that one went to another prototype, ...
        unique: the selection rule that holds, a word for each class.
        notes: where a class had too few for the rule that was asked for.
    """

    ranked: Ranked
    mine: Tensor
    vectors: Tensor
    regions: Regions
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
        return describe_all(reader, self.of_taken(self.ranked.ids)[mine].tolist())

    def and_others(self, other: Candidates) -> Candidates:
        """The nearest of these and of those of other samples, as many for each prototype as here."""
        both = (torch.cat(pair, dim=1) for pair in zip(self.ranked, other.ranked, strict=True))
        ranked, keep = Ranked(*both).best(self.ranked.ids.shape[1])
        at = keep.unsqueeze(3).expand_as(self.vectors)
        vectors = torch.cat([self.vectors, other.vectors], dim=1).gather(1, at)
        mine = torch.cat([self.mine, other.mine], dim=1).gather(1, keep)
        patches, images = self.patches + other.patches, self.images + other.images
        return replace(self, ranked=ranked, mine=mine, vectors=vectors, patches=patches, images=images)

    def with_classes(self, classes: list[int], other: Candidates) -> Candidates:
        """These candidates, but for some classes those of another search, which has as many of them or fewer."""

        def joined(mine: Tensor, theirs: Tensor) -> Tensor:
            found = mine.clone()
            found[classes, : theirs.shape[1]] = theirs[classes]
            return found

        empty = self.ranked.similarity.clone()
        empty[classes] = -torch.inf
        ranked = Ranked(*map(joined, self.ranked._replace(similarity=empty), other.ranked))
        unique = tuple(other.unique[c] if c in classes else word for c, word in enumerate(self.unique))
        mine, vectors = joined(self.mine, other.mine), joined(self.vectors, other.vectors)
        taken = joined(self.taken, other.taken)
        return replace(self, ranked=ranked, mine=mine, vectors=vectors, taken=taken, unique=unique)


def nearest_patches(
    net: Pushable, reader: Reader, slots: Slots, options: PushOptions, rule: Rule, depth: int
) -> Candidates:
    """The ``depth`` nearest patches of each prototype among the samples of its own class, with different keys.

    Streaming and exact: each batch is embedded, compared with the prototypes of its samples' own classes alone, and
    merged into a list of ``depth`` candidates a prototype. There is no loop over prototypes or images, and nothing in
    the batch loop waits for the device. The order is (similarity, sample id, cell), so that the result is the same for
    any batch size, order, number of workers and of ranks; every rank must call it.

    Of ``options``, ``use_local``, ``allow``, ``max_patches_per_class`` and its ``seed`` are read.

    Raises:
        InputError: on every rank, whatever went wrong on one of them; non-finite features name their samples.
    """
    device, live = slots.unit.device, live_features_of(net)  # live anchors keep features, not embeddings
    top = TopM(slots.unit, slots.used, depth, None if live is None else live.shape[1])
    regions: Regions | None = None
    with raising_on_all_ranks():
        reader, cap = _capped(net, reader, options, len(slots.rows))
    with embedded(net, reader, options.use_local) as batches:
        for number, batch in enumerate(batches, start=1):
            regions, ids, allowed = regions or batch.regions, batch.ids, batch.valid
            cells = allowed.shape[1]
            for limit in (cap.take(batch.labels, ids, cells), options.allow and options.allow(ids, regions)):
                if limit is not None:
                    allowed = allowed & limit.to(device, non_blocking=True)
            keys = rule(reader, ids.unsqueeze(1), torch.arange(cells)).to(device, non_blocking=True)
            ids = ids.to(device, non_blocking=True)
            vectors = batch.embeddings if live is None else batch.features
            top.update(batch.embeddings, batch.norm, batch.labels, ids, keys, allowed, vectors)
            if number % LOG_EVERY == 0:
                logger.info("  Processed %d batches...", number)
            if cap.filled():
                break
        top.flush()
    known = [other for other in all_gather_objects(regions) if other is not None]
    if not known:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    rank, _ = rank_and_size()
    ranked, keep = Ranked(*(torch.cat(all_gather(values), dim=1) for values in top.ranked)).best(depth)
    mine = keep // depth == rank  # the lists of the ranks lie one after the other
    at = (keep % depth).unsqueeze(3).expand_as(top.vectors)
    vectors = top.vectors.gather(1, at).masked_fill(~mine.unsqueeze(3), 0.0)
    counts = torch.stack([cap.patches, cap.images])
    patches, images = all_reduce_sum(counts if reader.divided or rank == 0 else torch.zeros_like(counts))
    return Candidates(ranked, mine, vectors, known[0], patches, images, torch.zeros_like(keep[:, 0]))


class PatchCap:
    """Counts the patches of each class, and says which may still be taken under a cap. (CPU)

    ``planned``, int64 (N,): the patches to take of each sample, where that is settled beforehand.
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

    def filled(self) -> bool:
        """Whether every class has its fill, so that nothing more need be read."""
        return self.cap is not None and self.planned is None and bool((self.patches >= self.cap).all())


def _capped(net: Pushable, reader: Reader, options: PushOptions, classes: int) -> tuple[Reader, PatchCap]:
    """The samples that count under the cap and no others, where labels are known; else they are counted as read."""
    cap, seed = options.max_patches_per_class, options.seed
    if cap is None:
        return reader, PatchCap(classes, None)
    if not isinstance(reader, DatasetReader):  # each rank has its own stream, and its own share
        rank, size = rank_and_size()
        return reader, PatchCap(classes, cap // size + (rank < cap % size), seed)
    if reader.labels is None or not reader.ids:  # what counts depends on all before it: each rank must see all of it
        return replace(reader, divided=False), PatchCap(classes, cap, seed)
    first = next(replace(reader, ids=reader.ids[:1], divided=False).batches())
    pooled, patches = net.extract_features(first.images.to(net.head.proto_manager.prototypes.device))
    cells = (patches if options.use_local else pooled).shape[1]
    ids = torch.as_tensor(reader.ids, dtype=torch.int64)
    own = reader.labels[ids].clamp(0, classes - 1)  # a wrong label is refused when its sample is read
    take = (cap - place_within(own, classes)[0] * cells).clamp(min=0, max=cells)
    planned = torch.zeros(len(reader.labels), dtype=torch.int64)
    planned[ids] = take
    return reader.subset(ids[take > 0].tolist()), PatchCap(classes, cap, seed, planned)
