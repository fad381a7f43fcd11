"""Report of a push: what it did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from protopush.nn.prototypes import Anchor
from protopush.push.guard import GuardDecision


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
    nearest_distance: float = float("nan")

    @property
    def duplicate_avoided(self) -> bool:
        """Whether it took a patch other than its nearest because another prototype stands for that one."""
        return self.choice > 1


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Attributes:
        use_local, max_patches_per_class, interpolation: as asked.
        momentum: with which prototypes were left: as asked, or as the guard settled it (1: nothing moved).
        prototypes: one record per pushed prototype.
        patches_per_class: patches that were seen.
        images_per_class: the images they came from.
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
        """The smallest distance of a prototype to its patch before the push (NaN if nothing was pushed)."""
        return min((p.distance_before for p in self.prototypes), default=float("nan"))

    @property
    def mean_dist(self) -> float:
        """The mean over prototypes of the distance to their patch before the push (NaN if nothing was pushed)."""
        return fmean(p.distance_before for p in self.prototypes) if self.prototypes else float("nan")

    @property
    def mean_dist_after(self) -> float:
        """The same after the push."""
        return fmean(p.distance_after for p in self.prototypes) if self.prototypes else float("nan")

    @property
    def mean_similarity_after(self) -> float:
        """The mean cosine of prototypes and their patches after the push (1 after a hard one; NaN without any)."""
        return fmean(p.anchor.similarity_after for p in self.prototypes) if self.prototypes else float("nan")

    @property
    def duplicates_avoided(self) -> int:
        """How many prototypes did not take their nearest patch because another one stands for it."""
        return sum(p.duplicate_avoided for p in self.prototypes)

    def of_class(self, class_index: int) -> list[PushedPrototype]:
        """The records of one class."""
        return [p for p in self.prototypes if p.class_index == class_index]

    def name(self, class_index: int) -> str:
        """The class's name, or ``Class 3``."""
        return self.class_names[class_index] if self.class_names else f"Class {class_index}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sums = {
            "min_dist": self.min_dist,
            "mean_dist": self.mean_dist,
            "mean_dist_after": self.mean_dist_after,
            "mean_similarity_after": self.mean_similarity_after,
        }
        values = asdict(self) | {key: value if value == value else None for key, value in sums.items()}
        for plain, record in zip(values["prototypes"], self.prototypes, strict=True):
            plain["duplicate_avoided"] = record.duplicate_avoided
        return values

    def __str__(self) -> str:
        kind = "local" if self.use_local else "global"
        lines = [
            f"{kind} push, momentum {self.momentum:g}: {len(self.prototypes)} prototypes in {self.seconds:.1f} s"
            + ("" if self.verified else " (anchors unverified)"),
            f"{'class':<20} {'images':>7} {'patches':>8} {'proto':>5} {'before':>7} {'after':>7}  nearest patch",
        ]
        for index, (images, patches) in enumerate(zip(self.images_per_class, self.patches_per_class, strict=True)):
            head = f"{self.name(index)[:20]:<20} {images:>7} {patches:>8}"
            if index in self.kept_classes:
                lines.append(
                    f"{head} {'-':>5} {'-':>7} {'-':>7}  no {'patch allowed' if patches else 'sample'}: prototypes kept"
                )
            for p in self.of_class(index):
                place = f"{p.anchor.file or p.anchor.sample_id} cell {p.anchor.cell}"
                if p.duplicate_avoided:
                    place += f" (choice {p.choice}, {p.distance_before - p.nearest_distance:+.4f})"
                lines.append(f"{head} {p.prototype:>5} {p.distance_before:>7.4f} {p.distance_after:>7.4f}  {place}")
                head = " " * len(head)
        lines += [*self.notes, *([] if self.guard is None else [str(self.guard)])]
        return "\n".join(lines)
