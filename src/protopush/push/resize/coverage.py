"""Coverage of the samples by the prototypes of their class, and the frame that growth and pruning share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from protopush.distributed import all_gather_objects, raise_on_all_ranks
from protopush.errors import InputError
from protopush.push.guard import Score, Validation
from protopush.push.nearest_patches import NonFinite, grid_of, log_shapes, refuse_non_finite
from protopush.push.protocol import PrototypeOwner, Pushable, Slots, live_features_of, resolve_device, unwrap
from protopush.push.reader import Batch, Reader, check_labels
from protopush.push.top_candidates import TIE

logger = logging.getLogger("protopush.push")


@dataclass(frozen=True)
class ClassCoverage:
    """How well one class is covered; a sample's coverage is its best cosine to a prototype of its class, [-1, 1].

    Attributes:
        class_index: from 0.
        samples: how many were read.
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


@dataclass(frozen=True)
class ResizeReport:
    """What reports of growth and of pruning have in common; their docstrings describe it."""

    use_local: bool
    quantile: float
    classes: list[ClassCoverage]
    notes: list[str]
    val_before: Score | None
    val_after: Score | None
    seconds: float
    class_names: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def log(self) -> None:
        """Warn of the notes, and log the first line."""
        for note in self.notes:
            logger.warning("%s", note)
        logger.info("%s", str(self).splitlines()[0])

    def _table(self, title: str, changes: Iterable[tuple[int, str]]) -> str:
        """The title, a table of the classes with the changes (class, text) of each beside it, notes and validation."""
        lines = [title, f"{'class':<20} {'samples':>7} {'prototypes':>12} {'before':>7} {'after':>7}"]
        changes = list(changes)
        for c in self.classes:
            name = self.class_names[c.class_index] if self.class_names else f"Class {c.class_index}"
            count = f"{c.prototypes_before} -> {c.prototypes_after}/{c.slots}"
            figures = (f"{'-' if value is None else format(value, '.4f'):>7}" for value in (c.before, c.after))
            row = f"{name[:20]:<20} {c.samples:>7} {count:>12} {' '.join(figures)}"
            beside = [text for number, text in changes if number == c.class_index] + ([c.note] if c.note else [])
            lines.append("  ".join([row, *beside[:1]]))
            lines += [" " * len(row) + "  " + text for text in beside[1:]]
        effect = "not measured (no val_loader)"
        if self.val_before is not None and self.val_after is not None:
            scores = [(name, old, self.val_after[name]) for name, old in self.val_before.items()]
            effect = ", ".join(
                f"{name} -" if old is None or new is None else f"{name} {old:.3f} -> {new:.3f}"
                for name, old, new in scores
            )
        return "\n".join([*lines, *self.notes, f"validation: {effect}"])


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


def read_embedded(
    net: Pushable, source: Reader, batches: Iterable[Batch], use_local: bool, keep: Callable[[Embedded], None]
) -> None:
    """Embed this rank's batches and hand each to ``keep``.

    Raises:
        InputError: on every rank, whatever went wrong on one of them; samples that aren't finite are named.
    """
    device = net.head.proto_manager.prototypes.device
    classes = len(net.head.proto_manager.get_prototype_indices())
    non_finite = NonFinite(device)

    def read() -> None:
        for number, (images, labels, ids) in enumerate(batches):
            check_labels(labels, ids, classes)
            pooled, patches = net.extract_features(images.to(device, non_blocking=True))
            if number == 0:
                log_shapes(pooled, patches, use_local)
            features = patches if use_local else pooled
            vectors = net.head.proj(features).float()
            norm = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
            non_finite.update(norm, ids.to(device, non_blocking=True))
            valid = norm.isfinite() & (norm > 0)
            unit = torch.where(valid, vectors / norm, torch.zeros_like(vectors))
            grid = grid_of(features.shape[1], images) if use_local else (1, 1)
            keep(Embedded(unit, valid.squeeze(2), labels, ids, grid))

    raise_on_all_ranks(read)
    refuse_non_finite(non_finite, source)


