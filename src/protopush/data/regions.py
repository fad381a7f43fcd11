"""Regions of patches: the rectangle that each stands for, and all pixels that its feature can depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

Region = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the model's input; x1 and y1 exclusive."""


@dataclass(frozen=True)
class Regions:
    """Where the L patches of an image lie. Regions may overlap and be of any sizes.

    Attributes:
        size: (height, width) of the model's input.
        boxes: L regions, what is drawn: the cell of a feature map, or the window.
        sees: L regions, outside which no pixel can change the patch's feature; the whole image where it is not known.

    Example:
        >>> regions = Regions.grid((2, 2), (8, 16))
        >>> regions.boxes[1], regions.sees[1], regions.is_local
        ((8.0, 0.0, 16.0, 4.0), (0.0, 0.0, 16.0, 8.0), False)
    """

    size: tuple[int, int]
    boxes: tuple[Region, ...]
    sees: tuple[Region, ...]

    @classmethod
    def grid(cls, grid: tuple[int, int], size: tuple[int, int], sees: Sequence[Region] | None = None) -> Regions:
        """The cells of a feature map (rows, columns), in row-major order."""
        return _grid(tuple(grid), tuple(size), None if sees is None else tuple(sees))

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Regions:
        """One patch: the image, which is what a pooled feature stands for."""
        return cls.grid((1, 1), size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Regions:
        """The inverse of :meth:`to_dict`."""
        boxes, sees = (tuple(map(tuple, values[name])) for name in ("boxes", "sees"))
        return cls(tuple(values["size"]), boxes, sees)

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def is_local(self) -> bool:
        """Whether each patch sees its box alone, so that nothing outside the box can change it."""
        return self.sees == self.boxes

    @property
    def reach(self) -> str:
        """What a patch sees: its ``"box"`` alone, ``"more"``, or ``"all"``, which is the whole image."""
        if self.is_local:
            return "box"
        return "all" if set(self.sees) == set(Regions.whole(self.size).boxes) else "more"

    @cached_property
    def is_grid(self) -> bool:
        """Whether the boxes are the cells of a feature map, row by row."""
        rows, columns = (len({box[axis] for box in self.boxes}) for axis in (1, 0))
        return self.boxes == _cells((rows, columns), self.size)

    @cached_property
    def raster(self) -> tuple[int, int]:
        """(rows, columns) of the coarsest even grid whose lines hold every edge of every box.

        Of a feature map, its own cells; of windows, squares of the largest step that divides all their edges.
        """
        if self.is_grid:
            rows, columns = (len({box[axis] for box in self.boxes}) for axis in (1, 0))
            return rows, columns
        rows, columns = (
            side // math.gcd(side, *(math.floor(edge) for box in self.boxes for edge in box[axis::2]))
            for side, axis in zip(self.size, (1, 0), strict=True)
        )
        return rows, columns

    def map(self, values: Tensor) -> Tensor:
        """Values of the patches (..., L) as a map (..., rows, columns) on ``raster``.

        Each square takes the largest value of the patches that cover it, and -inf where there is none.

        Example:
            >>> pair = Regions((2, 6), ((0.0, 0.0, 4.0, 2.0), (2.0, 0.0, 6.0, 2.0)), ())
            >>> pair.map(torch.tensor([1.0, 2.0])).tolist()
            [[1.0, 2.0, 2.0]]
        """
        if values.shape[-1] != len(self):
            raise ValueError(f"{values.shape[-1]} values for {len(self)} patches")
        if self.is_grid:
            return values.view(*values.shape[:-1], *self.raster)
        (rows, columns), (height, width) = self.raster, self.size
        drawn = values.new_full((*values.shape[:-1], rows, columns), -torch.inf)
        for value, (x0, y0, x1, y1) in zip(values.unbind(dim=-1), self.boxes, strict=True):
            down = slice(round(y0 * rows / height), round(y1 * rows / height))
            across = slice(round(x0 * columns / width), round(x1 * columns / width))
            drawn[..., down, across] = torch.maximum(drawn[..., down, across], value[..., None, None])
        return drawn


def _cells(grid: tuple[int, int], size: tuple[int, int]) -> tuple[Region, ...]:
    (rows, columns), (height, width) = grid, size
    return tuple(
        (c * width / columns, r * height / rows, (c + 1) * width / columns, (r + 1) * height / rows)
        for r in range(rows)
        for c in range(columns)
    )


@lru_cache(maxsize=256)
def _grid(grid: tuple[int, int], size: tuple[int, int], sees: tuple[Region, ...] | None) -> Regions:
    boxes = _cells(grid, size)
    return Regions(size, boxes, sees or ((0.0, 0.0, float(size[1]), float(size[0])),) * len(boxes))
