"""The keyword arguments that the push methods of a model hand on, for type checkers and editors.

The one entry: :func:`push_prototypes` for any module, and :class:`PushMixin` that gives a module the two methods.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.guard import GuardDecision, Validation, check_guard, guarded
from protopush.push.live_anchors import POOLED
from protopush.push.nearest_patches import Allow, Query
from protopush.push.protocol import PrototypeOwner, Slots, class_names_of, resolve_device, unwrap
from protopush.push.push_report import PushedPrototype, PushReport
from protopush.push.reader import Source, read_through
from protopush.push.selection import Chosen, check_unique, choose
from protopush.push.update import INTERPOLATIONS, Move

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PushOptions(TypedDict, total=False):
    """See :func:`protopush.push_prototypes`."""

    seed: int
    optimizer: torch.optim.Optimizer | None
    unique: str
    interpolation: str
    prototypes: Iterable[tuple[int, int]] | None
    allow: Allow | None
    guard: str | None
    guard_budget: float
    val_loader: Iterable[Any] | None


logger = logging.getLogger("protopush.push")


def push_prototypes(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: str | int | torch.device,
    *,
    use_local: bool = True,
    momentum: float = 0.9,
    max_patches_per_class: int | None = None,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    unique: str = "none",
    interpolation: str = "linear",
    prototypes: Iterable[tuple[int, int]] | None = None,
    allow: Allow | None = None,
    guard: str | None = None,
    guard_budget: float = 0.01,
    val_loader: Iterable[Any] | None = None,
) -> PushReport:
    """Move each prototype towards the nearest patch among the training images of its own class.

    ``p <- normalise(momentum * p + (1 - momentum) * f)``, where p and every patch embedding f have unit norm. One pass
    over the data, exact, in memory that does not grow with the number of images. Nothing is changed if it fails.

    Under ``torch.distributed`` every rank must call it: the ranks divide the data and end with the same prototypes.

    Args:
        model: any module with ``extract_features(images) -> (x_fu (B, 1, C), x_fu1 (B, L, C))``, ``head.proj`` (C -> D)
            and ``head.proto_manager`` with ``prototypes`` (S, D), ``get_prototype_indices()`` and, optionally,
            ``valid_mask`` (S,); wrapped by DDP or Fabric or not. Live prototypes (``anchoring="live"`` of
            :class:`protopush.HeadOptimal`) are put onto their new anchors whatever the momentum, unless it is 1.
        dataloader: yields ``(images, labels)`` or ``(images, labels, ids)``, shuffled or not. A dataset that augments
            should offer ``eval_view()``, and ``describe(index)`` to have files and boxes in the anchors.
        device: where the model is and the images go.
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        momentum: in [0, 1]; 0 is a hard push, 1 only looks for the anchors.
        max_patches_per_class: None for every patch; a number bounds the work: images are then visited in a random order
            (``seed``) until every class has as many.
        seed: of that order.
        optimizer: its moments of the pushed prototypes are set to 0.
        unique: ``none``: each prototype takes its nearest patch; ``patch``, ``image``, ``group``: no two prototypes of
            a class share one, and the sum of their similarities is the largest to be had. Where a class has too few,
            the next lower word holds for it, and the report says so. Groups come from the dataset (``groups``).
        interpolation: ``linear``, or ``slerp``, which goes ``1 - momentum`` of the angle.
        prototypes: (class, prototype) of those to push; None for all.
        allow: which patches may become anchors: ids (B,) and grid (rows, columns) to bool (B, L), on the CPU.
        guard: ``report`` (the default where there is a ``val_loader``) measures the model before and after;
            ``rollback`` takes the push back where it costs more than ``guard_budget``; ``budget`` raises the momentum
            until it doesn't; ``off``.
        guard_budget: the fall of balanced accuracy or AUROC that is allowed.
        val_loader: validation images, as ``dataloader``.

    Raises:
        InputError: non-finite features (the samples are named), labels without a class, a model that lacks a part.

    Source: push as in ProtoPNet (Chen et al., 2019), with momentum and normalised embeddings.

    Example:
        >>> import protopush
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = protopush.ProtoModel.create("resnet18", num_classes=2, pretrained=False, num_prototypes=3)
        >>> images = TensorDataset(torch.randn(8, 3, 64, 64), torch.tensor([0, 1] * 4))
        >>> report = protopush.push_prototypes(model, DataLoader(images, batch_size=4, shuffle=True), "cpu")
        >>> report.patches_per_class, len(report.prototypes)
        ([16, 16], 6)
    """
    started = time.perf_counter()
    net = unwrap(model)
    manager = net.head.proto_manager
    live = getattr(manager, "anchor_features", None)
    momentum = 0.0 if live is not None and momentum < 1 else momentum
    _check_arguments(momentum, max_patches_per_class, unique, interpolation)
    guard = guard or ("off" if val_loader is None else "report")
    check_guard(guard, guard_budget, live is not None)
    if guard != "off" and val_loader is None:
        raise InputError(f"guard {guard!r} needs a val_loader; give validation images, or guard 'off'")
    target = resolve_device(net, device)
    if live is not None:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    slots = Slots.of(manager, prototypes)
    names = class_names_of(net, len(slots.rows))
    logger.info("Collecting %s features for prototype push...", "LOCAL patch" if use_local else "GLOBAL pooled")
    with preserve_state(model, dataloader, val_loader):
        source = read_through(dataloader, order_seed=None if max_patches_per_class is None else seed)
        query = Query(use_local, max_patches_per_class, seed, allow, None if live is None else live.shape[1])
        chosen = choose(net, source, slots, query, unique, names)
        vectors = chosen.vectors if live is None else net.head.proj(chosen.vectors.to(live.dtype))
        nearest = F.normalize(vectors.to(slots.unit.dtype), dim=-1)
        cells = chosen.cells if use_local else torch.full_like(chosen.cells, POOLED)
        anchored = None if live is None else (chosen.vectors, chosen.ids, cells)
        move = Move(manager, slots, chosen.hit, nearest, interpolation, anchored)
        decision = None
        if guard != "off" and val_loader is not None:
            decision = _guarded(Validation(model, net, val_loader, target), guard, guard_budget, momentum, move)
    final = momentum if decision is None else decision.momentum
    records = _records(slots, chosen, nearest, move.at(final), source)
    report = PushReport(
        use_local=use_local,
        momentum=final,
        max_patches_per_class=max_patches_per_class,
        prototypes=records,
        patches_per_class=chosen.patches.tolist(),
        images_per_class=chosen.images.tolist(),
        kept_classes=_kept(slots, records),
        verified=source.verified,
        notes=[*([source.note] if source.note else []), *chosen.notes],
        seconds=time.perf_counter() - started,
        class_names=names,
        unique=chosen.levels,
        interpolation=interpolation,
        guard=decision,
    )
    move.keep(final, optimizer)
    if decision is None or decision.action != "rolled back":
        _write_anchors(manager, slots, records)
    _log(report)
    return report


def _guarded(validation: Validation, guard: str, budget: float, momentum: float, move: Move) -> GuardDecision:
    """The guard's decision; prototypes are as before when it returns, and when it fails."""
    try:
        return guarded(guard, budget, momentum, move.to, validation.score)
    finally:
        move.undo()


