"""Push of prototypes: :func:`push_prototypes` for any module, :class:`PushMixin` for a module's own methods."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from protopush.data.dataset import Provenance
from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.guard import Validation, guarded
from protopush.push.nearest_patches import Candidates
from protopush.push.options import GUARDS, PushKeywords, PushOptions, PushSettings, resolve
from protopush.push.protocol import Slots, class_names_of, live_features_of, resolve_device, unwrap
from protopush.push.push_report import PushedPrototype, PushReport
from protopush.push.reader import read_through
from protopush.push.selection import RULES, choose
from protopush.push.update import INTERPOLATIONS, Move

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("protopush.push")


def push_prototypes(
    model: nn.Module,
    dataloader: Iterable[Any],
    device: str | int | torch.device,
    *,
    use_local: bool = True,
    momentum: float = 0.9,
    max_patches_per_class: int | None = None,
    **others: Unpack[PushKeywords],
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
        momentum: in [0, 1]; 0 is a hard push, 1 only names the anchors.
        max_patches_per_class: None for every patch; a number bounds the work.
        others: the other fields of :class:`protopush.push.PushOptions`, which says what each one means.

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
    options = PushOptions(momentum, max_patches_per_class, use_local=use_local, **others)
    net = unwrap(model)
    manager = net.head.proto_manager
    live = live_features_of(net) is not None
    check_settings(options, live)
    momentum = 0.0 if live and momentum < 1 else momentum
    val_loader = options.val_loader
    resolve_device(net, device)
    if live:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    slots = Slots.of(manager, options.prototypes)
    names = class_names_of(net, len(slots.rows))
    logger.info("Collecting %s features for prototype push...", "LOCAL patch" if use_local else "GLOBAL pooled")
    with preserve_state(model, dataloader, val_loader):
        reader = read_through(dataloader, order_seed=None if max_patches_per_class is None else options.seed)
        chosen = choose(net, reader, slots, options, names)
        move, origins, decision = Move(net, slots, chosen, options), chosen.origins(reader), None
        if options.guard != "off" and val_loader is not None:
            score = Validation(model, net, val_loader).score
            try:
                decision = guarded(options.guard or "report", options.guard_budget, momentum, move.to, score)
            finally:
                move.undo()
    final = momentum if decision is None else decision.momentum
    records = _records(slots, chosen, move.at(final), move, origins, reader.verified, not options.use_local)
    pushed = {record.class_index for record in records}
    report = PushReport(
        use_local=use_local,
        momentum=final,
        max_patches_per_class=max_patches_per_class,
        prototypes=records,
        patches_per_class=chosen.patches.tolist(),
        images_per_class=chosen.images.tolist(),
        kept_classes=[c for c, used in enumerate(slots.used.any(dim=1).tolist()) if used and c not in pushed],
        verified=reader.verified,
        notes=[*([reader.note] if reader.note else []), *chosen.notes],
        seconds=time.perf_counter() - started,
        class_names=names,
        unique=list(chosen.unique),
        interpolation=getattr(options.interpolation, "__name__", str(options.interpolation)),
        guard=decision,
    )
    move.keep(final, options.optimizer)
    anchors = getattr(manager, "anchors", None)
    if anchors is not None and (decision is None or decision.action != "rolled back"):
        for record in records:
            anchors[int(slots.rows[record.class_index, record.prototype])] = record.anchor
    _log(report)
    return report


# What is shown instead of ``others``: every field of PushOptions and its default.
_plain = inspect.signature(push_prototypes)
_shown = {name: one for name, one in _plain.parameters.items() if name != "others"} | {
    one.name: inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
    for one in fields(PushOptions)
    if one.name not in _plain.parameters
}
push_prototypes.__signature__ = _plain.replace(parameters=[*_shown.values()])  # type: ignore[attr-defined]


def check_settings(settings: PushSettings, live: bool = False, prefix: str = "") -> None:
    """Raise an :class:`InputError` for settings that make no sense, by the names that the user knows them by."""
    if not 0.0 <= settings.momentum <= 1.0:
        expected = "expected 0 (hard push) to 1 (nothing moves), usually 0.9"
        raise InputError(f"{prefix}momentum is {settings.momentum}; {expected}")
    cap, guard, budget = settings.max_patches_per_class, settings.guard, settings.guard_budget
    if cap is not None and cap < 1:
        raise InputError(f"{prefix}max_patches_per_class is {cap}; expected at least 1, or None for every patch")
    if guard is not None and guard not in GUARDS:
        raise InputError(f"{prefix}guard is {guard!r}; expected one of: {', '.join(GUARDS)}")
    if not budget >= 0:
        raise InputError(f"{prefix}guard_budget is {budget}; expected a fall that is allowed, 0 or more, such as 0.01")
    if guard == "budget" and live:
        raise InputError("guard 'budget' searches for a momentum, but live anchors have none; use 'rollback'")
    if isinstance(settings, PushOptions) and guard not in (None, "off") and settings.val_loader is None:
        raise InputError(f"guard {guard!r} needs a val_loader; give validation images, or guard 'off'")
    resolve(RULES, settings.unique, f"{prefix}unique")
    resolve(INTERPOLATIONS, settings.interpolation, f"{prefix}interpolation")


def _records(
    slots: Slots,
    chosen: Candidates,
    moved: Tensor,
    move: Move,
    origins: dict[int, Provenance],
    verified: bool,
    pooled: bool,
) -> list[PushedPrototype]:
    """One record for each prototype that found a patch."""
    ranked, hit = chosen.ranked, move.hit
    columns = (
        *(torch.linalg.vector_norm(at - move.nearest, dim=-1) for at in (slots.unit, moved)),
        chosen.of_taken(ranked.ids),
        chosen.of_taken(ranked.cells),
        chosen.taken,
        ranked.similarity[:, 0],
        ranked.similarity.scatter(1, chosen.taken.unsqueeze(1), -torch.inf).amax(dim=1),  # the best of the others
    )
    rows = zip(hit.nonzero().tolist(), *(column[hit].tolist() for column in columns), strict=True)
    records = []
    for (c, k), before, after, sample, cell, taken, best, other in rows:
        anchor = Anchor.at(
            origins[sample],
            cell,
            chosen.regions,
            similarity=1.0 - before * before / 2.0,
            similarity_after=1.0 - after * after / 2.0,
            pooled=pooled,
            verified=verified,
            runner_up=other if math.isfinite(other) else None,
        )
        nearest = before if taken == 0 else math.sqrt(max(0.0, 2.0 - 2.0 * best))
        records.append(PushedPrototype(c, k, before, after, anchor, taken + 1, nearest))
    return records


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
        if distances := distances_of.get(c):
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
        **options: Unpack[PushKeywords],
    ) -> PushReport:
        """Push with every patch (or, with ``use_local=False``, the pooled features); see :func:`push_prototypes`."""
        first = {"use_local": use_local, "momentum": momentum, "max_patches_per_class": max_patches_per_class}
        return push_prototypes(self, dataloader, device, **first, **options)  # type: ignore[arg-type]

    def push_prototypes_local(
        self,
        dataloader: Iterable[Any],
        device: str | int | torch.device,
        momentum: float = 0.9,
        max_patches_per_class: int | None = 5000,
        **options: Unpack[PushKeywords],
    ) -> PushReport:
        """Push with at most ``max_patches_per_class`` patches of each class; see :func:`push_prototypes`."""
        return self.push_prototypes(dataloader, device, True, momentum, max_patches_per_class, **options)
