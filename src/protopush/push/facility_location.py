"""Greedy facility location: the patches that, as new prototypes, improve the coverage of their class most.

The sum over a class's samples of their best cosine to any prototype is a submodular function of the set of prototypes:
a patch adds less the more prototypes there are. So taking, again and again, the patch that adds most comes within a
factor 1 - 1/e of the best set (Nemhauser, Wolsey and Fisher, 1978). Every patch of the worst covered samples is a
candidate, and its cosines to all of these samples are computed once; after each choice the coverage of a sample is the
larger of what it was and its cosine to the chosen patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from protopush.data.dataset import Provenance
from protopush.data.regions import Regions
from protopush.distributed import all_gather_objects
from protopush.errors import InputError, listing
from protopush.push.embedding import OwnSimilarity, embedded, in_order, own_similarity, quantile_of
from protopush.push.options import Allow
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import DatasetReader, Reader, describe_all
from protopush.push.top_candidates import TIE

CLASSES_AT_ONCE = 16  # whose patches are in memory
BLOCK = 2**22  # cosines computed at a time


class Wish(NamedTuple):
    """What growth is asked for; see :func:`protopush.grow_prototypes`."""

    per_class: int
    quantile: float
    min_coverage: float
    max_samples: int
    use_local: bool
    allow: Allow | None

    def badly_covered(self, coverage: Tensor) -> bool:
        """From the coverage of a class's samples (n,)."""
        level = quantile_of(coverage, self.quantile)
        return level is not None and level < self.min_coverage - TIE


class Gain(NamedTuple):
    """A patch that becomes a prototype.

    Attributes:
        class_index, slot: where to.
        sample, cell, regions, origin: the patch.
        gain: what it adds to the sum of the coverage of ``ids``.
        unit: (D,), its embedding.
        ids, reach: (n,), the worst covered samples, ascending, and their best cosines to it.
    """

    class_index: int
    slot: int
    sample: int
    cell: int
    regions: Regions
    gain: float
    unit: Tensor
    ids: Tensor
    reach: Tensor
    origin: Provenance


class _Sample(NamedTuple):
    """unit (L, D); valid, allowed: bool (L,); all on the CPU."""

    unit: Tensor
    valid: Tensor
    allowed: Tensor
    label: int
    regions: Regions


def find_gains(
    net: Pushable, source: Reader, slots: Slots, before: OwnSimilarity, wish: Wish
) -> tuple[list[Gain], dict[int, str]]:
    """The new prototypes, the same on every rank, and why a badly covered class gets none."""
    free = ((slots.rows >= 0) & ~slots.used).cpu()
    coverage, why = before.coverage(), dict[int, str]()
    worst: dict[int, Tensor] = {}  # of each class that may grow, the rows of its worst covered samples
    for c in range(len(free)):
        rows = (before.labels == c).nonzero().flatten()
        if not wish.badly_covered(coverage[rows]):
            continue
        if free[c].any():
            ranked = in_order(coverage[rows], before.ids[rows])[: wish.max_samples]
            worst[c] = rows[ranked].sort().values
        else:
            why[c] = "badly covered, no free slot"
    gains: list[Gain] = []
    # A stream can only be read as a whole: once is enough.
    step = CLASSES_AT_ONCE if isinstance(source, DatasetReader) else max(1, len(worst))
    classes = list(worst)
    for start in range(0, len(classes), step):
        gains += _gains_of(net, source, before, {c: worst[c] for c in classes[start : start + step]}, free, wish)
    grown = {gain.class_index for gain in gains}
    return gains, why | {c: "badly covered, no patch helps" for c in worst if c not in grown}


def _gains_of(
    net: Pushable, source: Reader, before: OwnSimilarity, worst: dict[int, Tensor], free: Tensor, wish: Wish
) -> list[Gain]:
    """The gains of some classes."""
    samples, read_here = _read_again(net, source, before, torch.cat(list(worst.values())), wish)
    device, coverage = net.head.proto_manager.prototypes.device, before.coverage()
    gains: list[Gain] = []
    for c, rows in worst.items():
        own, ids = (before.labels == c).nonzero().flatten(), before.ids[rows]
        patches = [samples[i] for i in ids.tolist()]
        slots = free[c].nonzero().flatten().tolist()[: wish.per_class]
        best = _best_patches(patches, coverage[own], torch.isin(own, rows), len(slots), wish, device)
        for slot, (row, cell, gain, reach) in zip(slots, best, strict=False):
            one, i = patches[row], int(ids[row])
            gains.append(Gain(c, slot, i, cell, one.regions, gain, one.unit[cell].clone(), ids, reach, Provenance(i)))
    gains = all_gather_objects(gains)[0]  # other hardware may round otherwise: all take those of one rank
    origins = describe_all(source, read_here & {one.sample for one in gains})
    return [one._replace(origin=origins[one.sample]) for one in gains]


