"""Pruning: prototypes that double another one of their class, or that never matter, are removed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.guard import Score, Validation
from protopush.push.protocol import Pushable, Slots, class_names_of, resolve_device, unwrap
from protopush.push.reader import read_through
from protopush.push.resize.coverage import (
    ClassCoverage,
    OwnSimilarity,
    class_coverage,
    coverage_lines,
    effect,
    in_order,
    own_similarity,
)
from protopush.push.resize.slots import all_or_nothing, move_out, slot_mask
from protopush.push.top_candidates import TIE

logger = logging.getLogger("protopush.push")


@dataclass(frozen=True)
class PrunedPrototype:
    """One prototype that was removed.

    Attributes:
        class_index, prototype: class and slot.
        reason: ``duplicate``, or ``unused``: it gave the largest contribution to no sample of its class.
        twin: the slot that it doubled.
        cosine: to the twin.
        same_patch: whether both stood for one patch.
        anchor: the patch that it stood for.
    """

    class_index: int
    prototype: int
    reason: str
    twin: int | None = None
    cosine: float | None = None
    same_patch: bool = False
    anchor: Anchor | None = None

    def __str__(self) -> str:
        if self.reason != "duplicate" or self.cosine is None:
            return f"slot {self.prototype}: never gives the largest contribution"
        patch = ", same patch" if self.same_patch else ""
        return f"slot {self.prototype}: duplicate of slot {self.twin} (cosine {self.cosine:.4f}{patch})"


@dataclass(frozen=True)
class PruningReport:
    """What pruning did.

    Attributes:
        use_local, max_cosine, unused, keep_at_least, quantile: as asked.
        classes: the coverage of each class, before and after.
        removed: the prototypes that are gone.
        notes: what is worth a warning.
        val_before, val_after: balanced_accuracy, auroc and ece on the validation images; None without a val_loader.
        seconds: time taken.
        class_names: of the model, where it has them.
    """

    use_local: bool
    max_cosine: float
    unused: bool
    keep_at_least: int
    quantile: float
    classes: list[ClassCoverage]
    removed: list[PrunedPrototype]
    notes: list[str]
    val_before: Score | None
    val_after: Score | None
    seconds: float
    class_names: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        told: dict[int, list[str]] = {}
        for gone in self.removed:
            told.setdefault(gone.class_index, []).append(str(gone))
        title = f"pruning: {len(self.removed)} prototypes removed in {self.seconds:.1f} s"
        table = coverage_lines(self.classes, self.class_names, told)
        return "\n".join([title, *table, *self.notes, effect(self.val_before, self.val_after)])


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
       contributions all count as the largest. A class without a sample cannot tell: it keeps them.

    The contribution is the similarity times the head's ``weights()``, where it has such a method; else the similarity.

    One pass over the data; memory: 4 * K + 16 bytes a sample. The result is the same for any batch size, order, number
    of workers and of ranks; nothing is changed if it fails. Under ``torch.distributed`` every rank must call it.

    Args:
        model: as for :func:`protopush.push_prototypes`, its manager with a ``valid_mask``.
        dataloader: training images, as for the push.
        device: where the model is.
        max_cosine: in [-1, 1]; 1 leaves only the patch to tell duplicates.
        unused: whether the second kind is removed too.
        keep_at_least: prototypes of a class that stay: those that matter most.
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        quantile: of the samples' coverage that the report tells.
        val_loader: validation images: the report then tells the effect.

    Raises:
        InputError: non-finite features (the samples are named), labels without a class, a manager without
            ``valid_mask``.

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
    _check(max_cosine, keep_at_least, quantile)
    net = unwrap(model)
    target = resolve_device(net, device)
    slot_mask(net.head.proto_manager, "be removed")
    if getattr(net.head.proto_manager, "anchor_features", None) is not None:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    slots = Slots.of(net.head.proto_manager)
    with preserve_state(model, dataloader, val_loader):
        source = read_through(dataloader)
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        removed = _removed(net, slots, before, _Rule(max_cosine, unused, keep_at_least))
        leaving = [(gone.class_index, gone.prototype) for gone in removed]
        validation = None if val_loader is None else Validation(model, net, val_loader, target)
        val_before = val_after = None if validation is None else validation.score()
        with all_or_nothing(net, slots):
            if leaving:
                move_out(net, slots, leaving)
                val_after = None if validation is None else validation.score()
    left = Slots.of(net.head.proto_manager)
    after = before._replace(best=before.best.masked_fill(~left.used.cpu()[before.labels], -torch.inf))
    coverage = (before.coverage(), after.coverage())
    report = PruningReport(
        use_local=use_local,
        max_cosine=max_cosine,
        unused=unused,
        keep_at_least=keep_at_least,
        quantile=quantile,
        classes=class_coverage((slots, left), before.labels, coverage, quantile, {}),
        removed=removed,
        notes=[source.note] if source.note else [],
        val_before=val_before,
        val_after=val_after,
        seconds=time.perf_counter() - started,
        class_names=class_names_of(net, len(slots.rows)),
    )
    for note in report.notes:
        logger.warning("%s", note)
    logger.info("%s", str(report).splitlines()[0])
    return report


class _Rule(NamedTuple):
    max_cosine: float
    unused: bool
    keep_at_least: int


def _check(max_cosine: float, keep_at_least: int, quantile: float) -> None:
    if not -1.0 <= max_cosine <= 1.0:
        raise InputError(f"max_cosine is {max_cosine}; expected -1 to 1, such as 0.99")
    if keep_at_least < 1:
        raise InputError(f"keep_at_least is {keep_at_least}; expected at least 1: a class needs a prototype")
    if not 0.0 <= quantile <= 1.0:
        raise InputError(f"quantile is {quantile}; expected 0 (the worst sample) to 1, such as 0.1")


def _removed(net: Pushable, slots: Slots, before: OwnSimilarity, rule: _Rule) -> list[PrunedPrototype]:
    """Who goes, class by class; of a class, duplicates first."""
    weights = _weights(net, slots)
    anchors = getattr(net.head.proto_manager, "anchors", None)
    removed = []
    for c, used in enumerate(slots.used.cpu()):
        places = used.nonzero().flatten()
        members = _Members(
            c,
            places.tolist(),
            slots.unit[c].cpu()[places],
            [None if anchors is None else anchors[int(slots.rows[c, k])] for k in places],
            before.best[before.labels == c][:, places].double() * weights[c, places],
            TIE * float(weights[c, places].abs().amax()) if len(places) else TIE,
        )
        removed += _of_class(members, rule)
    return removed


def _weights(net: Pushable, slots: Slots) -> Tensor:
    """What a similarity of 1 contributes, float64 (C, K) on the CPU; 1 where the head doesn't tell."""
    if callable(getattr(type(net.head), "weights", None)):
        told = net.head.weights()  # type: ignore[attr-defined]
        if isinstance(told, Tensor) and told.shape == slots.rows.shape:
            return told.detach().cpu().double()
    return torch.ones(slots.rows.shape, dtype=torch.float64)