def _records(slots: Slots, chosen: Chosen, nearest: Tensor, moved: Tensor, source: Source) -> list[PushedPrototype]:
    """One record for each prototype that found a patch."""
    distances = (torch.linalg.vector_norm(place - nearest, dim=-1) for place in (slots.unit, moved))
    columns = (*distances, chosen.ids, chosen.cells, chosen.rank, chosen.nearest, chosen.runner_up)
    hit = chosen.hit
    rows = zip(hit.nonzero().tolist(), *(column.cpu()[hit].tolist() for column in columns), strict=True)
    records = []
    for (c, k), before, after, sample, cell, rank, best, runner_up in rows:
        anchor = Anchor.at(
            chosen.origins[sample],
            cell,
            chosen.grid,
            similarity=_cosine(before),
            similarity_after=_cosine(after),
            verified=source.verified,
            runner_up=runner_up if math.isfinite(runner_up) else None,
        )
        records.append(PushedPrototype(c, k, before, after, anchor, rank, before if rank == 1 else _distance(best)))
    return records


def _write_anchors(manager: PrototypeOwner, slots: Slots, records: list[PushedPrototype]) -> None:
    anchors = getattr(manager, "anchors", None)
    if anchors is not None:
        rows = slots.rows.tolist()
        for record in records:
            anchors[rows[record.class_index][record.prototype]] = record.anchor


