"""Similarity maps where their pixels truly were: from the model's grid back to the original picture.

What lies over a picture: a similarity map, the outline of a region, and the part that the model did not see.

A picture with a numbered box for each match, each number where it hides no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter, minimum_filter

from protopush.data.transforms import Box, View
from protopush.explain.drawing import COLOURS, INK, PAPER, Rect, draw_box, resized, scaled, write
from protopush.explain.explanation import Explanation, Match

Map = Sequence[Sequence[float]]  # rows of the model's grid


def upsampled(similarities: Map, view: View, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """A similarity map over the original picture, as ProtoPNet (Chen et al., 2019) draws it, bilinear.

    The values stand at the centres of the cells; beyond the outer centres the nearest one holds. What resizing and the
    centre crop did is undone: where the model saw nothing, the value is NaN.

    Args:
        similarities: (rows, columns).
        view: the geometry of the picture.
        size: (width, height) of the result, the original's by default; a smaller copy of it has the same map.

    Returns:
        float32 (height, width).

    Example:
        >>> wide = View.of((300, 100), (200, 200))
        >>> upsampled([[0.0, 1.0]], wide, size=(6, 2))
        array([[nan, nan,  0.,  1., nan, nan],
               [nan, nan,  0.,  1., nan, nan]], dtype=float32)
    """
    values = np.asarray(similarities, dtype=np.float64)
    width, height = size or view.original
    across = _weights(width, values.shape[1], view, axis=0)
    down = _weights(height, values.shape[0], view, axis=1)
    return (down @ values @ across.T).astype(np.float32)


def _weights(pixels: int, cells: int, view: View, axis: int) -> NDArray[np.float64]:
    """How much of each cell's value is in each pixel along an axis, (pixels, cells); NaN where nothing was seen."""
    resized = (np.arange(pixels) + 0.5) * view.resized[axis] / pixels  # centres of the pixels, in the resized picture
    seen = resized - view.offset[axis]
    place = (seen * cells / view.crop[axis] - 0.5).clip(0, cells - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(cells)))
    weights[(seen < 0) | (seen > view.crop[axis])] = np.nan
    return weights


SCALE = colormaps["viridis"]  # perceptually uniform, and safe for the colour-blind (Smith and van der Walt, 2015)
CLEAR, DENSE = 0.25, 0.7  # how much of the picture the colour hides where the similarity is lowest and highest


def with_map(picture: Image.Image, similarities: Map, view: View) -> Image.Image:
    """A similarity map over its picture, from its lowest to its highest value, the denser the higher.

    The picture is grey below, so that every colour is the map's; what the model did not see is dark and hatched.

    Args:
        picture: the whole upright original, or a copy of any size.
        similarities: (rows, columns), the model's grid.
        view: the geometry of the original.

    Example:
        >>> grey = Image.new("RGB", (60, 20), (128, 128, 128))
        >>> shown = with_map(grey, [[0.0, 1.0]], View.of((300, 100), (200, 200)))
        >>> shown.getpixel((39, 10))  # yellow: the right side of the middle third
        (216, 200, 64)
    """
    values = upsampled(similarities, view, picture.size)
    low, high = extent(similarities)
    seen = np.isfinite(values)
    even = np.where(seen, (values - low) / max(high - low, 1e-9), 0).clip(0, 1)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None]
    shown = np.where(seen[..., None], _over(grey, even), 0.35 * grey)
    shown[~seen & _lines(seen.shape)] += 70
    return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))


def extent(similarities: Map) -> tuple[float, float]:
    """The lowest and the highest value of a map."""
    values = [value for row in similarities for value in row]
    return min(values), max(values)


def colour_bar(width: int, height: int) -> Image.Image:
    """The map's colours from the lowest value to the highest, as they look over a grey picture."""
    even = np.tile(np.linspace(0, 1, width), (height, 1))
    return Image.fromarray(_over(np.full((height, width, 1), 128.0), even).round().astype(np.uint8))


def _over(grey: NDArray[np.float64], even: NDArray[np.floating]) -> NDArray[np.float64]:
    """Colours over grey (H, W, 1) for values (H, W) from 0 to 1."""
    dense = (CLEAR + (DENSE - CLEAR) * even)[..., None]
    mixed: NDArray[np.float64] = dense * 255 * SCALE(even)[..., :3] + (1 - dense) * grey
    return mixed


def with_unseen(picture: Image.Image, view: View) -> Image.Image:
    """The picture, paler and hatched where the model did not see it.

    Args:
        picture: the whole upright original, or a copy of any size.
        view: the geometry of the original.
    """
    hidden = np.isnan(upsampled([[0.0]], view, picture.size))
    shown = np.array(picture, dtype=np.float64)
    shown[hidden] = 0.5 * shown[hidden] + 0.5 * 255
    shown[hidden & _lines(hidden.shape)] *= 0.7
    return Image.fromarray(shown.round().astype(np.uint8))