def own_similarity(net: Pushable, source: Reader, unit: Tensor, used: Tensor, use_local: bool) -> OwnSimilarity:
    """One pass over the samples; what is kept is 4 * K + 16 bytes a sample, the same on every rank.

    Args:
        net, source: model and data.
        unit: (C, K, D), prototypes of unit norm.
        used: bool (C, K), those that count.
        use_local: patches, or the pooled feature.

    Raises:
        InputError: as :func:`read_embedded`, or there is no batch.
    """
    unit = unit.float()
    parts: list[tuple[Tensor, ...]] = []

    def keep(batch: Embedded) -> None:
        own = batch.labels.to(unit.device, non_blocking=True)
        cosine = unit[own] @ batch.unit.transpose(1, 2)  # (B, K, L)
        ignored = ~(batch.valid.unsqueeze(1) & used[own].unsqueeze(2))
        best = cosine.masked_fill(ignored, -torch.inf).amax(dim=2)
        parts.append((batch.ids, batch.labels, best, batch.valid.any(dim=1)))

    read_embedded(net, source, source.batches(), use_local, keep)
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
    slots: tuple[Slots, Slots],
    labels: Tensor,
    coverage: tuple[Tensor, Tensor],
    quantile: float,
    notes: Mapping[int, str],
) -> list[ClassCoverage]:
    """One entry a class; ``slots`` and ``coverage`` (N,) are those before and after."""
    found = []
    for c, rows in enumerate(slots[0].rows):
        own, (used, used_after) = labels == c, (int(state.used[c].sum()) for state in slots)
        before, after = (quantile_of(values[own], quantile) for values in coverage)
        room, samples = int((rows >= 0).sum()), int(own.sum())
        found.append(ClassCoverage(c, samples, used, used_after, room, before, after, notes.get(c, "")))
    return found


def slots_of(model: nn.Module, device: str | int | torch.device, purpose: str) -> tuple[Pushable, Slots]:
    """The module behind its wrappers, and its prototypes as they are now.

    Raises:
        InputError: the model is on another device, or its prototypes can neither come nor go.
    """
    net = unwrap(model)
    resolve_device(net, device)
    slot_mask(net.head.proto_manager, purpose)
    if live_features_of(net) is not None:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    return net, Slots.of(net.head.proto_manager)


def slot_mask(manager: PrototypeOwner, purpose: str) -> Tensor:
    """The manager's ``valid_mask``, flat (S,), to be written to.

    Raises:
        InputError: it has none, so that every slot is in use for ever.
    """
    mask = getattr(manager, "valid_mask", None)
    if not isinstance(mask, Tensor):
        raise InputError(
            f"{type(manager).__name__} has no valid_mask, so that its prototypes cannot {purpose}; expected a bool "
            "tensor of the slots in use, as protopush.PrototypeManager has"
        )
    return mask.view(-1)


def connections_of(net: Pushable, slots: Slots) -> Tensor | None:
    """The head's weight of each prototype, (C, K), where it has such a parameter beside ``weights()``."""
    found = getattr(net.head, "connections", None)
    is_one = isinstance(found, Tensor) and found.shape == slots.rows.shape and hasattr(type(net.head), "weights")
    return found if is_one else None


def scored_change(
    model: nn.Module, net: Pushable, slots: Slots, val_loader: Iterable[Any] | None, change: Callable[[], None] | None
) -> tuple[Score | None, Score | None]:
    """Make a change (None: there is none) to the prototypes; the validation scores before and after it.

    Where the change or its measurement fails, every bit of the prototypes, and of what belongs to them, is put back.
    """
    validation = None if val_loader is None else Validation(model, net, val_loader, slots.rows.device)
    before = after = None if validation is None else validation.score()
    if change is None:
        return before, after
    manager: Any = net.head.proto_manager
    names = ("prototypes", "valid_mask", "anchor_features", "anchor_ids", "anchor_cells")
    written = [getattr(manager, name, None) for name in names] + [connections_of(net, slots)]
    saved = [(target, target.detach().clone()) for target in written if target is not None]
    anchors = getattr(manager, "anchors", None)
    saved_anchors = list(anchors or ())
    try:
        change()
        return before, None if validation is None else validation.score()
    except BaseException:
        for target, values in saved:
            target.data.copy_(values)
        if anchors is not None:
            anchors[:] = saved_anchors
        raise
