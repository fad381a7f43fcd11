"""Growth: a class whose samples are badly covered gets another prototype, at the patch that helps them most."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.embedding import check_quantile, class_coverage, own_similarity
from protopush.push.facility_location import Gain, Wish, coverage_after, find_gains
from protopush.push.guard import scored_change
from protopush.push.options import Allow
from protopush.push.protocol import Pushable, Slots, class_names_of, connections_of, live_features_of, resizable
from protopush.push.push_report import GrownPrototype, GrowthReport
from protopush.push.reader import Reader, read_by_index, read_through
from protopush.push.update import POOLED, features_at, reset_moments


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
    for name, value in (("per_class", per_class), ("max_samples", max_samples)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    check_quantile(quantile)
    if not -1.0 <= min_coverage <= 1.0:
        raise InputError(f"min_coverage is {min_coverage}; expected a cosine, -1 to 1, such as 0.7")
    net, slots = resizable(model, device, "grow")
    with preserve_state(model, dataloader, val_loader):
        live = live_features_of(net) is not None
        source: Reader = read_by_index(dataloader) if live else read_through(dataloader)
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        gains, why = find_gains(net, source, slots, before, wish)
        coverage, runner_ups = coverage_after(net, source, slots, before, gains, wish)
        anchors = [
            Anchor.at(gain.origin, gain.cell, gain.grid, verified=source.verified, runner_up=runner_up)
            for gain, runner_up in zip(gains, runner_ups, strict=True)
        ]
        change = partial(_move_in, net, source, slots, gains, anchors, use_local) if gains else None
        val_before, val_after = scored_change(model, net, slots, val_loader, change)
    if optimizer is not None and gains:
        places = torch.tensor([gain.class_index for gain in gains]), torch.tensor([gain.slot for gain in gains])
        reset_moments(optimizer, net.head.proto_manager.prototypes, slots.rows[places])
        connections = connections_of(net, slots)
        if connections is not None:
            reset_moments(optimizer, connections, *places)
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


def _move_in(
    net: Pushable, source: Reader, slots: Slots, gains: list[Gain], anchors: list[Anchor], use_local: bool
) -> None:
    """Put new prototypes, and what belongs to each, into their slots; a connection starts as its class's mean."""
    manager: Any = net.head.proto_manager
    index = partial(torch.tensor, dtype=torch.int64, device=slots.rows.device)
    classes, places = index([gain.class_index for gain in gains]), index([gain.slot for gain in gains])
    rows = slots.rows[classes, places]
    vectors = torch.stack([gain.unit for gain in gains]).to(rows.device)
    if live_features_of(net) is not None:
        manager.anchor_ids[rows] = index([gain.sample for gain in gains])
        manager.anchor_cells[rows] = index([gain.cell if use_local else POOLED for gain in gains])
        manager.anchor_features[rows] = features_at(net, source, rows).to(manager.anchor_features.dtype)
        vectors = net.head.proj(manager.anchor_features[rows])
    unit = F.normalize(vectors.to(slots.unit.dtype), dim=-1)
    manager.prototypes.data[rows] = unit.to(manager.prototypes.dtype)
    manager.valid_mask.view(-1)[rows] = True
    if getattr(manager, "anchors", None) is not None:
        for row, anchor in zip(rows.tolist(), anchors, strict=True):
            manager.anchors[row] = anchor
    connections = connections_of(net, slots)
    if connections is not None:
        for gain in gains:
            if slots.used[gain.class_index].any():
                of_class = connections.data[gain.class_index]
                of_class[gain.slot] = of_class[slots.used[gain.class_index]].mean()
