"""Growth: a class whose samples are badly covered gets another prototype, at the patch that helps them most."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.options import Allow
from protopush.push.protocol import Pushable, Slots, class_names_of, live_features_of
from protopush.push.reader import Reader, read_by_index, read_through
from protopush.push.resize.coverage import (
    ResizeReport,
    check_quantile,
    class_coverage,
    connections_of,
    own_similarity,
    scored_change,
    slot_mask,
    slots_of,
)
from protopush.push.resize.facility_location import Gain, Wish, coverage_after, find_gains
from protopush.push.update import POOLED, features_at, reset_moments


@dataclass(frozen=True)
class GrownPrototype:
    """One new prototype.

    Attributes:
        class_index, prototype: class and slot.
        gain: the sum over the worst covered samples of what it adds to their coverage (cosines).
        anchor: the patch that it is.
    """

    class_index: int
    prototype: int
    gain: float
    anchor: Anchor

    def __str__(self) -> str:
        patch = f"{self.anchor.file or self.anchor.sample_id} cell {self.anchor.cell}"
        return f"slot {self.prototype}: {patch}, gain {self.gain:.4f}"


@dataclass(frozen=True)
class GrowthReport(ResizeReport):
    """What growth did.

    Attributes:
        use_local, quantile, min_coverage, per_class, max_samples: as asked.
        classes: the coverage of each class, before and after.
        added: the new prototypes.
        verified: whether anchors are known to name the very patches.
        notes: why not, and what else is worth a warning.
        val_before, val_after: balanced_accuracy, auroc and ece on the validation images; None without a val_loader.
        seconds: time taken.
        class_names: of the model, where it has them.
    """

    min_coverage: float
    per_class: int
    max_samples: int
    added: list[GrownPrototype]
    verified: bool

    def __str__(self) -> str:
        title = (
            f"growth, coverage at quantile {self.quantile:g} below {self.min_coverage:g}: "
            f"{len(self.added)} prototypes added in {self.seconds:.1f} s"
        )
        title += "" if self.verified else " (anchors unverified)"
        return self._table(title, [(new.class_index, str(new)) for new in self.added])


def grow_prototypes(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: str | int | torch.device,
    *,
    per_class: int = 1,
    quantile: float = 0.1,
    min_coverage: float = 0.7,
    max_samples: int = 256,
    use_local: bool = True,
    allow: Allow | None = None,
    val_loader: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> GrowthReport:
    """Give badly covered classes another prototype, where they have a free slot.

    A sample's coverage is the best cosine of any of its patches to any prototype of its class. A class is badly covered
    where the ``quantile`` of its samples' coverage is below ``min_coverage``. Its new prototype is the patch, of its
    worst covered samples, that adds most to the sum of these samples' coverage: ``sum_s max(0, cos(s, patch) -
    coverage(s))``; equal patches are settled for the smaller sample id, then the smaller cell. With ``per_class`` above
    1 this is repeated while the class is badly covered.

    All data are read once; then the worst covered samples again, and the classes of more than ``max_samples`` that have
    grown, for the report. Memory: 4 * K + 16 bytes a sample, and the patches of the worst samples of 16
    classes (of all that grow, where the loader is a stream): 16 * ``max_samples`` * L * D * 4 bytes on each rank. The
    search costs (``max_samples`` * L)^2 * D multiplications a class. The result is the same for any batch size, order,
    number of workers and of ranks; nothing is changed if it fails. Under ``torch.distributed`` every rank must call it.

    Args:
        model: as for :func:`protopush.push_prototypes`, its manager with a ``valid_mask``; slots are free where
            ``max_prototypes`` is above ``num_prototypes``. A new prototype starts with its class's mean connection.
        dataloader: training images, as for the push.
        device: where the model is.
        per_class: new prototypes per class, at most.
        quantile: of the samples' coverage, in [0, 1].
        min_coverage: cosine, in [-1, 1].
        max_samples: of a class, that are searched for a new prototype: the worst covered ones.
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        allow: which patches may become prototypes: ids (B,) and grid (rows, columns) to bool (B, L), on the CPU.
        val_loader: validation images: the report then has the effect.
        optimizer: its moments of the new prototypes, and of their connections, are set to 0.

    Raises:
        InputError: non-finite features (the samples are named), labels without a class, a manager without
            ``valid_mask``, a stream that gives other samples when it is read again.

    Source: the greedy step for facility location (Nemhauser, Wolsey and Fisher, 1978), on patches.

    Example:
        >>> import protopush
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> head = protopush.HeadOptimal(6, num_classes=2, num_prototypes=1, embed_dim=6, max_prototypes=3)
        >>> class Net(nn.Module):
        ...     head = head
        ...     def extract_features(self, patches):
        ...         return patches.mean(1, keepdim=True), patches
        >>> data = TensorDataset(torch.randn(8, 9, 6), torch.tensor([0, 1] * 4))
        >>> report = grow_prototypes(Net(), DataLoader(data, batch_size=4, shuffle=True), "cpu", min_coverage=1.0)
        >>> [(new.class_index, new.prototype) for new in report.added], head.proto_manager.mask().sum(1).tolist()
        ([(0, 1), (1, 1)], [2, 2])
    """
    started = time.perf_counter()
    wish = Wish(per_class, quantile, min_coverage, max_samples, use_local, allow)
    _check(wish)
    net, slots = slots_of(model, device, "grow")
    live = live_features_of(net) is not None
    with preserve_state(model, dataloader, val_loader):
        source: Reader = read_by_index(dataloader) if live else read_through(dataloader)
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        gains, why = find_gains(net, source, slots, before, wish)
        coverage, runner_ups = coverage_after(net, source, slots, before, gains, wish)
        anchors = [
            Anchor.at(gain.origin, gain.cell, gain.grid, verified=source.verified, runner_up=runner_up)
            for gain, runner_up in zip(gains, runner_ups, strict=True)
        ]
        new = _New(net, slots, gains, anchors, use_local)
        features = new.features(source) if live and gains else None
        val_before, val_after = scored_change(
            model, net, slots, val_loader, (lambda: new.move_in(features)) if gains else None
        )
    if optimizer is not None and gains:
        new.reset_moments(optimizer)
    notes = [source.note] if source.note else []
    if why and not bool(((slots.rows >= 0) & ~slots.used).any()):
        notes.append("no class has a free slot: make the head with max_prototypes above num_prototypes")
    grown = Slots.of(net.head.proto_manager)
    report = GrowthReport(
        use_local=use_local,
        quantile=quantile,
        min_coverage=min_coverage,
        per_class=per_class,
        max_samples=max_samples,
        classes=class_coverage((slots, grown), before.labels, (before.coverage(), coverage), quantile, why),
        added=[GrownPrototype(g.class_index, g.slot, g.gain, a) for g, a in zip(gains, anchors, strict=True)],
        verified=source.verified,
        notes=notes,
        val_before=val_before,
        val_after=val_after,
        seconds=time.perf_counter() - started,
        class_names=class_names_of(net, len(slots.rows)),
    )
    report.log()
    return report


def _check(wish: Wish) -> None:
    for name in ("per_class", "max_samples"):
        if getattr(wish, name) < 1:
            raise InputError(f"{name} is {getattr(wish, name)}; expected at least 1")
    check_quantile(wish.quantile)
    if not -1.0 <= wish.min_coverage <= 1.0:
        raise InputError(f"min_coverage is {wish.min_coverage}; expected a cosine, -1 to 1, such as 0.7")


class _New:
    """New prototypes, and what belongs to each: vector, mask, anchor, stored features, connection, moments."""

    def __init__(self, net: Pushable, slots: Slots, gains: list[Gain], anchors: list[Anchor], use_local: bool) -> None:
        self.net, self.slots, self.gains, self.anchors = net, slots, gains, anchors
        self.manager: Any = net.head.proto_manager
        index = partial(torch.tensor, dtype=torch.int64, device=slots.rows.device)
        self.classes, self.places = index([g.class_index for g in gains]), index([g.slot for g in gains])
        self.rows = slots.rows[self.classes, self.places]
        self.ids = index([g.sample for g in gains])
        self.cells = index([g.cell if use_local else POOLED for g in gains])

    def features(self, source: Reader) -> Tensor:
        """The backbone's features at the new live anchors, (G, C), the same on every rank."""
        every_id = torch.full_like(self.manager.anchor_ids, -1)
        every_cell = torch.zeros_like(self.manager.anchor_cells)
        every_id[self.rows], every_cell[self.rows] = self.ids, self.cells
        samples = sorted(set(self.ids.tolist()))
        return features_at(self.net, source, samples, every_id, every_cell, self.rows.device)[self.rows]

    def move_in(self, features: Tensor | None) -> None:
        """Put them into their slots; a connection starts as the mean of its class's."""
        manager, rows = self.manager, self.rows
        vectors = torch.stack([gain.unit for gain in self.gains]).to(rows.device)
        if features is not None:
            manager.anchor_features[rows] = features.to(manager.anchor_features.dtype)
            manager.anchor_ids[rows], manager.anchor_cells[rows] = self.ids, self.cells
            vectors = self.net.head.proj(manager.anchor_features[rows])
        unit = F.normalize(vectors.to(self.slots.unit.dtype), dim=-1)
        manager.prototypes.data[rows] = unit.to(manager.prototypes.dtype)
        slot_mask(manager, "grow")[rows] = True
        if getattr(manager, "anchors", None) is not None:
            for row, anchor in zip(rows.tolist(), self.anchors, strict=True):
                manager.anchors[row] = anchor
        connections = connections_of(self.net, self.slots)
        if connections is not None:
            for c, k in zip(self.classes.tolist(), self.places.tolist(), strict=True):
                if self.slots.used[c].any():
                    connections.data[c, k] = connections.data[c][self.slots.used[c]].mean()

    def reset_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimiser's moments of the new prototypes and of their connections."""
        reset_moments(optimizer, self.manager.prototypes, self.rows)
        connections = connections_of(self.net, self.slots)
        if connections is not None:
            reset_moments(optimizer, connections, self.classes, self.places)
