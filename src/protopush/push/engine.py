"""The one entry: :func:`push_prototypes` for any module, and :class:`PushMixin` that gives a module the two methods."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.errors import InputError, listing
from protopush.prototypes import Anchor
from protopush.push.contract import PrototypeOwner, Pushable, Slots, resolve_device, unwrap
from protopush.push.report import PushedPrototype, PushReport
from protopush.push.search import NonFinite, Tally, TopM, unit_embeddings
from protopush.push.source import Source, read_through
from protopush.push.update import momentum_update, reset_moments
from protopush.untouched import untouched

logger = logging.getLogger("protopush.push")

LOG_EVERY = 50  # batches


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
) -> PushReport:
    """Move each prototype towards the nearest patch among the training images of its own class.

    ``p <- normalise(momentum * p + (1 - momentum) * f)``, where p and every patch embedding f have unit norm. One pass
    over the data, exact, in memory that does not grow with the number of images. Nothing is changed if it fails.

    Args:
        model: any module with ``extract_features(images) -> (x_fu (B, 1, C), x_fu1 (B, L, C))``, ``head.proj`` (C -> D)
            and ``head.proto_manager`` with ``prototypes`` (S, D), ``get_prototype_indices()`` and, optionally,
            ``valid_mask`` (S,); wrapped by DDP or Fabric or not.
        dataloader: yields ``(images, labels)`` or ``(images, labels, ids)``, shuffled or not. A dataset that augments
            should offer ``eval_view()``, and ``describe(index)`` to have files and boxes in the anchors.
        device: where the model is and the images go.
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        momentum: in [0, 1]; 0 is a hard push, 1 only looks for the anchors.
        max_patches_per_class: None for every patch; a number bounds the work: images are then visited in a random order
            (``seed``) until every class has as many.
        seed: of that order.
        optimizer: its moments of the pushed prototypes are set to 0.

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
    _check_arguments(momentum, max_patches_per_class)
    net = unwrap(model)
    manager = net.head.proto_manager
    slots = Slots.of(manager)
    target = resolve_device(net, device)
    name = "LOCAL patch" if use_local else "GLOBAL pooled"
    logger.info("Collecting %s features for prototype push...", name)
    with untouched(model, dataloader):
        source = read_through(dataloader, order_seed=None if max_patches_per_class is None else seed)
        tally = Tally(len(slots.rows), max_patches_per_class, seed)
        found, grid = _search(net, source, slots, target, tally, use_local)
        if not source.verified:
            logger.warning("%s", source.note)
        moved, records = _move(slots, found, source, grid, momentum)
    report = PushReport(
        use_local=use_local,
        momentum=momentum,
        max_patches_per_class=max_patches_per_class,
        prototypes=records,
        patches_per_class=tally.patches.tolist(),
        images_per_class=tally.images.tolist(),
        kept_classes=[c for c in range(len(slots.rows)) if not any(r.class_index == c for r in records)],
        verified=source.verified,
        note=source.note,
        seconds=time.perf_counter() - started,
        class_names=_class_names(net, len(slots.rows)),
    )
    _apply(manager, slots, moved, report, optimizer)
    _log(report, use_local)
    return report


def _search(
    net: Pushable, source: Source, slots: Slots, device: torch.device, tally: Tally, use_local: bool
) -> tuple[TopM, tuple[int, int]]:
    """The nearest patches of all prototypes, and the grid of the patches."""
    found = TopM(slots.unit, slots.used)
    strange = NonFinite(device)
    grid, number = (1, 1), 0
    for number, (images, labels, ids) in enumerate(source.batches(tally.full), start=1):
        _check_labels(labels, ids, len(slots.rows))
        x_fu, x_fu1 = net.extract_features(images.to(device, non_blocking=True))
        if number == 1:
            _log_shapes(x_fu, x_fu1, use_local)
            grid = _grid(x_fu1.shape[1], images) if use_local else (1, 1)
        projected = net.head.proj(x_fu1 if use_local else x_fu)
        ids = ids.to(device, non_blocking=True)
        strange.update(projected, ids)
        embeddings, allowed = unit_embeddings(projected)
        allowed = allowed & tally.take(labels, projected.shape[1]).to(device, non_blocking=True)
        found.update(embeddings, labels, ids, allowed)
        if number % LOG_EVERY == 0:
            logger.info("  Processed %d batches...", number)
            _refuse_non_finite(strange, source)
        if tally.done:
            break
    if number == 0:
        raise InputError("the loader yields no batch; expected training images; nothing was changed")
    _refuse_non_finite(strange, source)
    return found, grid


def _move(
    slots: Slots, found: TopM, source: Source, grid: tuple[int, int], momentum: float
) -> tuple[Tensor, list[PushedPrototype]]:
    """The new prototypes (C, K, D), and one record for each that found a patch."""
    nearest = F.normalize(found.embeddings[:, 0].to(slots.unit.dtype), dim=-1)
    hit = found.similarity[:, 0].isfinite()
    moved = torch.where(hit.unsqueeze(-1), momentum_update(slots.unit, nearest, momentum), slots.unit)
    before = torch.linalg.vector_norm(slots.unit - nearest, dim=-1).cpu()
    after = torch.linalg.vector_norm(moved - nearest, dim=-1).cpu()
    ids, cells = found.ids[:, 0].cpu(), found.cells[:, 0].cpu()
    origin = {i: source.describe(i) for i in sorted(set(ids[hit.cpu()].tolist()))}
    records = []
    for c, k in hit.cpu().nonzero().tolist():
        where, cell = origin[int(ids[c, k])], int(cells[c, k])
        anchor = Anchor(
            sample_id=where.sample_id,
            cell=cell,
            grid=grid,
            similarity=_cosine(float(before[c, k])),
            similarity_after=_cosine(float(after[c, k])),
            file=where.file,
            sha256=where.sha256,
            group=where.group,
            box=where.view.cell_box(cell, grid) if where.view is not None else None,
            image_size=where.view.original if where.view is not None else None,
            verified=source.verified,
        )
        records.append(PushedPrototype(c, k, float(before[c, k]), float(after[c, k]), anchor))
    return moved, records


