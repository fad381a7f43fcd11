"""The pass over the data: every rank searches its own batches, then the candidates of all ranks are merged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protopush.data.dataset import Provenance
from protopush.distributed import all_gather, all_gather_objects, all_reduce_sum, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.push.patch_cap import NonFinite, Tally
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import DatasetSource, Source, check_labels
from protopush.push.top_candidates import Patches, Ranked, TopM

logger = logging.getLogger("protopush.push")

LOG_EVERY = 50  # batches


Allow = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Query:
    """What a push looks for.

    Attributes:
        use_local: patches, or the pooled feature.
        cap: most patches per class; None: all.
        seed: of the order of the images under a cap.
        allow: ids (B,) and grid to bool (B, L), both on the CPU: patches that may become anchors; None: all.
        width: W, where the features that patches are projected from are kept, else None (embeddings are kept).
    """

    use_local: bool
    cap: int | None
    seed: int
    allow: Allow | None
    width: int | None


@dataclass(frozen=True)
class Found:
    """The candidates of all ranks, M for each prototype.

    Attributes:
        ranked: (C, M, K).
        owner: (C, M, K), the rank that holds a candidate's vector.
        held: (C, M + 1, K, W), the vectors that this rank holds.
        grid: of the patches.
        patches, images: (C,), how many were looked at.
    """

    ranked: Ranked
    owner: Tensor
    held: Tensor
    grid: tuple[int, int]
    patches: Tensor
    images: Tensor

    def vectors(self, choice: Tensor) -> Tensor:
        """The vectors (C, K, W) of the candidates number ``choice`` (C, K), the same on every rank."""
        choice = choice.unsqueeze(1)
        place = self.ranked.place.gather(1, choice)
        mine = self.owner.gather(1, choice) == rank_and_size()[0]
        index = place.unsqueeze(-1).expand(-1, -1, -1, self.held.shape[3])
        held = self.held.gather(1, index).masked_fill(~mine.unsqueeze(-1), 0.0)
        return all_reduce_sum(held.squeeze(1))

    def origins(self, choice: Tensor, source: Source) -> dict[int, Provenance]:
        """Where the chosen samples come from; each is told by the rank that has read it."""
        choice = choice.unsqueeze(1)
        ids, owner = (values.gather(1, choice) for values in (self.ranked.ids, self.owner))
        there = self.ranked.similarity.gather(1, choice).isfinite()
        mine = sorted(set(ids[there & (owner == rank_and_size()[0])].tolist()))
        told = all_gather_objects({i: source.describe(i) for i in mine})
        return {i: origin for origins in told for i, origin in origins.items()}


def search(net: Pushable, source: Source, slots: Slots, query: Query, depth: int, key: str) -> Found:
    """The ``depth`` best candidates of each prototype, with different keys.

    Args:
        net, source, slots, query: model, data, prototypes and what is asked.
        depth: M.
        key: ``image``, ``group`` or ``patch``: of what a prototype keeps one candidate.

    Raises:
        InputError: on every rank, whatever went wrong on one of them.
    """
    device = slots.unit.device
    top = TopM(slots.unit, slots.used, depth, query.width, by_patch=key == "patch")
    strange = NonFinite(device)
    tally = Tally(len(slots.rows), _share_of_cap(query.cap, source), query.seed)
    grid = raise_on_all_ranks(lambda: _read(net, source, query, top, strange, tally, key))
    refuse_non_finite(strange, source)
    grids = [other for other in all_gather_objects(grid) if other is not None]
    if not grids:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    return _merged(top, tally, source, grids[0])


def _read(
    net: Pushable, source: Source, query: Query, top: TopM, strange: NonFinite, tally: Tally, key: str
) -> tuple[int, int] | None:
    """One pass over this rank's batches, without waiting for the device; the grid of the patches."""
    device, classes = top.prototypes.device, len(top.prototypes)
    groups = source.groups if key == "group" else None
    if query.cap is not None and isinstance(source, DatasetSource):
        _plan(net, source, query, tally, device)
    grid = None
    for number, (images, labels, ids) in enumerate(source.batches(), start=1):
        check_labels(labels, ids, classes)
        x_fu, x_fu1 = net.extract_features(images.to(device, non_blocking=True))
        features = x_fu1 if query.use_local else x_fu
        if grid is None:
            log_shapes(x_fu, x_fu1, query.use_local)
            grid = grid_of(features.shape[1], images) if query.use_local else (1, 1)
        embeddings = net.head.proj(features).float()
        norm = torch.linalg.vector_norm(embeddings, dim=2)
        allowed = norm.isfinite() & (norm > 0)
        for limit in (tally.take(labels, ids, norm.shape[1]), query.allow and query.allow(ids, grid)):
            if limit is not None:
                allowed = allowed & limit.to(device, non_blocking=True)
        keys = (ids if groups is None else groups[ids]).to(device, non_blocking=True)
        ids = ids.to(device, non_blocking=True)
        strange.update(norm, ids)
        vectors = embeddings if query.width is None else features
        top.update(Patches(embeddings, norm, labels, ids, keys, allowed, vectors))
        if number % LOG_EVERY == 0:
            logger.info("  Processed %d batches...", number)
        if tally.done:
            break
    top.flush()
    return grid


