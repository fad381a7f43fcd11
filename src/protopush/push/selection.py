"""Selection of anchors: the nearest patches of each prototype, by one exact pass, and which of them it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from protopush.data.dataset import Provenance
from protopush.data.regions import Regions
from protopush.distributed import all_gather, all_gather_objects, all_reduce_sum, raising_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.push.embedding import embedded
from protopush.push.options import PushOptions, resolve
from protopush.push.protocol import Pushable, Slots, live_features_of
from protopush.push.reader import DatasetReader, Reader, describe_all
from protopush.push.top_candidates import TIE, Ranked, TopM, place_within

logger = logging.getLogger("protopush.push")

LOG_EVERY = 50  # batches

Rule = Callable[[Reader, Tensor, Tensor], Tensor]
"""(reader, ids (B, 1), cells (L,)) to int64 keys, all on the CPU: (B, 1), one for all patches of an image, or (B, L),
another for each patch. Of patches with the same key, a prototype keeps the best, and its class uses one."""

_SPREAD = -7046029254386353131  # 2**64 / golden ratio: multiples of it lie far apart, so that cells fit between ids
_FOREIGN = 1e6  # more than any sum of distances: a key that isn't among a prototype's candidates


def shared(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``none``: each prototype takes its nearest patch; the keys only keep its runner-up in another image."""
    return ids


def by_patch(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``patch``: each prototype of a class has another patch."""
    return ids * _SPREAD + cells


def by_image(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``image``: each prototype of a class has another image."""
    return ids


def by_group(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``group``: each prototype of a class has another group (lesion, patient, ...) of the dataset's ``groups``."""
    return ids if reader.groups is None else reader.groups[ids]


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


def choose(net: Pushable, reader: Reader, slots: Slots, options: PushOptions, class_names: list[str]) -> Candidates:
    """The patch that each prototype takes, by one pass; by one more over the classes that have too few for the rule.

    Where a class has fewer images than prototypes, prototypes of it have different patches instead; where it has fewer
    patches as well, they share them. For any other rule than ``patch``, ``image`` takes the place of it.
    """
    rule, notes = resolve(RULES, options.unique, "unique"), list[str]()
    if rule is by_group and reader.groups is None:
        notes.append("the dataset has no groups: anchors are unique by image instead")
        rule = by_image
    chosen, classes = None, list(range(len(slots.rows)))
    while True:
        asked = slots._replace(used=torch.zeros_like(slots.used))
        asked.used[classes] = slots.used[classes]
        depth = 2 if rule is shared else max(2, int(asked.used.sum(dim=1).max()))
        found = nearest_patches(net, reader, asked, options, rule, depth)
        taken, short = (found.taken, []) if rule is shared else assign(found.ranked, asked.used)
        found = replace(found, taken=taken, unique=(_word(rule),) * len(slots.rows))
        chosen = found if chosen is None else chosen.with_classes(classes, found)
        if not short:
            return replace(chosen, notes=tuple(notes))
        lower = by_patch if rule is by_image else shared if rule is by_patch else by_image
        few = listing([class_names[c] if class_names else f"class {c}" for c in short])
        instead = "anchors are shared" if lower is shared else f"anchors are unique by {_word(lower)} instead"
        plural = _word(rule) + ("es" if _word(rule).endswith("ch") else "s")
        notes.append(f"{few}: fewer {plural} than prototypes, {instead}")
        rule, classes, reader = lower, short, reader.of_classes(short)


def _word(rule: Rule) -> str:
    return next((name for name, known in RULES.items() if known is rule), getattr(rule, "__name__", "key"))


def assign(ranked: Ranked, used: Tensor) -> tuple[Tensor, list[int]]:
    """The candidates that maximise the sum of the similarities of each class, no key taken twice.

    M candidates (C, M, K) of different keys are enough for M prototypes ``used`` (C, K) of a class: among M keys, one
    is always left for the last. Equal sums are settled for smaller keys.

    Returns:
        int64 (C, K), the candidate that each prototype takes, 0 for the nearest and where nothing was found; and the
        classes with fewer keys than prototypes, which have to be settled by another rule.
    """
    similarity, keys = ranked.similarity.cpu().double().numpy(), ranked.keys.cpu().numpy()
    taken, short = np.zeros(used.shape, dtype=np.int64), []
    for c, slots in enumerate(used.cpu().numpy()):
        (rows,) = np.nonzero(slots)
        found = np.isfinite(similarity[c][:, rows])
        if not found.any():
            continue
        if len(np.unique(keys[c][:, rows][found])) < len(rows):
            short.append(c)
        else:
            taken[c, rows] = _assign_class(similarity[c][:, rows].T, keys[c][:, rows].T)
    return torch.from_numpy(taken).to(ranked.keys.device), short


def _assign_class(similarity: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place in its list that each prototype takes; both inputs are (prototypes, M), best first."""
    there = np.isfinite(similarity)
    columns, place = np.unique(keys[there], return_inverse=True)
    cost = np.full((len(keys), len(columns)), _FOREIGN)
    rows, ranks = np.nonzero(there)
    # Noise must not choose between equals, but the smaller key: equal costs, then a nudge that is smaller than any TIE.
    cost[rows, place] = 1.0 - _levelled(similarity)[rows, ranks] + place * (TIE / 2 / len(columns) / len(keys))
    rank_of = np.zeros(cost.shape, dtype=np.int64)
    rank_of[rows, place] = ranks
    from scipy.optimize import linear_sum_assignment  # here: opening a run needs none of it, and it takes long

    taken: np.ndarray = rank_of[linear_sum_assignment(cost)]  # its rows are all prototypes, in order
    return taken


def _levelled(similarity: np.ndarray) -> np.ndarray:
    """Similarities (prototypes, M) in falling order, up to TIE, with near-equal ones made equal."""
    levelled = similarity.copy()
    for m in range(1, similarity.shape[1]):
        with np.errstate(invalid="ignore"):  # -inf beside -inf: never equal, never taken
            same = similarity[:, m - 1] - similarity[:, m] <= TIE
        levelled[same, m] = levelled[same, m - 1]
    return levelled


RULES: dict[str, Rule] = {
    "none": shared,
    "patch": by_patch,
    "image": by_image,
    "group": by_group,
}
