"""Patches that may become anchors by the decisions in force: the ``allow`` of a push."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from protopush.data.dataset import ImageDataset, check_masks, read_mask
from protopush.data.images import sha256_of
from protopush.data.manifest import Sample
from protopush.data.transforms import EvalTransform
from protopush.nn.prototypes import Anchor
from protopush.push.options import Allow
from protopush.runs.decisions import Decision, in_force

logger = logging.getLogger("protopush.training")

Grid = tuple[int, int]


class Barred:
    """Images, groups and patches that may not become anchors.

    An image is known by its name and by its SHA-256: under another name, or below another root, it is still the same.
    """

    def __init__(self) -> None:
        self.images: set[str] = set()
        self.groups: set[str] = set()
        self.patches: dict[str, set[tuple[Grid, int]]] = defaultdict(set)

    def add_image(self, *keys: str | None) -> None:
        """Bar an image by its name, its SHA-256, or both."""
        self.images.update(key for key in keys if key is not None)

    def add_patch(self, grid: Grid, cell: int, *keys: str | None) -> None:
        """Bar one patch of an image."""
        for key in keys:
            if key is not None:
                self.patches[key].add((grid, cell))

    def cells(self, keys: Sequence[str | None], group: str | None, grid: Grid) -> Tensor:
        """Bool (L,), True where a patch of the image may be chosen."""
        allowed = torch.ones(grid[0] * grid[1], dtype=torch.bool)
        if not self.images.isdisjoint(keys) or (group is not None and group in self.groups):
            return torch.zeros_like(allowed)
        for key in keys:
            cells = (cell for barred_grid, cell in self.patches.get(key or "", ()) if barred_grid == grid)
            allowed[[cell for cell in cells if 0 <= cell < len(allowed)]] = False
        return allowed


class Allowed:
    """What a list of decisions lets a push choose among some images.

    Args:
        decisions: all of them; those that were undone count no more.
        transform: what the model's images go through: it says where in the picture a patch lies.
    """

    def __init__(self, decisions: Sequence[Decision], transform: EvalTransform) -> None:
        self.transform = transform
        self.barred = Barred()
        holding = in_force(decisions)
        for made in holding:
            if made.kind == "image":
                self.barred.add_image(made.file, made.sha256)
            if made.kind == "prototype" and made.grid is not None and made.cell is not None:
                self.barred.add_patch(made.grid, made.cell, made.file, made.sha256)
        self.min_share = max((made.min_share or 0.0 for made in holding if made.kind == "mask"), default=0.0)
        self._digest = lru_cache(maxsize=None)(lambda sample: sha256_of(sample.image))

    def rule(self, samples: Sequence[Sample], more: Barred | None = None) -> Allow:
        """The ``allow`` of a push over these samples, whose places are the ids; ``more`` is barred as well."""
        lists = [self.barred] if more is None else [self.barred, more]

        def allow(ids: Tensor, grid: Grid) -> Tensor:
            return torch.stack([self._cells(samples[i], grid, lists) for i in ids.tolist()])

        return allow

    def forbids(self, anchor: Anchor, sample: Sample | None) -> bool:
        """Whether an anchor may not stay; ``sample`` is its image, where the data still has it."""
        allowed = self.barred.cells((anchor.file, anchor.sha256), anchor.group, anchor.grid)
        if sample is not None and sample.mask is not None and self.min_share:
            allowed = allowed & inside(sample, self.transform, anchor.grid, self.min_share)
        return 0 <= anchor.cell < len(allowed) and not bool(allowed[anchor.cell])

    def _cells(self, sample: Sample, grid: Grid, lists: Sequence[Barred]) -> Tensor:
        allowed = torch.ones(grid[0] * grid[1], dtype=torch.bool)
        for barred in lists:
            allowed &= barred.cells((sample.name, self._digest(sample)), sample.group, grid)
        if sample.mask is not None and self.min_share and bool(allowed.any()):
            allowed &= inside(sample, self.transform, grid, self.min_share)
        return allowed


def allow_of(decisions: Sequence[Decision], dataset: ImageDataset) -> Allow | None:
    """The ``allow`` of a push over a dataset; None where nothing is forbidden.

    Raises:
        InputError: a decision refers to masks, and the images have none, or bad ones.
    """
    holding = in_force(decisions)
    if not holding:
        return None
    if any(made.kind == "mask" for made in holding):
        logger.info("Decisions keep anchors inside masks; %d images have none", check_masks(dataset.samples))
    return Allowed(holding, dataset.eval_transform).rule(dataset.samples)


def inside(sample: Sample, transform: EvalTransform, grid: Grid, min_share: float) -> Tensor:
    """Bool (L,): whether at least ``min_share`` of a cell's box lies where the sample's mask is not 0.

    Raises:
        InputError: the mask can't be read, or has another size than its image.
    """
    mask = read_mask(sample)
    height, width = mask.shape
    view = transform.view((width, height))
    shares = []
    for cell in range(grid[0] * grid[1]):
        x0, y0, x1, y1 = view.cell_box(cell, grid)
        shares.append(float(mask[min(y0, height - 1) : y1, min(x0, width - 1) : x1].mean()))
    return torch.tensor(shares, dtype=torch.float64) >= min_share