def _plan(net: Pushable, source: DatasetSource, query: Query, tally: Tally, device: torch.device) -> None:
    """Settle which images count under a cap before they are read; where labels aren't known, while they are."""
    if source.labels is None or not source.order:
        source.divided = False  # what counts depends on all that was read before: each rank must see all of it
        return
    x_fu, x_fu1 = net.extract_features(source.first().images.to(device))
    cells = (x_fu1 if query.use_local else x_fu).shape[1]
    source.order = tally.plan(source.order, source.labels, cells)


def _share_of_cap(cap: int | None, source: Source) -> int | None:
    """Streams are divided by whoever made them: each rank takes its share of the cap."""
    if cap is None or isinstance(source, DatasetSource):
        return cap
    rank, size = rank_and_size()
    return cap // size + (rank < cap % size)


def _merged(top: TopM, tally: Tally, source: Source, grid: tuple[int, int]) -> Found:
    rank, _ = rank_and_size()
    parts = [all_gather(values) for values in top.ranked]
    everyone = [Ranked(*values) for values in zip(*parts, strict=True)]
    owners = [torch.full_like(part.place, number) for number, part in enumerate(everyone)]
    joined = everyone[0]
    for part in everyone[1:]:
        joined = joined.cat(part)
    ranked, keep = joined.best(top.depth, top.by_patch)
    counts = torch.stack([tally.patches, tally.images])
    patches, images = all_reduce_sum(counts if source.divided or rank == 0 else torch.zeros_like(counts))
    return Found(ranked, torch.cat(owners, dim=1).gather(1, keep), top.vectors, grid, patches, images)


def refuse_non_finite(strange: NonFinite, source: Source) -> None:
    """Name the samples, of all ranks, whose features aren't finite.

    Raises:
        InputError: there are some.
    """
    count, ids = strange.found()
    told = all_gather_objects((count, [(i, source.describe(i).sample_id) for i in ids]))
    count = sum(number for number, _ in told)
    if count:
        names = [name for _, name in sorted((item for _, named in told for item in named), key=lambda item: item[0])]
        names = names[: len(strange.smallest)]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise InputError(
            f"NaN or infinite features in {count} samples: {listing(names, len(names))}{more}; expected finite ones; "
            "look at these images and at the weights; nothing was changed"
        )


def grid_of(cells: int, images: Tensor) -> tuple[int, int]:
    """(rows, columns) with rows * columns == cells, of the shape nearest to the images' (or to a square)."""
    height, width = images.shape[-2:] if images.ndim == 4 else (1, 1)
    shapes = [(rows, cells // rows) for rows in range(1, cells + 1) if cells % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def log_shapes(x_fu: Tensor, x_fu1: Tensor, use_local: bool) -> None:
    """Say what is read, and refuse features that aren't (batch, cells, channels)."""
    for name, features in (("x_fu1", x_fu1), ("x_fu", x_fu)):
        if features.ndim != 3:
            raise InputError(f"{name} has the shape {tuple(features.shape)}; expected (batch, cells, channels)")
    local, pooled = (f"(B, {f.shape[1]}, {f.shape[2]})" for f in (x_fu1, x_fu))
    if use_local:
        logger.info("  Using x_fu1 %s instead of x_fu %s", local, pooled)
    else:
        logger.info("  Using x_fu %s instead of x_fu1 %s", pooled, local)
