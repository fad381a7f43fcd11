"""Growth and pruning: classes get another prototype where they are badly covered, and lose those that don't matter."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.embedding import OwnSimilarity, check_quantile, class_coverage, in_order, own_similarity
from protopush.push.facility_location import Wish, coverage_after, find_gains
from protopush.push.guard import scored_change
from protopush.push.options import Allow
from protopush.push.protocol import Pushable, Slots, class_names_of, connections_of, live_features_of, resizable
from protopush.push.push_report import GrownPrototype, GrowthReport, PrunedPrototype, PruningReport
from protopush.push.reader import Reader, read_by_index, read_through
from protopush.push.top_candidates import TIE
from protopush.push.update import move_in, move_out, reset_moments


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
        model, dataloader, device: as for :func:`protopush.push_prototypes`; the manager has a ``valid_mask``, and slots
            are free where ``max_prototypes`` is above ``num_prototypes``.
        per_class: new prototypes per class, at most.
        quantile: of the samples' coverage, in [0, 1].
        min_coverage: cosine, in [-1, 1].
        max_samples: of a class, that are searched for a new prototype: the worst covered ones.
        use_local, allow: as for the push.
        val_loader: validation images: the report then has the effect.
        optimizer: its moments of the new prototypes and of their connections are set to 0.

    Raises:
        InputError: as for the push; a manager without ``valid_mask``, a stream that gives other samples the next time.

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
            Anchor.at(
                gain.origin,
                gain.cell,
                gain.regions,
                pooled=not use_local,
                verified=source.verified,
                runner_up=runner_up,
            )
            for gain, runner_up in zip(gains, runner_ups, strict=True)
        ]
        change = partial(move_in, net, source, slots, gains, anchors, use_local) if gains else None
        scores = scored_change(model, net, slots, val_loader, change)
    if optimizer is not None and gains:
        places = torch.tensor([gain.class_index for gain in gains]), torch.tensor([gain.slot for gain in gains])
        reset_moments(optimizer, net.head.proto_manager.prototypes, slots.rows[places])
        connections = connections_of(net, slots)
        if connections is not None:
            reset_moments(optimizer, connections, *places)
    notes = [source.note] if source.note else []
    if why and not bool(((slots.rows >= 0) & ~slots.used).any()):
        notes.append("no class has a free slot: make the head with max_prototypes above num_prototypes")
    report = GrowthReport(
        use_local=use_local,
        min_coverage=min_coverage,
        per_class=per_class,
        max_samples=max_samples,
        added=[GrownPrototype(g.class_index, g.slot, g.gain, a) for g, a in zip(gains, anchors, strict=True)],
        verified=source.verified,
        notes=notes,
        quantile=quantile,
        classes=class_coverage(net, slots, before, coverage, quantile, why),
        val_before=scores[0],
        val_after=scores[1],
        seconds=time.perf_counter() - started,
        class_names=class_names_of(net, len(slots.rows)),
    )
    report.log()
    return report


def prune_prototypes(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: str | int | torch.device,
    *,
    max_cosine: float = 0.99,
    unused: bool = True,
    keep_at_least: int = 1,
    use_local: bool = True,
    quantile: float = 0.1,
    val_loader: Iterable[Any] | None = None,
) -> PruningReport:
    """Remove prototypes that are duplicates or never matter; their slots are free for growth.

    1. Duplicates: of prototypes of a class that stand for the same patch, or whose cosine is above ``max_cosine``, the
       one stays that gives the largest contribution to the most samples (of equals, the first slot).
    2. Unused: of those that are left, prototypes that give the largest contribution to no sample of their class. Equal
       contributions all count as the largest. A class without a sample keeps them.

    The contribution is the similarity times the head's ``weights()``, where it has such a method; else the similarity.

    One pass over the data; memory: 4 * K + 16 bytes a sample. The result is the same for any batch size, order, number
    of workers and of ranks; nothing is changed if it fails. Under ``torch.distributed`` every rank must call it.

    Args:
        model, dataloader, device: as for :func:`protopush.push_prototypes`; the manager has a ``valid_mask``.
        max_cosine: in [-1, 1]; at 1 only those of the same patch are duplicates.
        unused: whether the second kind is removed too.
        keep_at_least: prototypes of a class that stay: those that matter most.
        use_local: as for the push.
        quantile: of the samples' coverage, for the report.
        val_loader: validation images: the report then has the effect.

    Raises:
        InputError: as for the push; a manager without ``valid_mask``.

    Source: the aim of ProtoPNet's prototype pruning (Chen et al., 2019), by use instead of by the nearest patches.

    Example:
        >>> import protopush
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> head = protopush.HeadOptimal(6, num_classes=2, num_prototypes=3, embed_dim=6)
        >>> head.proto_manager.prototypes.data[1] = head.proto_manager.prototypes.data[0]
        >>> class Net(nn.Module):
        ...     head = head
        ...     def extract_features(self, patches):
        ...         return patches.mean(1, keepdim=True), patches
        >>> data = TensorDataset(torch.randn(8, 9, 6), torch.tensor([0, 1] * 4))
        >>> print(prune_prototypes(Net(), DataLoader(data, batch_size=4), "cpu", unused=False).removed[0])
        slot 1: duplicate of slot 0 (cosine 1.0000)
    """
    started = time.perf_counter()
    if not -1.0 <= max_cosine <= 1.0:
        raise InputError(f"max_cosine is {max_cosine}; expected -1 to 1, such as 0.99")
    if keep_at_least < 1:
        raise InputError(f"keep_at_least is {keep_at_least}; expected at least 1: a class needs a prototype")
    check_quantile(quantile)
    net, slots = resizable(model, device, "be removed")
    with preserve_state(model, dataloader, val_loader):
        source = read_through(dataloader)
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        removed = []
        for members in _members(net, slots, before):
            room = len(members.slots) - keep_at_least
            if room > 0:
                gone = _duplicates(members, max_cosine)[::-1][:room]  # those that matter least first
                if unused and len(members.contributions):
                    gone += _unused(members, gone)[: room - len(gone)]
                removed += gone
        rows = [slots.rows[gone.class_index, gone.prototype] for gone in removed]
        change = partial(move_out, net.head.proto_manager, torch.stack(rows)) if rows else None
        scores = scored_change(model, net, slots, val_loader, change)
    left = Slots.of(net.head.proto_manager).used.cpu()
    after = before._replace(best=before.best.masked_fill(~left[before.labels], -torch.inf))
    report = PruningReport(
        use_local=use_local,
        max_cosine=max_cosine,
        unused=unused,
        keep_at_least=keep_at_least,
        removed=removed,
        notes=[source.note] if source.note else [],
        quantile=quantile,
        classes=class_coverage(net, slots, before, after.coverage(), quantile, {}),
        val_before=scores[0],
        val_after=scores[1],
        seconds=time.perf_counter() - started,
        class_names=class_names_of(net, len(slots.rows)),
    )
    report.log()
    return report


class _Members(NamedTuple):
    """The m prototypes in use of a class: slots, unit vectors (m, D), anchors, contributions (n, m) and their tie."""

    class_index: int
    slots: list[int]
    unit: Tensor
    anchors: list[Anchor | None]
    contributions: Tensor
    tie: float


def _members(net: Pushable, slots: Slots, before: OwnSimilarity) -> list[_Members]:
    """Those of each class; a contribution is a similarity times its weight, 1 where the head has no ``weights()``."""
    weights = net.head.weights() if callable(getattr(type(net.head), "weights", None)) else None  # type: ignore[attr-defined]
    if not isinstance(weights, Tensor) or weights.shape != slots.rows.shape:
        weights = torch.ones(slots.rows.shape)
    weights = weights.detach().cpu().double()
    anchors = getattr(net.head.proto_manager, "anchors", None)
    found = []
    for c, used in enumerate(slots.used.cpu()):
        k = used.nonzero().flatten()
        own = [None if anchors is None else anchors[row] for row in slots.rows[c].cpu()[k].tolist()]
        contributions = before.best[before.labels == c][:, k].double() * weights[c, k]
        tie = TIE * max(weights[c, k].abs().tolist(), default=1.0)
        found.append(_Members(c, k.tolist(), slots.unit[c].cpu()[k], own, contributions, tie))
    return found


def _duplicates(members: _Members, max_cosine: float) -> list[PrunedPrototype]:
    """Those that double one that matters more, the one that matters most first.

    Each is compared with those that stay, so that likeness is not handed on: of A like B like C, A and C may stay.
    """
    best = members.contributions.amax(dim=1, keepdim=True)
    wins = (members.contributions >= best - members.tie).sum(dim=0).tolist()
    cosine = (members.unit @ members.unit.T).clamp(max=1.0).tolist()  # rounding goes beyond 1
    patches = [a and (a.sample_id, a.file, a.sha256, a.region) for a in members.anchors]
    stay: list[int] = []
    doubles = []
    for j in sorted(range(len(members.slots)), key=lambda j: (-wins[j], j)):
        same = {i: patches[j] is not None and patches[j] == patches[i] for i in stay}
        twin = next((i for i in stay if same[i] or cosine[j][i] > max_cosine), None)
        if twin is None:
            stay.append(j)
        else:
            of_twin = (members.slots[twin], cosine[j][twin], same[twin], members.anchors[j])
            doubles.append(PrunedPrototype(members.class_index, members.slots[j], "duplicate", *of_twin))
    return doubles


def _unused(members: _Members, gone: list[PrunedPrototype]) -> list[PrunedPrototype]:
    """Of those that are left, the ones that give the largest contribution to no sample, the farthest from it first."""
    left = [j for j, slot in enumerate(members.slots) if slot not in {double.prototype for double in gone}]
    some = members.contributions[:, left]
    behind = (some - some.amax(dim=1, keepdim=True)).amax(dim=0)  # (len(left),), at most 0
    never = (behind < -members.tie).nonzero().flatten()
    slots = torch.tensor(members.slots)[left][never]
    order = in_order(behind[never], -slots, members.tie)
    anchors = dict(zip(members.slots, members.anchors, strict=True))
    return [PrunedPrototype(members.class_index, k, "unused", anchor=anchors[k]) for k in slots[order].tolist()]
