"""Small inline pictures. What is drawn over them is SVG, so that the pixels below stay as they were."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from protopush.data.images import read_image
from protopush.data.transforms import Box
from protopush.errors import InputError
from protopush.explain.figure_style import Rect, map_colours, scaled
from protopush.report.context import Frame, Picture

QUALITY = 80
SHARP = 1.5  # pixels of the file to one of the page, for finer screens
HEAT = 0.55  # how much of the picture the similarity map hides


def embed(picture: Image.Image, width: int, height: int, alt: str, sharp: float = SHARP) -> Picture:
    """A picture as large as it can be in ``width`` x ``height`` CSS pixels; its file is never larger than its source.

    Example:
        >>> shown = embed(Image.new("RGB", (400, 200)), 100, 100, "grey")
        >>> shown.width, shown.height, shown.uri[:23]
        (100, 50, 'data:image/jpeg;base64,')
    """
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if scale * sharp < 1:
        stored = (max(1, round(size[0] * sharp)), max(1, round(size[1] * sharp)))
        picture = picture.resize(stored, Image.Resampling.LANCZOS)
    return Picture(_uri(picture), size[0], size[1], alt)


def _uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + b64encode(data.getvalue()).decode("ascii")


def part(picture: Image.Image, box: Rect, side: int, alt: str, colour: int = 0, sharp: float = SHARP) -> Picture:
    """The box, framed, with half its size around it on every side where the picture has that."""
    reach = 2 * max(box[2] - box[0], box[3] - box[1])
    seen = [*_around(box[0], box[2], reach, picture.width), *_around(box[1], box[3], reach, picture.height)]
    x0, x1, y0, y1 = (round(edge) for edge in seen)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    shown = embed(picture.crop((x0, y0, x1, y1)), side, side, alt, sharp)
    return framed(shown, [(box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)], (x1 - x0, y1 - y0), colours=[colour])


def _around(low: float, high: float, reach: float, limit: int) -> tuple[float, float]:
    span = min(reach, limit)
    start = min(max((low + high - span) / 2, 0), limit - span)
    return start, start + span


def framed(
    shown: Picture,
    boxes: Sequence[Rect],
    size: tuple[float, float],
    labels: Sequence[str] = (),
    colours: Sequence[int] = (0,),
) -> Picture:
    """The picture with boxes over it, which are in pixels of the picture at (width, height) ``size``."""
    frames = []
    for i, box in enumerate(boxes):
        x0, y0, x1, y1 = (round(edge, 2) for edge in scaled(box, size, (100, 100)))
        label, colour = labels[i] if labels else "", colours[i % len(colours)]
        frames.append(Frame(x0, y0, round(x1 - x0, 2), round(y1 - y0, 2), label, colour))
    return replace(shown, frames=tuple(frames))


def heat(
    picture: Image.Image, seen: Rect, values: Sequence[Sequence[float]], side: int, alt: str, sharp: float = SHARP
) -> tuple[Picture, tuple[float, float]]:
    """A similarity map over the part of a picture that the model sees, and its lowest and highest value.

    Args:
        picture: RGB.
        seen: what the model sees, in the picture's pixels.
        values: rows of the map.
        side: of the square that the result fits in, CSS pixels.
        alt: what it shows.
        sharp: as in :func:`embed`.
    """
    cells = np.asarray(values, dtype=np.float64)
    low, high = float(cells.min()), float(cells.max())
    x0, y0, x1, y1 = (round(edge) for edge in seen)
    even = (cells - low) / (high - low) if high > low else np.zeros_like(cells)
    smooth = Image.fromarray(even.astype(np.float32)).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
    colours = map_colours(np.asarray(smooth).clip(0, 1))[..., :3]
    result = picture.convert("L").convert("RGB")
    result.paste(Image.blend(result.crop((x0, y0, x1, y1)), Image.fromarray(colours), HEAT), (x0, y0))
    return embed(result, side, side, alt, sharp), (low, high)


class Shelf:
    """Pictures of the data, each read once, and each of its parts made once.

    Args:
        root: the folder that names are relative to.
        sharp: as in :func:`embed`.
    """

    def __init__(self, root: Path, sharp: float = SHARP) -> None:
        self.root = root
        self.sharp = sharp
        self._parts: dict[tuple[str, Box, int], Picture | None] = {}

    def part(self, name: str, box: Box, side: int, alt: str) -> Picture | None:
        """A part of an image; None where the file can't be read any more."""
        key = (name, box, side)
        if key not in self._parts:
            try:
                self._parts[key] = part(read_image(self.root / name), box, side, alt, sharp=self.sharp)
            except InputError:
                self._parts[key] = None
        found = self._parts[key]
        return None if found is None else replace(found, alt=alt)