class _Members(NamedTuple):
    """The m prototypes in use of a class: slots, unit vectors (m, D), anchors, contributions (n, m) and their tie."""

    class_index: int
    slots: list[int]
    unit: Tensor
    anchors: list[Anchor | None]
    contributions: Tensor
    tie: float


def _of_class(members: _Members, rule: _Rule) -> list[PrunedPrototype]:
    room = len(members.slots) - rule.keep_at_least
    if room <= 0:
        return []
    removed = _duplicates(members, rule.max_cosine)[::-1][:room]  # those that matter least first
    if rule.unused and len(members.contributions):
        gone = {double.prototype for double in removed}
        left = [j for j, slot in enumerate(members.slots) if slot not in gone]
        removed += _unused(members, left)[: room - len(removed)]
    return removed


def _duplicates(members: _Members, max_cosine: float) -> list[PrunedPrototype]:
    """Those that double one that matters more, the one that matters most first.

    Each is compared with those that stay, so that likeness is not handed on: of A like B like C, A and C may stay.
    """
    best = members.contributions.amax(dim=1, keepdim=True)
    wins = (members.contributions >= best - members.tie).sum(dim=0).tolist()
    cosine = (members.unit @ members.unit.T).clamp(max=1.0).tolist()  # rounding goes beyond 1
    patches = [a and (a.sample_id, a.file, a.sha256, a.cell, a.grid) for a in members.anchors]
    stay: list[int] = []
    doubles = []
    for j in sorted(range(len(members.slots)), key=lambda j: (-wins[j], j)):
        same = {i: patches[j] is not None and patches[j] == patches[i] for i in stay}
        twin = next((i for i in stay if same[i] or cosine[j][i] > max_cosine), None)
        if twin is None:
            stay.append(j)
        else:
            told = (members.slots[twin], cosine[j][twin], same[twin], members.anchors[j])
            doubles.append(PrunedPrototype(members.class_index, members.slots[j], "duplicate", *told))
    return doubles


def _unused(members: _Members, left: list[int]) -> list[PrunedPrototype]:
    """Those of ``left`` that give the largest contribution to no sample, the one farthest from it first."""
    some = members.contributions[:, left]
    behind = (some - some.amax(dim=1, keepdim=True)).amax(dim=0)  # (len(left),), at most 0
    never = (behind < -members.tie).nonzero().flatten()
    slots = torch.tensor(members.slots)[left][never]
    order = in_order(behind[never], -slots, members.tie)
    anchors = dict(zip(members.slots, members.anchors, strict=True))
    return [PrunedPrototype(members.class_index, k, "unused", anchor=anchors[k]) for k in slots[order].tolist()]
