"""Whether maps and anchors lie on what the image is about.

Maps are (N, h, w) on the model's grid (any h and w); negative values count as 0. Masks are (N, H, W), bool or in
[0, 1], of the same view of the images: what the model saw, resized and cropped alike. A mask is brought onto the grid
exactly, as the share of each cell that it covers. Results are float64 (N,), NaN where a number is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protopush.errors import InputError


def activation_share(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of the activation that lies on the mask: ``sum(map * share) / sum(map)``, [0, 1], higher is better.

    A map that is the same everywhere has the mask's share of the area: that is the value by chance. NaN where there is
    no positive activation. Source: the energy-based pointing game of Score-CAM (Wang et al., 2020).

    Args:
        maps: (N, h, w).
        masks: (N, H, W).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0  # the upper half
        >>> activation_share(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), mask)
        tensor([0.7500], dtype=torch.float64)
    """
    values, shares = _positive(maps), cell_shares(masks, _grid(maps))
    _check(values, shares)
    return (values * shares).sum(dim=(1, 2)) / values.sum(dim=(1, 2))


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """1 where the map's peak lies on the mask, 0 where it lies beside it (Zhang et al., 2018); higher is better.

    The peak is the middle of the largest cell (the first of equals), and lies on the mask if the pixel there does:
    where four pixels meet, the lower right one. A peak put anywhere by chance hits with the mask's share of the area.
    NaN where the map is not finite.

    Args:
        maps: (N, h, w).
        masks: (N, H, W).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0
        >>> pointing_game(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), mask)
        tensor([1.], dtype=torch.float64)
    """
    rows, columns = _grid(maps)
    height, width = masks.shape[1:]
    _check(maps, masks.sum(dim=(1, 2)))
    peak = maps.flatten(1).argmax(dim=1)
    y = (peak // columns * 2 + 1) * height // (2 * rows)
    x = (peak % columns * 2 + 1) * width // (2 * columns)
    hit = (masks[torch.arange(len(masks)), y, x].double() > 0.5).double()
    return hit.masked_fill(~maps.flatten(1).isfinite().all(dim=1), torch.nan)


def outside_inside_ratio(maps: Tensor, masks: Tensor) -> Tensor:
    """The mean relevance outside the mask over the mean relevance inside it, [0, inf), lower is better, 1 by chance.

    ``(sum(map * (1 - share)) / sum(1 - share)) / (sum(map * share) / sum(share))``; NaN where the mask is empty or
    covers all, infinite where all relevance lies outside. Source: Lapuschkin et al., 2016 (Analyzing classifiers:
    Fisher vectors and deep neural networks).

    Args:
        maps: (N, h, w).
        masks: (N, H, W).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0
        >>> outside_inside_ratio(torch.tensor([[[3.0, 1.0], [1.0, 0.0]]]), mask)
        tensor([0.2500], dtype=torch.float64)
    """
    values, shares = _positive(maps), cell_shares(masks, _grid(maps))
    _check(values, shares)
    inside, outside = shares, 1 - shares
    mean_inside = (values * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))
    mean_outside = (values * outside).sum(dim=(1, 2)) / outside.sum(dim=(1, 2))
    return mean_outside / mean_inside


def anchor_share(boxes: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The share of each anchor's box that lies on its image's mask, [0, 1], higher is better.

    A box put anywhere by chance has the mask's share of the area.

    Args:
        boxes: int (P, 4), x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
        masks: P masks (H, W), each of its own size.

    Returns:
        float64 (P,).

    Raises:
        InputError: a box is empty or leaves its image.

    Example:
        >>> mask = torch.zeros(4, 6)
        >>> mask[:, :3] = 1
        >>> anchor_share(torch.tensor([[2, 0, 4, 4], [0, 0, 2, 2]]), [mask, mask])
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    shares = []
    for (x0, y0, x1, y1), mask in zip(boxes.tolist(), masks, strict=True):
        height, width = mask.shape
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(f"box {(x0, y0, x1, y1)} in an image of {width}x{height}; expected a box within the image")
        shares.append(float(mask[y0:y1, x0:x1].double().mean()))
    return torch.tensor(shares, dtype=torch.float64)


def cell_shares(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each cell a mask covers, exactly, also where a pixel lies in two cells; float64 (N, h, w).

    Args:
        masks: (N, H, W), bool or in [0, 1].
        grid: (h, w).

    Example:
        >>> cell_shares(torch.tensor([[[1.0, 1.0, 0.0]]]), (1, 2))
        tensor([[[1.0000, 0.3333]]], dtype=torch.float64)
    """
    down, across = (_overlaps(pixels, cells) for pixels, cells in zip(masks.shape[1:], grid, strict=True))
    return down @ masks.double() @ across.T


def _overlaps(pixels: int, cells: int) -> Tensor:
    """The share of each cell that each pixel is, (cells, pixels), along an axis."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    start = torch.arange(pixels, dtype=torch.float64)
    common = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return common.clamp(min=0) * cells / pixels


def _positive(maps: Tensor) -> Tensor:
    return maps.double().clamp(min=0)


def _grid(maps: Tensor) -> tuple[int, int]:
    if maps.ndim != 3:
        raise InputError(f"maps of shape {tuple(maps.shape)}; expected (N, h, w)")
    return maps.shape[1], maps.shape[2]


def _check(maps: Tensor, masks: Tensor) -> None:
    if len(maps) != len(masks):
        raise InputError(f"{len(maps)} maps and {len(masks)} masks; expected one mask for each map")
