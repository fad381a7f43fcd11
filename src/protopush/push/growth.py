"""Growth: a class whose samples are badly covered gets another prototype, at the patch that helps them most."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from protopush.data.provenance import Provenance
from protopush.distributed import gather_objects, rank_and_size
from protopush.errors import InputError
from protopush.prototypes import Anchor
from protopush.push.candidates import TIE
from protopush.push.contract import Pushable, Slots, resolve_device, unwrap
from protopush.push.coverage import (
    ClassCoverage,
    OwnSimilarity,
    all_or_nothing,
    connections_of,
    coverage_lines,
    effect,
    embedded,
    in_order,
    own_similarity,
    quantile_of,
    slot_mask,
)
from protopush.push.engine import _class_names
from protopush.push.guard import Score, Validation
from protopush.push.live import POOLED, _features
from protopush.push.search import Allow, _raise_together, _refuse_non_finite
from protopush.push.source import DatasetSource, Source, read_through
from protopush.push.tally import NonFinite
from protopush.push.update import reset_moments
from protopush.untouched import untouched

logger = logging.getLogger("protopush.push")

TOGETHER = 16  # classes whose patches are in memory at a time
BLOCK = 2**24  # cosines computed at a time


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

    Two passes over the data at most: one over all of it, then the worst samples again, and classes of more than
    ``max_samples`` that have grown. Memory: 4 * K + 16 bytes a sample, and the patches of the worst samples of 16
    classes (of all that grow, where the loader is a stream): 16 * ``max_samples`` * L * D * 4 bytes on each rank. The
    search costs (``max_samples`` * L)^2 * D multiplications a class. The result is the same for any batch size, order
    and number of workers and ranks; nothing is changed if it fails. Under ``torch.distributed`` every rank must call it.

    Args:
        model: as for :func:`protopush.push_prototypes`, its manager with a ``valid_mask``; slots are free where
            ``max_prototypes`` is above ``num_prototypes``. A new prototype starts with the mean connection of its class.
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
    _check_arguments(per_class, quantile, min_coverage, max_samples)
    net = unwrap(model)
    manager: Any = net.head.proto_manager
    slot_mask(manager, "grow")
    target = resolve_device(net, device)
    live = getattr(manager, "anchor_features", None) is not None
    if live:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    slots = Slots.of(manager)
    wish = _Wish(per_class, quantile, min_coverage, max_samples, use_local, allow)
    with untouched(model, dataloader, val_loader):
        source = read_through(dataloader)
        _refuse_live_stream(live, source)
        verified, note = source.verified, source.note  # a stream knows only once it was read
        before = own_similarity(net, source, slots.unit, slots.used, use_local)
        found, notes = _search(net, source, slots, before, wish)
        places, features = _place(net, source, slots, found, use_local, live)
        after = _grown_coverage(net, source, slots, before, found, places, wish)
        validation = None if val_loader is None else Validation(model, net, val_loader, target)
        val_before = None if validation is None else validation.score()
