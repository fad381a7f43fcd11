"""Similarity maps where their pixels truly were: from the model's grid back to the original picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protopush.data.transforms import View

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
