"""Small inline pictures. Boxes lie over them as HTML, so that the pixels below stay as they were."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from protopush.data.images import read_image
from protopush.data.transforms import Box, View
from protopush.errors import InputError
from protopush.explain.figure_canvas import colour_bar, with_map
from protopush.explain.figure_style import Map, Rect, scaled, surroundings
from protopush.push.certificate import file_within

QUALITY = 80
SHARP = 1.5  # pixels of the file to one of the page, for finer screens


class Frame(NamedTuple):
    """A box over a picture, in percent of the picture; ``colour`` numbers the page's palette from 0."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""
    colour: int = 0


class Picture(NamedTuple):
    """An inline picture.

    Attributes:
        uri: ``data:image/jpeg;base64,...``.
        width, height: as shown where there is room, in CSS pixels.
        alt: what it shows, in words.
        frames: boxes drawn over it.
    """

    uri: str
    width: int
    height: int
    alt: str
    frames: tuple[Frame, ...] = ()


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
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=QUALITY, optimize=True)
    return Picture("data:image/jpeg;base64," + b64encode(data.getvalue()).decode("ascii"), *size, alt)


def part(picture: Image.Image, box: Rect, side: int, alt: str, colour: int = 0, sharp: float = SHARP) -> Picture:
    """The box, framed, with half its size around it on every side where the picture has that."""
    x0, y0, x1, y1 = map(round, surroundings(box, picture.size))
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    shown = embed(picture.crop((x0, y0, x1, y1)), side, side, alt, sharp)
    return framed(shown, [(box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)], (x1 - x0, y1 - y0), colours=[colour])


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
    return shown._replace(frames=tuple(frames))


def heat(picture: Image.Image, similarities: Map, view: View, side: int, alt: str) -> Picture:
    """A similarity map over its picture, in the colours of every similarity map here.

    Args:
        picture: RGB, the upright original or a smaller copy.
        similarities: (rows, columns), the model's grid.
        view: the geometry of the original.
        side: of the square that the result fits in, CSS pixels.
        alt: what it shows.
    """
    small = picture.copy()
    small.thumbnail((round(side * SHARP), round(side * SHARP)))
    return embed(with_map(small, similarities, view), side, side, alt)


def ramp() -> Picture:
    """The colours of a similarity map, the lowest value first."""
    return embed(colour_bar(108, 12), 72, 8, "from the lowest to the highest similarity")


def parts(
    root: Path, wanted: Iterable[tuple[str, Box]], side: int, sharp: float = SHARP
) -> dict[tuple[str, Box], Picture]:
    """Parts of images by (file, box), each file decoded once; what can't be read any more, or lies elsewhere, lacks.

    Args:
        root: the folder that files are relative to.
        wanted: files and boxes, in pixels of the upright original.
        side: of the squares that the results fit in, CSS pixels.
        sharp: as in :func:`embed`.
    """
    found: dict[tuple[str, Box], Picture] = {}
    for name, places in groupby(sorted(set(wanted)), key=lambda place: place[0]):
        file = file_within(root, name)
        try:
            picture = read_image(file) if file is not None else None
        except InputError:
            continue
        if picture is not None:
            found |= {place: part(picture, place[1], side, f"part of {name}", sharp=sharp) for place in places}
    return found
