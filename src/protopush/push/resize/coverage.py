"""How well prototypes cover the samples of their own class: what growth and pruning decide by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protopush.distributed import all_gather_objects, raise_on_all_ranks
from protopush.errors import InputError
from protopush.push.guard import Score
from protopush.push.nearest_patches import NonFinite, grid_of, log_shapes, refuse_non_finite
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import Batch, Reader, check_labels
from protopush.push.top_candidates import TIE


@dataclass(frozen=True)
class ClassCoverage:
    """How well one class is covered; a sample's coverage is its best cosine to a prototype of its class, [-1, 1].

    Attributes:
        class_index: from 0.
        samples: how many were looked at.
        prototypes_before, prototypes_after: in use.
        slots: of the class, in use or free.
        before, after: the quantile of the samples' coverage; None without a sample.
        note: why nothing was done where something was called for.
    """

    class_index: int
    samples: int
    prototypes_before: int
    prototypes_after: int
    slots: int
    before: float | None
    after: float | None
    note: str = ""


class Embedded(NamedTuple):
    """A batch of samples; embeddings on the model's device, labels and ids on the CPU.

    Attributes:
        unit: float32 (B, L, D), unit norm; 0 where an embedding has no direction.
        valid: bool (B, L), embeddings that have one.
        labels, ids: int64 (B,).
        grid: (rows, columns) of the L patches.
    """

    unit: Tensor
    valid: Tensor
    labels: Tensor
    ids: Tensor
    grid: tuple[int, int]


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


def embedded(
    net: Pushable, batches: Iterable[Batch], use_local: bool, classes: int, strange: NonFinite
) -> Iterator[Embedded]:
    """Embed batches; samples that aren't finite are left to ``strange`` to tell of."""
    device = net.head.proto_manager.prototypes.device
    for number, (images, labels, ids) in enumerate(batches):
        check_labels(labels, ids, classes)
        x_fu, x_fu1 = net.extract_features(images.to(device, non_blocking=True))
        if number == 0:
            log_shapes(x_fu, x_fu1, use_local)
        features = x_fu1 if use_local else x_fu
        vectors = net.head.proj(features).float()
        norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
        strange.update(norm, ids.to(device, non_blocking=True))
        valid = norm.isfinite() & (norm > 0)
        unit = torch.where(valid, vectors / norm, torch.zeros_like(vectors))
        grid = grid_of(features.shape[1], images) if use_local else (1, 1)
        yield Embedded(unit, valid.squeeze(2), labels, ids, grid)


def own_similarity(net: Pushable, source: Reader, unit: Tensor, used: Tensor, use_local: bool) -> OwnSimilarity:
    """One pass over the samples; what is kept is 4 * K + 16 bytes a sample, the same on every rank.

    Args:
        net, source: model and data.
        unit: (C, K, D), prototypes of unit norm.
        used: bool (C, K), those that count.
        use_local: patches, or the pooled feature.

    Raises:
        InputError: on every rank, whatever went wrong on one of them.
    """
    unit = unit.float()
    strange = NonFinite(unit.device)
    parts: list[tuple[Tensor, ...]] = []

    def read() -> None:
        for batch in embedded(net, source.batches(), use_local, len(used), strange):
            own = batch.labels.to(unit.device, non_blocking=True)
            cosine = unit[own] @ batch.unit.transpose(1, 2)  # (B, K, L)
            ignored = ~(batch.valid.unsqueeze(1) & used[own].unsqueeze(2))
            best = cosine.masked_fill(ignored, -torch.inf).amax(dim=2)
            parts.append((batch.ids, batch.labels, best, batch.valid.any(dim=1)))

    raise_on_all_ranks(read)
    refuse_non_finite(strange, source)
    here = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    told = [part for part in all_gather_objects(here) if part]
    if not told:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    ids, labels, best, there = (torch.cat(part) for part in zip(*told, strict=True))
    # Streams may repeat a sample (a padded shard): it counts once.
    _, first = np.unique(ids.numpy(), return_index=True)
    rows = torch.from_numpy(first)
    rows = rows[there[rows]]
    return OwnSimilarity(ids[rows], labels[rows], best[rows])


def quantile_of(coverage: Tensor, quantile: float) -> float | None:
    """The quantile of the coverage of a class's samples (n,), with linear interpolation; None without a sample."""
    return float(np.quantile(coverage.double().numpy(), quantile)) if len(coverage) else None


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
    slots: tuple[Slots, Slots],
    labels: Tensor,
    coverage: tuple[Tensor, Tensor],
    quantile: float,
    notes: Mapping[int, str],
) -> list[ClassCoverage]:
    """One line a class; ``slots`` and ``coverage`` (N,) are those before and after."""
    found = []
    for c in range(len(slots[0].rows)):
        before, after = (quantile_of(values[labels == c], quantile) for values in coverage)
        used = [int(there.used[c].sum()) for there in slots]
        room, samples = int((slots[0].rows[c] >= 0).sum()), int((labels == c).sum())
        found.append(ClassCoverage(c, samples, used[0], used[1], room, before, after, notes.get(c, "")))
    return found


def effect(before: Score | None, after: Score | None) -> str:
    """What a change did to the validation metrics, in one line."""
    if before is None or after is None:
        return "validation: not measured (no val_loader)"
    told = []
    for name, old in before.items():
        new = after[name]
        told.append(f"{name} -" if old is None or new is None else f"{name} {old:.3f} -> {new:.3f}")
    return "validation: " + ", ".join(told)


def coverage_lines(classes: list[ClassCoverage], names: list[str], told: dict[int, list[str]]) -> list[str]:
    """A table of the classes; ``told`` are more lines of a class."""
    lines = [f"{'class':<20} {'samples':>7} {'prototypes':>12} {'before':>7} {'after':>7}"]
    for c in classes:
        name = names[c.class_index] if names else f"Class {c.class_index}"
        count = f"{c.prototypes_before} -> {c.prototypes_after}/{c.slots}"
        figures = (f"{'-' if value is None else format(value, '.4f'):>7}" for value in (c.before, c.after))
        head = f"{name[:20]:<20} {c.samples:>7} {count:>12} {' '.join(figures)}"
        more = [*told.get(c.class_index, []), *([c.note] if c.note else [])]
        lines.append(f"{head}  {more[0]}" if more else head)
        lines += [" " * len(head) + "  " + line for line in more[1:]]
    return lines
