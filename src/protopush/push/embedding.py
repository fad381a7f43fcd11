"""Embedded samples: the batches of a reader in the embedding space, and how well prototypes cover the samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protopush.data.regions import Regions
from protopush.distributed import all_gather_objects, raising_on_all_ranks
from protopush.errors import InputError, listing
from protopush.push.protocol import Pushable, Slots
from protopush.push.push_report import ClassCoverage
from protopush.push.reader import Reader, check_labels
from protopush.push.top_candidates import NO_ID, TIE

logger = logging.getLogger("protopush.push")


class Embedded(NamedTuple):
    """A batch of samples, on the model's device but for labels and ids.

    Attributes:
        labels, ids: int64 (B,), on the CPU.
        features: (B, L, C), the patches, or the pooled feature alone.
        embeddings: float32 (B, L, D), of any norm.
        norm: float32 (B, L), their norms.
        valid: bool (B, L), embeddings that have a direction.
        regions: of the L patches.
    """

    labels: Tensor
    ids: Tensor
    features: Tensor
    embeddings: Tensor
    norm: Tensor
    valid: Tensor
    regions: Regions

    def unit(self) -> Tensor:
        """The embeddings with unit norm; 0 where one has no direction."""
        unit = self.embeddings / self.norm.unsqueeze(2)
        return torch.where(self.valid.unsqueeze(2), unit, torch.zeros_like(unit))


@contextmanager
def embedded(net: Pushable, reader: Reader, use_local: bool) -> Iterator[Iterator[Embedded]]:
    """This rank's batches, embedded; nothing in the loop waits for the device, and it must not call collectives.

    Raises:
        InputError: on every rank, whatever went wrong on one of them; samples that aren't finite are named at the end.
    """
    manager = net.head.proto_manager
    device, classes = manager.prototypes.device, len(manager.get_prototype_indices())
    bad = NonFinite(device)

    def batches() -> Iterator[Embedded]:
        for number, (images, labels, ids) in enumerate(reader.batches()):
            check_labels(labels, ids, classes)
            pooled, patches = net.extract_features(images.to(device, non_blocking=True))
            if number == 0:
                log_shapes(pooled, patches, use_local)
            features = patches if use_local else pooled
            embeddings = net.head.proj(features).float()
            norm = torch.linalg.vector_norm(embeddings, dim=2)
            bad.update(norm, ids.to(device, non_blocking=True))
            regions = regions_of(net, images, patches.shape[1], use_local)
            yield Embedded(labels, ids, features, embeddings, norm, norm.isfinite() & (norm > 0), regions)

    with raising_on_all_ranks():
        yield batches()
    refuse_non_finite(bad, reader)


class NonFinite:
    """Remembers, without waiting for the device, the smallest ids of samples with NaN or infinite features.

    With ``first_batch_only``, later batches don't count: in training they are bad for the first one's sake.
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
    """Raise an :class:`InputError` that names the samples, of all ranks, whose features aren't finite."""
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


def regions_of(net: Pushable, images: Tensor, count: int, use_local: bool = True) -> Regions:
    """Where ``count`` patches of images lie: as the module says, else guessed to be the cells of a grid.

    The guess is a grid of the shape nearest to the images' (or to a square), each cell of which sees the whole image.
    """
    own: Callable[[Tensor], Regions | None] | None = getattr(net, "regions_of", None)
    regions = own(images) if own else None
    if regions is None:
        size = (images.shape[2], images.shape[3]) if images.ndim == 4 else None
        height, width = size or (1, 1)
        shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
        grid = min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))
        regions = Regions.grid(grid, size or grid)
    if use_local and len(regions) != count:
        raise InputError(f"{count} patches, but the model says where {len(regions)} lie; expected as many")
    return regions if use_local else Regions.whole(regions.size)


def log_shapes(pooled: Tensor, patches: Tensor, use_local: bool) -> None:
    """Log what is read, under the names of the protocol, and refuse features that aren't (batch, cells, channels)."""
    shapes = []
    for name, features in (("x_fu1", patches), ("x_fu", pooled)):
        if features.ndim != 3:
            raise InputError(f"{name} has the shape {tuple(features.shape)}; expected (batch, cells, channels)")
        shapes.append(f"{name} (B, {features.shape[1]}, {features.shape[2]})")
    logger.info("  Using %s instead of %s", *(shapes if use_local else reversed(shapes)))