def _read_again(
    net: Pushable, source: Reader, before: OwnSimilarity, rows: Tensor, wish: Wish
) -> tuple[dict[int, _Sample], set[int]]:
    """The patches of some samples, on every rank, and the samples that this rank has read."""
    label_of = dict(zip(before.ids[rows].tolist(), before.labels[rows].tolist(), strict=True))
    here: dict[int, _Sample] = {}
    with embedded(net, source.subset(sorted(label_of)), wish.use_local) as batches:
        for batch in batches:
            allowed = batch.valid
            if wish.allow is not None:
                allowed = allowed & wish.allow(batch.ids, batch.regions).to(allowed.device)
            tensors = batch.unit(), batch.valid, allowed
            for row, number in enumerate(batch.ids.tolist()):
                if number in label_of:  # copies: a view would keep its whole batch in memory
                    unit, valid, may = (part[row].to("cpu", copy=True) for part in tensors)
                    here[number] = _Sample(unit, valid, may, int(batch.labels[row]), batch.regions)
    of_all = {number: sample for of_rank in reversed(all_gather_objects(here)) for number, sample in of_rank.items()}
    other = [i for i, label in sorted(label_of.items()) if i not in of_all or of_all[i].label != label]
    if other:
        raise InputError(
            f"read again, the loader has no sample {listing(other, 5)} of the same label; expected the same samples "
            "each time: give a DataLoader over a dataset, or a list of (images, labels, ids); nothing was changed"
        )
    return of_all, set(here)


def _best_patches(
    samples: list[_Sample], coverage: Tensor, worst: Tensor, limit: int, wish: Wish, device: torch.device
) -> list[tuple[int, int, float, Tensor]]:
    """The patches of one class that help most, each after the ones before it: (row, cell, gain, reach).

    Args:
        samples: the worst covered ones, n of them, by ascending id.
        coverage: (m,) of all samples of the class, by ascending id.
        worst: bool (m,), where the n are among them.
        limit: the most to find.
    """
    tensors = list(zip(*samples, strict=True))[:3]  # cells may differ in number
    unit, valid, allowed = (pad_sequence(list(part), batch_first=True) for part in tensors)
    candidates = allowed.nonzero()  # (P, 2): sample and cell, in the order that settles ties
    reach = _reach(unit.to(device), valid.to(device), candidates.to(device))
    coverage = coverage.clone()
    tie = TIE * len(samples)
    found: list[tuple[int, int, float, Tensor]] = []
    while len(candidates) and len(found) < limit and wish.badly_covered(coverage):
        gains = (reach - coverage[worst]).clamp(min=0).sum(dim=1, dtype=torch.float64)
        first = int((gains >= gains.max() - tie).to(torch.uint8).argmax())
        if gains[first] <= tie:
            break
        row, cell = candidates[first].tolist()
        found.append((row, cell, float(gains[first]), reach[first].clone()))
        coverage[worst] = torch.maximum(coverage[worst], reach[first])
    return found


def _reach(unit: Tensor, valid: Tensor, candidates: Tensor) -> Tensor:
    """The best cosine of each sample to each candidate, (P, n), on the CPU.

    Args:
        unit: (n, L, D), the samples' patches.
        valid: bool (n, L), those that count, at least one of each sample.
        candidates: int64 (P, 2), sample and cell.
    """
    chosen = unit[candidates[:, 0], candidates[:, 1]]
    # A patch that doesn't count is replaced by one that does: no maximum changes, and nothing need be masked.
    other = unit[torch.arange(len(unit), device=unit.device), valid.to(torch.uint8).argmax(dim=1)]
    every = torch.where(valid.unsqueeze(2), unit, other.unsqueeze(1))
    # Cells before samples: the maximum then runs over whole rows, which is twice as fast.
    every = every.transpose(0, 1).flatten(0, 1)
    reach = torch.empty(len(chosen), len(unit))
    size = max(1, BLOCK // len(every))
    for start in range(0, len(chosen), size):
        cosine = chosen[start : start + size] @ every.T
        reach[start : start + size] = cosine.view(len(cosine), unit.shape[1], len(unit)).amax(dim=1)
    return reach


def coverage_after(
    net: Pushable, source: Reader, slots: Slots, before: OwnSimilarity, gains: list[Gain], wish: Wish
) -> tuple[Tensor, list[float | None]]:
    """The samples' coverage (N,) with the new prototypes; and, of each, its best cosine in any other sample.

    The choice knows the cosines of the worst covered samples alone: classes that have more are read once more.
    """
    coverage, runner_ups = before.coverage(), list[float | None]()
    large = {gain.class_index for gain in gains if int((before.labels == gain.class_index).sum()) > wish.max_samples}
    unit, new = slots.unit.clone(), torch.zeros_like(slots.used)
    for gain in gains:
        unit[gain.class_index, gain.slot], new[gain.class_index, gain.slot] = gain.unit.to(unit), True
    again = own_similarity(net, source.of_classes(large), unit, new, wish.use_local) if large else before
    for gain in gains:
        own = before.labels == gain.class_index
        reach, ids = gain.reach, gain.ids
        if gain.class_index in large:
            of_class = again.labels == gain.class_index
            reach, ids = again.best[of_class, gain.slot], again.ids[of_class]
        if not torch.equal(ids, before.ids[own]):
            raise InputError(
                "read again, the loader gives other samples; expected the same each time: give a DataLoader over a "
                "dataset, or a list of (images, labels, ids); nothing was changed"
            )
        coverage[own] = torch.maximum(coverage[own], reach)
        others = reach[ids != gain.sample]
        runner_ups.append(float(others.max()) if len(others) else None)
    return coverage, runner_ups
