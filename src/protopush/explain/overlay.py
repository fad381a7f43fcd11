"""What lies over a picture: a similarity map, the outline of a region, and the part that the model did not see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from protopush.data.transforms import Box, View
from protopush.explain.drawing import scaled
from protopush.explain.maps import Map, upsampled

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
