"""Prototypes of all classes: their slots, the mask of the slots in use, and the anchor of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.data.dataset import Provenance
from protopush.data.regions import Region, Regions
from protopush.errors import InputError


@dataclass(frozen=True)
class Anchor:
    """The real patch that a prototype stands for.

    Attributes:
        sample_id: what the dataset calls the sample (its index where it has no name).
        cell: the patch's number in its image, from 0.
        similarity: cosine of the prototype and the patch before the push moved the prototype.
        similarity_after: the same after the push; 1 after a hard push.
        file: the image file, relative to the data's root.
        sha256: of the file's bytes.
        group: lesion, patient, module, ...
        box: the patch, (x0, y0, x1, y1) in pixels of the upright original picture.
        sees: likewise, all that its feature can depend on.
        region: the box in pixels of the model's input: with the file, what distinguishes a patch from all others.
        pooled: whether it is the image's pooled feature and no patch.
        image_size: (width, height) of that picture.
        verified: False where the dataset could not say which file or view the patch came from.
        runner_up: similarity, before the push, of the best candidate elsewhere: in another image, or in another unit
            (image, group) of which no two prototypes may share one. The anchor's margin is its similarity less this.
    """

    sample_id: int | str
    cell: int
    region: Region
    similarity: float
    similarity_after: float
    file: str | None = None
    sha256: str | None = None
    group: str | None = None
    box: tuple[int, int, int, int] | None = None
    sees: tuple[int, int, int, int] | None = None
    image_size: tuple[int, int] | None = None
    pooled: bool = False
    verified: bool = True
    runner_up: float | None = None

    @classmethod
    def at(
        cls,
        origin: Provenance,
        cell: int,
        regions: Regions,
        similarity: float = 1.0,
        similarity_after: float = 1.0,
        pooled: bool = False,
        verified: bool = True,
        runner_up: float | None = None,
    ) -> Anchor:
        """The anchor for a patch of a sample; similarities are 1 where the prototype is made of that very patch."""
        return cls(
            sample_id=origin.sample_id,
            cell=cell,
            region=regions.boxes[cell],
            similarity=similarity,
            similarity_after=similarity_after,
            file=origin.file,
            sha256=origin.sha256,
            group=origin.group,
            box=origin.view.original_box(regions.boxes[cell]) if origin.view is not None else None,
            sees=origin.view.original_box(regions.sees[cell]) if origin.view is not None else None,
            image_size=origin.view.original if origin.view is not None else None,
            pooled=pooled,
            verified=verified,
            runner_up=runner_up,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Anchor:
        """The inverse of :meth:`to_dict`, also after a trip through JSON (which has no tuples)."""
        plain = dict(values)
        if "grid" in plain:
            raise InputError("its anchors were written before patches had regions; expected a newer run; train again")
        for name in ("region", "box", "sees", "image_size"):
            plain[name] = tuple(plain[name]) if plain.get(name) is not None else None
        return cls(**plain)


def plain_anchors(anchors: list[Anchor | None]) -> list[dict[str, Any] | None]:
    """Anchors as plain values."""
    return [None if anchor is None else anchor.to_dict() for anchor in anchors]


def anchors_from(plain: list[dict[str, Any] | None]) -> list[Anchor | None]:
    """The inverse."""
    return [None if values is None else Anchor.from_dict(values) for values in plain]


class PrototypeManager(nn.Module):
    """Unit vectors, each owned by one class.

    Args:
        num_classes: C.
        num_prototypes: prototypes in use per class, one number for all classes or one for each.
        dim: D, the embedding's size.
        max_prototypes: slots per class, at least ``num_prototypes``; the rest is room to grow.
        anchor_dim: C, where prototypes are to be live: computed, in every forward, from their anchors' features.
        crop_size: pixels of a side of the largest window, where these features are to be computed, in every step, from
            the anchors' own pixels.

    Attributes:
        prototypes: Parameter (C * max_prototypes, D); slots of one class lie together.
        valid_mask: bool (C * max_prototypes), the slots in use.
        anchors: one :class:`Anchor` or None per slot.
        anchor_features: (C * max_prototypes, anchor_dim), the backbone's features at the anchors; None without.
        anchor_ids, anchor_cells: int64, sample and cell that they come from; id -1 where there is no anchor.
        anchor_crops: uint8 (C * max_prototypes, 3, crop_size, crop_size), their pixels, in the upper left corner.
        crops_of: int64 (C * max_prototypes, 4), sample and cell, height and width of each crop; id -1: none.

    Example:
        >>> manager = PrototypeManager(num_classes=3, num_prototypes=2, dim=8)
        >>> manager.get_prototype_indices()
        [(0, 2), (2, 4), (4, 6)]
        >>> manager.unit().shape
        torch.Size([3, 2, 8])
        >>> manager.index(2, 1), manager.slot(5), manager.anchor(2, 1)
        (5, (2, 1), None)
    """

    valid_mask: Tensor
    anchor_features: Tensor | None
    anchor_ids: Tensor | None
    anchor_cells: Tensor | None
    anchor_crops: Tensor | None
    crops_of: Tensor | None

    def __init__(
        self,
        num_classes: int,
        num_prototypes: int | Sequence[int],
        dim: int,
        max_prototypes: int | None = None,
        anchor_dim: int | None = None,
        crop_size: int | None = None,
    ) -> None:
        super().__init__()
        counts = [num_prototypes] * num_classes if isinstance(num_prototypes, int) else list(num_prototypes)
        slots = max_prototypes or max(counts, default=0)
        if num_classes < 1 or len(counts) != num_classes or min(counts) < 1 or max(counts) > slots:
            raise InputError(
                f"{counts} prototypes for {num_classes} classes of {slots} slots; "
                "expected at least one per class and no more than max_prototypes"
            )
        self.num_classes = num_classes
        self.max_prototypes = slots
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_classes * slots, dim), dim=-1))
        used = torch.arange(slots).expand(num_classes, slots) < torch.tensor(counts).unsqueeze(1)
        self.register_buffer("valid_mask", used.flatten())
        total = num_classes * slots
        self.register_buffer("anchor_features", None if anchor_dim is None else torch.zeros(total, anchor_dim))
        self.register_buffer("anchor_ids", None if anchor_dim is None else torch.full((total,), -1))
        self.register_buffer("anchor_cells", None if anchor_dim is None else torch.zeros(total, dtype=torch.int64))
        pixels = None if crop_size is None else torch.zeros(total, 3, crop_size, crop_size, dtype=torch.uint8)
        self.register_buffer("anchor_crops", pixels)
        self.register_buffer("crops_of", None if crop_size is None else torch.full((total, 4), -1))
        self.anchors: list[Anchor | None] = [None] * total

    @property
    def dim(self) -> int:
        """D, the embedding's size."""
        return self.prototypes.shape[1]

    def get_prototype_indices(self) -> list[tuple[int, int]]:
        """(start, end) of the slots of each class, end exclusive; ``valid_mask`` marks those in use."""
        size = self.max_prototypes
        return [(c * size, (c + 1) * size) for c in range(self.num_classes)]

    @property
    def is_live(self) -> bool:
        """Whether prototypes are computed from the features of their anchors, at every step."""
        return self.anchor_features is not None

    def has_crop(self) -> Tensor:
        """Which rows hold the pixels of the anchor that they have now, bool; none without ``crop_size``."""
        if self.crops_of is None or self.anchor_ids is None or self.anchor_cells is None:
            return torch.zeros_like(self.valid_mask)
        anchored = torch.stack([self.anchor_ids, self.anchor_cells], dim=1)
        return (self.anchor_ids >= 0) & (self.crops_of[:, :2] == anchored).all(dim=1)

    def index(self, c: int, k: int) -> int:
        """The row of prototype ``k`` of class ``c`` in ``prototypes``."""
        return c * self.max_prototypes + k

    def slot(self, row: int) -> tuple[int, int]:
        """(class, prototype) of a row: the inverse of :meth:`index`."""
        return divmod(row, self.max_prototypes)

    def anchor(self, c: int, k: int) -> Anchor | None:
        """What prototype ``k`` of class ``c`` stands for; None if it was never pushed."""
        return self.anchors[self.index(c, k)]

    def set_anchor(self, c: int, k: int, anchor: Anchor | None) -> None:
        """Record what a prototype stands for; its vector stays."""
        self.anchors[self.index(c, k)] = anchor

    def used_slots(self) -> list[tuple[int, int]]:
        """(class, prototype) of each slot in use, in order."""
        return [self.slot(row) for row in self.valid_mask.nonzero().flatten().tolist()]

    def used_of(self, c: int) -> list[int]:
        """The prototypes of a class that are in use, in order."""
        used: list[int] = self.mask()[c].nonzero().flatten().tolist()
        return used

    def unit(self) -> Tensor:
        """The prototypes with unit norm, (num_classes, max_prototypes, D)."""
        return F.normalize(self.prototypes, dim=-1).view(self.num_classes, self.max_prototypes, -1)

    def mask(self) -> Tensor:
        """The slots in use, bool (num_classes, max_prototypes)."""
        return self.valid_mask.view(self.num_classes, self.max_prototypes)
