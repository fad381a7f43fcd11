"""Growth: a class whose samples are badly covered gets another prototype, at the patch that helps them most."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.guard import Score, Validation
from protopush.push.options import Allow
from protopush.push.protocol import Slots, class_names_of, resolve_device, unwrap
from protopush.push.reader import DatasetReader, Reader, read_through
from protopush.push.resize.coverage import ClassCoverage, class_coverage, coverage_lines, effect, own_similarity
from protopush.push.resize.facility_location import Wish, coverage_after, find_gains
from protopush.push.resize.slots import all_or_nothing, forget, live_features, move_in, slot_mask

logger = logging.getLogger("protopush.push")


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


@dataclass(frozen=True)
class GrowthReport:
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

    use_local: bool
    quantile: float
    min_coverage: float
    per_class: int
    max_samples: int
    classes: list[ClassCoverage]
    added: list[GrownPrototype]
    verified: bool
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
        for new in self.added:
            where = f"{new.anchor.file or new.anchor.sample_id} cell {new.anchor.cell}"
            told.setdefault(new.class_index, []).append(f"slot {new.prototype}: {where}, gain {new.gain:.4f}")
        title = (
            f"growth, coverage at quantile {self.quantile:g} below {self.min_coverage:g}: "
            f"{len(self.added)} prototypes added in {self.seconds:.1f} s"
            + ("" if self.verified else " (anchors unverified)")
        )
        table = coverage_lines(self.classes, self.class_names, told)
        return "\n".join([title, *table, *self.notes, effect(self.val_before, self.val_after)])


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
        max_samples: of a class, that are looked at for a new prototype: the worst covered ones.
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        allow: which patches may become prototypes: ids (B,) and grid (rows, columns) to bool (B, L), on the CPU.
        val_loader: validation images: the report then tells the effect.
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
    net = unwrap(model)
    target = resolve_device(net, device)
    slot_mask(net.head.proto_manager, "grow")
    live = getattr(net.head.proto_manager, "anchor_features", None) is not None
    if live:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    slots = Slots.of(net.head.proto_manager)
    with preserve_state(model, dataloader, val_loader):
        source = read_through(dataloader)
        _check_live(live, source)
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        gains, why = find_gains(net, source, slots, before, wish)
        coverage, runner_ups = coverage_after(net, source, slots, before, gains, wish)
        anchors = [
            Anchor.at(gain.origin, gain.cell, gain.grid, verified=source.verified, runner_up=runner_up)
            for gain, runner_up in zip(gains, runner_ups, strict=True)
        ]
        features = live_features(net, source, slots, gains, use_local) if live and gains else None
        validation = None if val_loader is None else Validation(model, net, val_loader, target)
        val_before = val_after = None if validation is None else validation.score()
        with all_or_nothing(net, slots):
            if gains:
                move_in(net, slots, gains, anchors, features, use_local)
                val_after = None if validation is None else validation.score()
    if optimizer is not None and gains:
        forget(optimizer, net, slots, gains)
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
        notes=_notes(source, slots, why),
        val_before=val_before,
        val_after=val_after,
        seconds=time.perf_counter() - started,
        class_names=class_names_of(net, len(slots.rows)),
    )
    for note in report.notes:
        logger.warning("%s", note)
    logger.info("%s", str(report).splitlines()[0])
    return report


def _check(wish: Wish) -> None:
    if wish.per_class < 1 or wish.max_samples < 1:
        name, value = ("per_class", wish.per_class) if wish.per_class < 1 else ("max_samples", wish.max_samples)
        raise InputError(f"{name} is {value}; expected at least 1")
    if not 0.0 <= wish.quantile <= 1.0:
        raise InputError(f"quantile is {wish.quantile}; expected 0 (the worst sample) to 1, such as 0.1")
    if not -1.0 <= wish.min_coverage <= 1.0:
        raise InputError(f"min_coverage is {wish.min_coverage}; expected a cosine, -1 to 1, such as 0.7")


def _check_live(live: bool, source: Reader) -> None:
    if live and not isinstance(source, DatasetReader):
        raise InputError(
            "live anchors are read again by their index, but the loader is a stream; expected a DataLoader over a "
            "dataset with len() and []; nothing was changed"
        )


def _notes(source: Reader, slots: Slots, why: dict[int, str]) -> list[str]:
    notes = [source.note] if source.note else []
    if why and not bool(((slots.rows >= 0) & ~slots.used).any()):
        notes.append("no class has a free slot: make the head with max_prototypes above num_prototypes")
    return notes
