"""Drawn images with known parts: metrics have exact values on them, and a model that works shows that it does.

Of each image it is known which parts it has, where they are, and what is not part of it at all.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from protopush.data.dataset import Provenance
from protopush.data.transforms import View
from protopush.errors import InputError

Colour = tuple[int, int, int]

# A part is a shape in a colour. Class c has parts c, c + 1 and c + 2, so that neighbours share two of three.
PARTS: dict[str, tuple[str, Colour]] = {
    "blue disc": ("disc", (40, 70, 190)),
    "white ring": ("ring", (245, 240, 235)),
    "black cross": ("cross", (25, 20, 20)),
    "red square": ("square", (200, 40, 40)),
    "green stripes": ("stripes", (40, 140, 70)),
    "yellow triangle": ("triangle", (235, 205, 60)),
}
PARTS_EACH = 3
SKIN, LESION = np.array([222.0, 178.0, 150.0]), np.array([140.0, 92.0, 70.0])


@dataclass(frozen=True)
class Drawing:
    """An image with all that is known of it.

    Attributes:
        picture: RGB.
        mask: bool (H, W), the object with its parts.
        points: (number of part names, 2), x and y in pixels of the middle of each part; NaN where it isn't shown.
    """

    picture: Image.Image
    mask: np.ndarray
    points: np.ndarray


class ProceduralParts(Dataset[tuple[Tensor, int, int]]):
    """Spots on skin, each with the parts of its class, and a ruler beside it that means nothing.

    Items are (image (3, H, W) in [0, 1], label, index); labels go round. An item depends on ``seed`` and its index
    alone, so that any number of items has the same beginning. The push can read it: it offers ``eval_view``,
    ``describe``, ``labels`` and ``groups``.

    Args:
        num_samples: how many.
        num_classes: 2 to 6; class ``c`` has parts ``c``, ``c + 1`` and ``c + 2`` of :data:`PARTS` (round the end).
        size: (height, width) in pixels, at least 32.
        seed: of everything that is drawn.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> data = ProceduralParts(4, num_classes=2, size=(64, 64))
        >>> image, label, index = data[3]
        >>> image.shape, label, data.part_names[:2], data.keypoints(3)[1].tolist()
        (torch.Size([3, 64, 64]), 1, ('blue disc', 'white ring'), [False, True, True, True, False, False])
    """

    part_names = tuple(PARTS)

    def __init__(self, num_samples: int, num_classes: int = 3, size: tuple[int, int] = (64, 64), seed: int = 0) -> None:
        if num_samples < 1 or not 2 <= num_classes <= len(PARTS) or min(size) < 32:
            raise InputError(
                f"{num_samples} samples, {num_classes} classes, {size[0]}x{size[1]} pixels; expected at least one "
                f"sample, 2 to {len(PARTS)} classes, and sides of at least 32"
            )
        self.num_samples, self.num_classes, self.size, self.seed = num_samples, num_classes, size, seed
        self.class_names = [f"class {c}" for c in range(num_classes)]

    @property
    def labels(self) -> list[int]:
        """The label of each item."""
        return [index % self.num_classes for index in range(self.num_samples)]

    @property
    def groups(self) -> list[str | None]:
        """None for each item: every spot is a lesion of its own."""
        return [None] * self.num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        pixels = np.asarray(self.draw(index).picture, dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), index % self.num_classes, index

    def eval_view(self) -> ProceduralParts:
        """Itself: there is no augmentation."""
        return self

    def describe(self, index: int) -> Provenance:
        """The item's name, and where its cells lie."""
        return Provenance(self.name(index), view=View.of(self.size[::-1], self.size))

    def name(self, index: int) -> str:
        """What :meth:`write` calls the item's file."""
        return f"images/{index:05d}.png"

    def mask(self, index: int) -> Tensor:
        """The object, bool (H, W)."""
        return torch.from_numpy(self.draw(index).mask)

    def keypoints(self, index: int) -> tuple[Tensor, Tensor]:
        """The middle of each part in pixels, float64 (P, 2) as x and y, and whether it is shown, bool (P,)."""
        points = torch.from_numpy(self.draw(index).points)
        return points.nan_to_num(), points[:, 0].isfinite()

    def draw(self, index: int) -> Drawing:
        """The item as it is drawn.

        Raises:
            IndexError: there is no such item.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"item {index} of {self.num_samples}")
        random = np.random.default_rng([self.seed, index])
        height, width = self.size
        mask, middle, radius = _spot(random, height, width)
        noise = random.normal(0, 8, (height, width, 1)) + random.normal(0, 12)
        pixels = np.where(mask[..., None], LESION, SKIN) + noise
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw, points = ImageDraw.Draw(picture), np.full((len(PARTS), 2), np.nan)
        turn, part = random.uniform(0, 2 * np.pi), 0.3 * radius
        for place in range(PARTS_EACH):  # a third of the circle apart, so that they never overlap
            number = (index % self.num_classes + place) % len(PARTS)
            angle = turn + 2 * np.pi * place / PARTS_EACH + random.uniform(-0.2, 0.2)
            points[number] = middle + 0.55 * radius * np.array([np.cos(angle), np.sin(angle)])
            _draw_part(draw, *list(PARTS.values())[number], points[number], part)
        _draw_ruler(draw, random, mask)
        return Drawing(picture, mask, points)

    def write(self, folder: Path) -> Path:
        """Write ``images/*.png``, ``masks/*.png`` and ``manifest.csv`` with the splits; returns the manifest.

        Of ten images of each class, seven are for training, one for validation and two for testing.
        """
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "label", "split", "mask"))
            for index in range(len(self)):
                drawing, mask = self.draw(index), self.name(index).replace("images", "masks")
                drawing.picture.save(folder / self.name(index))
                Image.fromarray(drawing.mask.astype(np.uint8) * 255).save(folder / mask)
                split = (["train"] * 7 + ["val"] + ["test"] * 2)[index // self.num_classes % 10]
                rows.writerow((self.name(index), self.class_names[index % self.num_classes], split, mask))
        return folder / "manifest.csv"


def _spot(random: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A round spot somewhere in the upper left four fifths: its mask, its middle (x, y) and its radius."""
    radius = min(height, width) * random.uniform(0.28, 0.36)
    middle = np.array([random.uniform(radius, 0.88 * side - radius) for side in (width, height)])
    y, x = np.mgrid[:height, :width] + 0.5
    return np.hypot(x - middle[0], y - middle[1]) <= radius, middle, radius


def _draw_part(draw: ImageDraw.ImageDraw, shape: str, colour: Colour, at: np.ndarray, radius: float) -> None:
    x, y = float(at[0]), float(at[1])
    left, top, right, bottom = box = (x - radius, y - radius, x + radius, y + radius)
    inner, line = 0.8 * radius, max(1, round(radius / 2))
    if shape == "disc":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=line)
    elif shape == "square":
        draw.rectangle((x - inner, y - inner, x + inner, y + inner), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, top), (left, y + inner), (right, y + inner)], fill=colour)
    elif shape == "cross":
        draw.line((left, y, right, y), fill=colour, width=line)
        draw.line((x, top, x, bottom), fill=colour, width=line)
    else:
        for middle in (y - inner, y, y + inner):
            draw.line((left, middle, right, middle), fill=colour, width=max(1, line // 2))


def _draw_ruler(draw: ImageDraw.ImageDraw, random: np.random.Generator, mask: np.ndarray) -> None:
    """A ruler below or to the right of half of the spots, of whatever class; never on one."""
    height, width = mask.shape
    if random.random() < 0.5:
        return
    tick = max(2, round(0.06 * min(height, width)))
    if random.random() < 0.5:
        for x in range(0, width, 2 * tick):
            draw.line((x, height - tick, x, height), fill=(20, 20, 20))
    else:
        for y in range(0, height, 2 * tick):
            draw.line((width - tick, y, width, y), fill=(20, 20, 20))