def _kept(slots: Slots, records: list[PushedPrototype]) -> list[int]:
    """Classes whose prototypes were to be pushed, but that have no sample."""
    pushed = {record.class_index for record in records}
    return [c for c, asked in enumerate(slots.used.any(dim=1).tolist()) if asked and c not in pushed]


def _cosine(distance: float) -> float:
    return 1.0 - distance * distance / 2.0


def _distance(cosine: float) -> float:
    return math.sqrt(max(0.0, 2.0 - 2.0 * cosine))


def check_momentum(momentum: float, name: str = "momentum") -> None:
    """Refuse a momentum outside of [0, 1], under the name that the user knows it by.

    Raises:
        InputError: it is outside, or NaN.
    """
    if not 0.0 <= momentum <= 1.0:
        raise InputError(f"{name} is {momentum}; expected 0 (hard push) to 1 (only look), usually 0.9")


def _check_arguments(momentum: float, cap: int | None, unique: str, interpolation: str) -> None:
    check_momentum(momentum)
    check_unique(unique)
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation is {interpolation!r}; expected one of: {', '.join(INTERPOLATIONS)}")
    if cap is not None and cap < 1:
        raise InputError(f"max_patches_per_class is {cap}; expected at least 1, or None for every patch")


def _log(report: PushReport) -> None:
    for note in report.notes:
        logger.warning("%s", note)
    logger.info("Patch collection statistics:")
    for c, patches in enumerate(report.patches_per_class):
        logger.info("  Class %d: %d patches", c, patches)
    logger.info("Updating prototypes using %s...", "LOCAL patches" if report.use_local else "GLOBAL features")
    distances_of: dict[int, list[float]] = {}
    for record in report.prototypes:
        distances_of.setdefault(record.class_index, []).append(record.distance_before)
    for c, patches in enumerate(report.patches_per_class):
        logger.info("  Class %d: %d patches", c, patches)
        distances = distances_of.get(c)
        if distances:
            logger.info("    Updated %d prototypes, min_dist: %.4f", len(distances), min(distances))
        elif c in report.kept_classes:
            what = "patch that may be chosen" if patches else "sample"
            logger.warning("    Class %d has no %s: its prototypes are kept as they are", c, what)
    if report.guard is not None:
        logger.info("  %s", report.guard)
    logger.info("%s prototype push completed!", "Local" if report.use_local else "Global")


class PushMixin:
    """Gives an ``nn.Module`` the two push methods; see :func:`push_prototypes` for what the module must have.

    ``class MyNet(protopush.PushMixin, nn.Module)``
    """

    def push_prototypes(
        self,
        dataloader: Iterable[Any],
        device: str | int | torch.device,
        use_local: bool = True,
        momentum: float = 0.9,
        max_patches_per_class: int | None = None,
        **options: Unpack[PushOptions],
    ) -> PushReport:
        """Push with every patch (or, with ``use_local=False``, the pooled features).

        ``options`` are the other arguments of :func:`push_prototypes`: ``optimizer``, ``unique``, ``guard``, ...
        """
        return push_prototypes(
            self,  # type: ignore[arg-type]
            dataloader,
            device,
            use_local=use_local,
            momentum=momentum,
            max_patches_per_class=max_patches_per_class,
            **options,
        )

    def push_prototypes_local(
        self,
        dataloader: Iterable[Any],
        device: str | int | torch.device,
        momentum: float = 0.9,
        max_patches_per_class: int | None = 5000,
        **options: Unpack[PushOptions],
    ) -> PushReport:
        """Push with at most ``max_patches_per_class`` patches of each class; see :func:`push_prototypes`."""
        return self.push_prototypes(dataloader, device, True, momentum, max_patches_per_class, **options)