def _apply(
    manager: PrototypeOwner, slots: Slots, moved: Tensor, report: PushReport, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write the new prototypes and anchors: the only place where a push changes anything."""
    pushed = torch.zeros_like(slots.used)
    for record in report.prototypes:
        pushed[record.class_index, record.prototype] = True
    rows = slots.rows[pushed]
    parameter = manager.prototypes
    if report.momentum < 1:  # at 1 nothing moves, not even by rounding
        parameter.data[rows] = moved[pushed].to(parameter.dtype)
        if optimizer is not None:
            reset_moments(optimizer, parameter, rows)
    anchors = getattr(manager, "anchors", None)
    if anchors is not None:
        for row, record in zip(rows.tolist(), report.prototypes, strict=True):
            anchors[row] = record.anchor


def _class_names(net: Pushable, count: int) -> list[str]:
    """The model's own names of its classes, where it has as many."""
    names = [str(name) for name in getattr(net, "class_names", None) or []]
    return names if len(names) == count else []


def _cosine(distance: float) -> float:
    return 1.0 - distance * distance / 2.0


def _grid(cells: int, images: Tensor) -> tuple[int, int]:
    """(rows, columns) with rows * columns == cells, of the shape nearest to the images' (or to a square)."""
    height, width = images.shape[-2:] if images.ndim == 4 else (1, 1)
    shapes = [(rows, cells // rows) for rows in range(1, cells + 1) if cells % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def check_momentum(momentum: float, name: str = "momentum") -> None:
    """Refuse a momentum outside of [0, 1], under the name that the user knows it by.

    Raises:
        InputError: it is outside, or NaN.
    """
    if not 0.0 <= momentum <= 1.0:
        raise InputError(f"{name} is {momentum}; expected 0 (hard push) to 1 (only look), usually 0.9")


def _check_arguments(momentum: float, cap: int | None) -> None:
    check_momentum(momentum)
    if cap is not None and cap < 1:
        raise InputError(f"max_patches_per_class is {cap}; expected at least 1, or None for every patch")


def _check_labels(labels: Tensor, ids: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise InputError(
            f"label {int(labels[wrong][0])} of sample {int(ids[wrong][0])}; expected 0 to {num_classes - 1}; "
            "nothing was changed"
        )


def _refuse_non_finite(strange: NonFinite, source: Source) -> None:
    count, smallest = strange.found()
    if count:
        names = [source.describe(i).sample_id for i in smallest]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise InputError(
            f"NaN or infinite features in {count} samples: {listing(names, len(names))}{more}; expected finite ones; "
            "look at these images and at the weights; nothing was changed"
        )


def _log_shapes(x_fu: Tensor, x_fu1: Tensor, use_local: bool) -> None:
    for name, features in (("x_fu1", x_fu1), ("x_fu", x_fu)):
        if features.ndim != 3:
            raise InputError(f"{name} has the shape {tuple(features.shape)}; expected (batch, cells, channels)")
    local, pooled = (f"(B, {f.shape[1]}, {f.shape[2]})" for f in (x_fu1, x_fu))
    if use_local:
        logger.info("  Using x_fu1 %s instead of x_fu %s", local, pooled)
    else:
        logger.info("  Using x_fu %s instead of x_fu1 %s", pooled, local)


def _log(report: PushReport, use_local: bool) -> None:
    logger.info("Patch collection statistics:")
    for c, patches in enumerate(report.patches_per_class):
        logger.info("  Class %d: %d patches", c, patches)
    logger.info("Updating prototypes using %s...", "LOCAL patches" if use_local else "GLOBAL features")
    for c, patches in enumerate(report.patches_per_class):
        logger.info("  Class %d: %d patches", c, patches)
        distances = [p.distance_before for p in report.of_class(c)]
        if distances:
            logger.info("    Updated %d prototypes, min_dist: %.4f", len(distances), min(distances))
        else:
            logger.warning("    Class %d has no sample: its prototypes are kept as they are", c)
    logger.info("%s prototype push completed!", "Local" if use_local else "Global")


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
        seed: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> PushReport:
        """Push with every patch (or, with ``use_local=False``, the pooled features); see :func:`push_prototypes`."""
        return push_prototypes(
            self,  # type: ignore[arg-type]
            dataloader,
            device,
            use_local=use_local,
            momentum=momentum,
            max_patches_per_class=max_patches_per_class,
            seed=seed,
            optimizer=optimizer,
        )

    def push_prototypes_local(
        self,
        dataloader: Iterable[Any],
        device: str | int | torch.device,
        momentum: float = 0.9,
        max_patches_per_class: int | None = 5000,
        seed: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> PushReport:
        """Push with at most ``max_patches_per_class`` patches of each class; see :func:`push_prototypes`."""
        return self.push_prototypes(dataloader, device, True, momentum, max_patches_per_class, seed, optimizer)