def unseen_share(view: View) -> float:
    """The share of the original picture that the model did not see.

    Example:
        >>> round(unseen_share(View.of((300, 100), (200, 200))), 2)
        0.67
    """
    seen = view.crop[0] * view.crop[1] / (view.resized[0] * view.resized[1])
    return 1 - seen


def with_outline(picture: Image.Image, boxes: Sequence[Box], size: tuple[int, int], line: int = 2) -> Image.Image:
    """The outline of the union of boxes, white between black lines; where boxes touch there is none.

    Args:
        picture: the whole upright original, or a copy of any size.
        boxes: in pixels of the original.
        size: (width, height) of the original.
        line: the white line's width in pixels.
    """
    inside = Image.new("L", picture.size)
    for box in boxes:
        x0, y0, x1, y1 = (round(edge) for edge in scaled(box, size, picture.size))
        inside.paste(255, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    shown = picture.copy()
    for ink, grown, shrunk in (((0, 0, 0), 1, line + 1), ((255, 255, 255), 0, line)):
        shown.paste(ink, mask=_ring(inside, grown, shrunk))
    return shown


def _ring(inside: Image.Image, grown: int, shrunk: int) -> Image.Image:
    """What the mask grown by so many pixels has beyond the mask shrunk by so many; the picture's edge is a border."""
    mask = np.asarray(inside)
    wide = maximum_filter(mask, 2 * grown + 1, mode="constant")
    slim = minimum_filter(mask, 2 * shrunk + 1, mode="constant")
    return Image.fromarray(wide & ~slim)


def _lines(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Diagonals, as many whatever the size."""
    pitch = max(6, max(shape[:2]) // 24)
    down, across = np.indices(shape[:2])
    lines: NDArray[np.bool_] = (down + across) % pitch <= pitch // 10
    return lines


def numbered(
    explanation: Explanation, image: Image.Image, shown: Sequence[Match], size: tuple[int, int], badge: int
) -> Image.Image:
    """The picture with the boxes of the matches; boxes of the same cell lie within each other.

    Args:
        explanation: of the picture.
        image: RGB, the upright original or a smaller copy.
        shown: numbered from 1 in this order.
        size: (width, height) within which the picture is as large as it can be.
        badge: side of a number.
    """
    large = with_unseen(resized(image, *size), explanation.view)
    boxes = [scaled(match.box, explanation.image_size, large.size) for match in shown]
    for i, (x0, y0, x1, y1) in reversed([*enumerate(boxes)]):  # the outer over the inner: its lines lie outside
        others = boxes.count(boxes[i]) - 1
        room = max(0, (min(x1 - x0, y1 - y0) - 8) / 2)
        inset = boxes[:i].count(boxes[i]) * min(4, room / max(others, 1))
        draw_box(large, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), colour(i), 2 if others else 3)
    draw, placed = ImageDraw.Draw(large), list[Rect]()
    for i, box in enumerate(boxes):
        placed.append(_free_place(box, boxes, placed, large.size, badge))
        draw_badge(draw, (placed[-1][0], placed[-1][1]), i, badge)
    return large


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a match's box and bar, by its place from 0."""
    return COLOURS[number % len(COLOURS)]


def draw_badge(draw: ImageDraw.ImageDraw, corner: tuple[float, float], number: int, side: int) -> None:
    """A match's number in its colour; ``number`` counts from 0."""
    fill = colour(number)
    x, y = round(corner[0]), round(corner[1])
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill=fill, outline=(0, 0, 0))
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 130
    ink = INK if bright else PAPER
    write(draw, (x + side / 2, y + side / 2), str(number + 1), round(side * 0.66), side, ink, "mm")


def _free_place(box: Rect, boxes: Sequence[Rect], placed: Sequence[Rect], size: tuple[int, int], badge: int) -> Rect:
    """Where to put a box's number: beside it, over no other number, over as little of the boxes as can be."""
    x0, y0, x1, y1 = box
    steps = [i * (badge + 1) for i in range(8)]
    along = [x0 + step for step in steps if step < max(x1 - x0, badge + 2)]  # a small cell has room for two
    down = [y0 + step for step in steps if step < max(y1 - y0, badge + 2)]
    places = [(x, y) for y in (y0 - badge - 2, y1 + 2) for x in along]
    places += [(x, y) for x in (x1 + 2, x0 - badge - 2) for y in down] + [(x, y) for y in down for x in along]
    inside = [
        (x, y, x + badge, y + badge)
        for x, y in places
        if x >= 0 and y >= 0 and x + badge <= size[0] and y + badge <= size[1]
    ]
    cost = {
        place: 9 * sum(_overlap(place, other) for other in placed) + sum(_overlap(place, other) for other in boxes)
        for place in inside
    }
    return min(inside, key=lambda place: cost[place], default=(x0, y0, x0 + badge, y0 + badge))


def _overlap(a: Rect, b: Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
