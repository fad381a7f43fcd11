"""Reports of a push, of growth and of pruning: what each did, as data and as a table."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from protopush.nn.prototypes import Anchor
from protopush.push.guard import GuardDecision, Score, changes_of

logger = logging.getLogger("protopush.push")

NAN = float("nan")


@dataclass(frozen=True)
class PushedPrototype:
    """One prototype. Distances are ``sqrt(2 - 2 * cosine)`` to its anchor's patch, in [0, 2].

    ``choice`` is 1 where it took its nearest patch, 2 where another prototype of its class stands for that one, and so
    on; ``distance_before - nearest_distance`` is what that cost.
    """

    class_index: int
    prototype: int
    distance_before: float
    distance_after: float
    anchor: Anchor
    choice: int = 1
    nearest_distance: float = NAN

    @property
    def duplicate_avoided(self) -> bool:
        """Whether it took a patch other than its nearest because another prototype stands for that one."""
        return self.choice > 1


@dataclass(frozen=True)
class PushReport:
    """What a push did. Distances and similarities over no prototypes are NaN.

    Attributes:
        use_local, max_patches_per_class, interpolation: as asked.
        momentum: with which prototypes were left: as asked, or as the guard settled it (1: nothing moved).
        prototypes: one record per pushed prototype.
        patches_per_class, images_per_class: patches that were seen, and the images they came from.
        kept_classes: classes without a sample, or without a patch that may be chosen: their prototypes are as before.
        verified: whether anchors are known to name the very patches.
        notes: why not, and where fewer images than prototypes made anchors less than unique.
        seconds: time taken.
        class_names: of the model, where it has them.
        unique: of what no two prototypes of a class share one, for each class.
        guard: what the guard saw and did; None without one.
    """

    use_local: bool
    momentum: float
    max_patches_per_class: int | None
    prototypes: list[PushedPrototype]
    patches_per_class: list[int]
    images_per_class: list[int]
    kept_classes: list[int]
    verified: bool
    notes: list[str]
    seconds: float
    class_names: list[str] = field(default_factory=list)
    unique: list[str] = field(default_factory=list)
    interpolation: str = "linear"
    guard: GuardDecision | None = None

    @property
    def min_dist(self) -> float:
        """The smallest distance of a prototype to its patch before the push."""
        return min((p.distance_before for p in self.prototypes), default=NAN)

    @property
    def mean_dist(self) -> float:
        """The mean over prototypes of the distance to their patch before the push."""
        return fmean(p.distance_before for p in self.prototypes) if self.prototypes else NAN

    @property
    def mean_dist_after(self) -> float:
        """The same after the push."""
        return fmean(p.distance_after for p in self.prototypes) if self.prototypes else NAN

    @property
    def mean_similarity_after(self) -> float:
        """The mean cosine of prototypes and their patches after the push; 1 after a hard one."""
        return fmean(p.anchor.similarity_after for p in self.prototypes) if self.prototypes else NAN

    @property
    def duplicates_avoided(self) -> int:
        """How many prototypes did not take their nearest patch because another one stands for it."""
        return sum(p.duplicate_avoided for p in self.prototypes)

    def of_class(self, class_index: int) -> list[PushedPrototype]:
        """The records of one class."""
        return [p for p in self.prototypes if p.class_index == class_index]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        for name in ("min_dist", "mean_dist", "mean_dist_after", "mean_similarity_after"):
            values[name] = getattr(self, name) if self.prototypes else None
        for plain, record in zip(values["prototypes"], self.prototypes, strict=True):
            plain["duplicate_avoided"] = record.duplicate_avoided
        return values

    def __str__(self) -> str:
        kind, width = "local" if self.use_local else "global", _width(self.class_names)
        lines = [
            f"{kind} push, momentum {self.momentum:g}: {len(self.prototypes)} prototypes in {self.seconds:.1f} s"
            + ("" if self.verified else " (anchors unverified)"),
            f"{'class':<{width}} {'images':>7} {'patches':>8} {'proto':>5} {'before':>7} {'after':>7}  nearest patch",
        ]
        for index, (images, patches) in enumerate(zip(self.images_per_class, self.patches_per_class, strict=True)):
            head = f"{_name(self.class_names, index):<{width}} {images:>7} {patches:>8}"
            if index in self.kept_classes:
                why = "patch allowed" if patches else "sample"
                lines.append(f"{head} {'-':>5} {'-':>7} {'-':>7}  no {why}: prototypes kept")
            for p in self.of_class(index):
                place = _place(p.anchor)
                if p.duplicate_avoided:
                    place += f" (choice {p.choice}, {p.distance_before - p.nearest_distance:+.4f})"
                lines.append(f"{head} {p.prototype:>5} {p.distance_before:>7.4f} {p.distance_after:>7.4f}  {place}")
                head = " " * len(head)
        lines += [*self.notes, *([] if self.guard is None else [str(self.guard)])]
        return "\n".join(lines)


def _place(anchor: Anchor) -> str:
    return f"{anchor.file or anchor.sample_id} cell {anchor.cell}"


def _name(class_names: list[str], index: int) -> str:
    return class_names[index] if class_names else f"Class {index}"


def _width(class_names: list[str]) -> int:
    """Of the column of names, which are never cut off: two classes could become one."""
    return max(20, *map(len, class_names)) if class_names else 20


@dataclass(frozen=True)
class ClassCoverage:
    """How well one class is covered; a sample's coverage is its best cosine to a prototype of its class, [-1, 1].

    Attributes:
        samples: how many were read.
        prototypes_before, prototypes_after, slots: in use, and in use or free.
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
    """What growth or pruning did, beside the options as asked.

    Attributes:
        classes: the coverage of each class.
        notes: what is worth a warning.
        val_before, val_after: the scores on validation images; None without a val_loader.
        seconds, class_names: as of :class:`PushReport`.
    """

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

    def _table(self, title: str, changes: list[tuple[int, str]]) -> str:
        """The title, a table of the classes with the changes (class, text) of each beside it, notes and validation."""
        width = _width(self.class_names)
        lines = [title, f"{'class':<{width}} {'samples':>7} {'prototypes':>12} {'before':>7} {'after':>7}"]
        for c in self.classes:
            count = f"{c.prototypes_before} -> {c.prototypes_after}/{c.slots}"
            figures = (f"{'-' if value is None else format(value, '.4f'):>7}" for value in (c.before, c.after))
            row = f"{_name(self.class_names, c.class_index):<{width}} {c.samples:>7} {count:>12} {' '.join(figures)}"
            beside = [text for number, text in changes if number == c.class_index] + ([c.note] if c.note else [])
            lines.append("  ".join([row, *beside[:1]]))
            lines += [" " * len(row) + "  " + text for text in beside[1:]]
        effect = "not measured (no val_loader)"
        if self.val_before is not None and self.val_after is not None:
            effect = changes_of(self.val_before, self.val_after)
        return "\n".join([*lines, *self.notes, f"validation: {effect}"])


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
        return f"slot {self.prototype}: {_place(self.anchor)}, gain {self.gain:.4f}"


@dataclass(frozen=True)
class GrowthReport(ResizeReport):
    """What growth did: the new prototypes, and whether their anchors are known to name the very patches."""

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


@dataclass(frozen=True)
class PrunedPrototype:
    """One prototype that was removed.

    Attributes:
        class_index, prototype: class and slot.
        reason: ``duplicate``, or ``unused``: it gave the largest contribution to no sample of its class.
        twin, cosine: the slot that it doubled, and its cosine to that one.
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
class PruningReport(ResizeReport):
    """What pruning did: the prototypes that are gone."""

    max_cosine: float
    unused: bool
    keep_at_least: int
    removed: list[PrunedPrototype]

    def __str__(self) -> str:
        title = f"pruning: {len(self.removed)} prototypes removed in {self.seconds:.1f} s"
        return self._table(title, [(gone.class_index, str(gone)) for gone in self.removed])