class OwnSimilarity(NamedTuple):
    """What the prototypes of its class find in each sample, all on the CPU.

    Attributes:
        ids: int64 (N,), ascending, each once. Samples without a patch that has a direction are left out.
        labels: int64 (N,).
        best: float32 (N, K), the best cosine of each prototype over the patches; -inf in slots that aren't in use.
    """

    ids: Tensor
    labels: Tensor
    best: Tensor

    def coverage(self) -> Tensor:
        """The best cosine over the prototypes, (N,); -1, the lowest there is, where a class has none."""
        return self.best.amax(dim=1).clamp(min=-1.0)


def own_similarity(net: Pushable, source: Reader, unit: Tensor, used: Tensor, use_local: bool) -> OwnSimilarity:
    """One pass over the samples; what is kept is 4 * K + 16 bytes a sample, the same on every rank.

    The prototypes are ``unit`` (C, K, D), of unit norm; those count that are ``used``, bool (C, K).

    Raises:
        InputError: as :func:`embedded`, or there is no batch.
    """
    unit = unit.float()
    parts: list[tuple[Tensor, ...]] = []
    with embedded(net, source, use_local) as batches:
        for batch in batches:
            own = batch.labels.to(unit.device, non_blocking=True)
            cosine = unit[own] @ batch.unit().transpose(1, 2)  # (B, K, L)
            ignored = ~(batch.valid.unsqueeze(1) & used[own].unsqueeze(2))
            best = cosine.masked_fill(ignored, -torch.inf).amax(dim=2)
            parts.append((batch.ids, batch.labels, best, batch.valid.any(dim=1)))
    here = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    of_ranks = [part for part in all_gather_objects(here) if part]
    if not of_ranks:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    ids, labels, best, has_patch = (torch.cat(part) for part in zip(*of_ranks, strict=True))
    # Streams may repeat a sample (a padded shard): it counts once.
    rows = torch.from_numpy(np.unique(ids.numpy(), return_index=True)[1])
    rows = rows[has_patch[rows]]
    return OwnSimilarity(ids[rows], labels[rows], best[rows])


def quantile_of(coverage: Tensor, quantile: float) -> float | None:
    """The quantile of the coverage of a class's samples (n,), with linear interpolation; None without a sample."""
    return float(np.quantile(coverage.double().numpy(), quantile)) if len(coverage) else None


def check_quantile(quantile: float) -> None:
    """Raise an :class:`InputError` for what is no quantile."""
    if not 0.0 <= quantile <= 1.0:
        raise InputError(f"quantile is {quantile}; expected 0 (the worst sample) to 1, such as 0.1")


def in_order(values: Tensor, numbers: Tensor, tie: float = TIE) -> Tensor:
    """The order of values (n,) from the smallest, where values closer than ``tie`` go by their number (n,).

    Example:
        >>> in_order(torch.tensor([0.5, 0.1, 0.1 + 1e-7]), torch.tensor([7, 9, 8]))
        tensor([2, 1, 0])
    """
    plain, order = values.double().numpy(), values.double().argsort(stable=True).numpy()
    level = np.cumsum(np.diff(plain[order], prepend=plain[order][:1]) > tie)
    return torch.from_numpy(order[np.lexsort((numbers.numpy()[order], level))])


def class_coverage(
    net: Pushable, slots: Slots, before: OwnSimilarity, coverage: Tensor, quantile: float, why: Mapping[int, str]
) -> list[ClassCoverage]:
    """How well each class was covered, with ``slots``, and is now, with ``coverage`` (N,); ``why`` has the notes."""
    now, found = Slots.of(net.head.proto_manager).used, []
    states = before.coverage(), coverage
    for c, rows in enumerate(slots.rows):
        own = before.labels == c
        counts = int(own.sum()), int(slots.used[c].sum()), int(now[c].sum()), int((rows >= 0).sum())
        old, new = (quantile_of(values[own], quantile) for values in states)
        found.append(ClassCoverage(c, *counts, old, new, why.get(c, "")))
    return found
