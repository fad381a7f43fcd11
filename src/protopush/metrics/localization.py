"""Localization of maps, anchors and prototypes: on the object (a mask), or on one and the same part of it (points).

Maps are (N, h, w), an even grid over the image, of any h and w; negative values count as 0. Masks are (N, H, W), bool
or in [0, 1], of the same view of the images: what the model saw, resized and cropped alike. A mask is brought onto the
grid exactly, as the share of each cell that it covers. Results are float64 (N,), NaN where a number is undefined.

Parts, with P prototypes and K parts: points (N, K, 2) are x and y in pixels, visible (N, K) says which parts an image
shows, boxes (N, P, 4) are x0, y0, x1, y1 in pixels, inside (N, P, K) says whether a visible part's point lies in the
box of a prototype, owners (P,) is the class of each prototype, labels (N,) that of each image. Scores are float64
(P,); the published ones are their means over prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protopush.errors import InputError


def activation_share(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of the activation of maps (N, h, w) that lies on masks (N, H, W), [0, 1], higher is better.

    ``sum(map * share) / sum(map)``; a map that is the same everywhere has the mask's share of the area: that is the
    value by chance. NaN where there is no positive activation. Source: the energy-based pointing game of Score-CAM
    (Wang et al., 2020).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0  # the upper half
        >>> activation_share(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), mask)
        tensor([0.7500], dtype=torch.float64)
    """
    values, shares = _positive_and_shares(maps, masks)
    return (values * shares).sum(dim=(1, 2)) / values.sum(dim=(1, 2))


def pointing_game(boxes: Tensor, masks: Tensor) -> Tensor:
    """1 where the middle of the best patch's box lies on its image's mask, 0 where it lies beside; higher is better.

    Where four pixels meet in the middle, the lower right one counts. A box put anywhere by chance hits with the mask's
    share of the area. Source: Zhang et al., 2018.

    Args:
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the masks; NaN gives NaN.
        masks: (N, H, W).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0
        >>> pointing_game(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), mask)
        tensor([1.], dtype=torch.float64)
    """
    if boxes.shape != (len(masks), 4):
        raise InputError(f"boxes of shape {tuple(boxes.shape)} for {len(masks)} masks; expected a box for each mask")
    known, middle = boxes.isfinite().all(dim=1), (boxes.double()[:, :2] + boxes.double()[:, 2:]) / 2
    x, y = (
        (values.nan_to_num() + 1e-6).floor().long().clamp(0, side - 1)
        for values, side in zip(middle.unbind(dim=1), (masks.shape[2], masks.shape[1]), strict=True)
    )
    hit = (masks[torch.arange(len(masks)), y, x].double() > 0.5).double()
    return hit.masked_fill(~known, torch.nan)


def outside_inside_ratio(maps: Tensor, masks: Tensor) -> Tensor:
    """The mean of maps (N, h, w) outside masks (N, H, W) over the mean inside, [0, inf), lower is better, 1 by chance.

    ``(sum(map * (1 - share)) / sum(1 - share)) / (sum(map * share) / sum(share))``; NaN where the mask is empty or
    covers all, infinite where all relevance lies outside. Source: Lapuschkin et al., 2016 (Analyzing classifiers:
    Fisher vectors and deep neural networks).

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2] = 1.0
        >>> outside_inside_ratio(torch.tensor([[[3.0, 1.0], [1.0, 0.0]]]), mask)
        tensor([0.2500], dtype=torch.float64)
    """
    values, inside = _positive_and_shares(maps, masks)
    mean_inside, mean_outside = (
        (values * where).sum(dim=(1, 2)) / where.sum(dim=(1, 2)) for where in (inside, 1 - inside)
    )
    return mean_outside / mean_inside


def box_share(boxes: Tensor, masks: Sequence[Tensor] | Tensor) -> Tensor:
    """The share (P,) of each box that lies on its image's mask, [0, 1], higher is better: of anchors, of peaks.

    A box put anywhere by chance has the mask's share of the area.

    Args:
        boxes: (P, 4), x0, y0, x1, y1 in whole pixels, x1 and y1 exclusive.
        masks: P masks (H, W), each of its own size.

    Raises:
        InputError: a box is empty or leaves its image.

    Example:
        >>> mask = torch.zeros(4, 6)
        >>> mask[:, :3] = 1
        >>> box_share(torch.tensor([[2, 0, 4, 4], [0, 0, 2, 2]]), [mask, mask])
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    shares = []
    for (x0, y0, x1, y1), mask in zip(boxes.long().tolist(), masks, strict=True):
        height, width = mask.shape
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(f"box {(x0, y0, x1, y1)} in an image of {width}x{height}; expected a box within the image")
        shares.append(float(mask[y0:y1, x0:x1].double().mean()))
    return torch.tensor(shares, dtype=torch.float64)


def cell_shares(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each cell of a grid (h, w) a mask covers, exactly, also where a pixel lies in two cells; (N, h, w).

    Example:
        >>> cell_shares(torch.tensor([[[1.0, 1.0, 0.0]]]), (1, 2))
        tensor([[[1.0000, 0.3333]]], dtype=torch.float64)
    """
    down, across = (_overlaps(pixels, cells) for pixels, cells in zip(masks.shape[1:], grid, strict=True))
    return down @ masks.double() @ across.T


def peak_boxes(maps: Tensor, size: tuple[int, int], side: float) -> Tensor:
    """Boxes of one size around the peak of each prototype's map, cut at the image's edge: float64 (N, P, 4).

    The peak of a map that is upsampled linearly is the middle of its largest cell (the first of equals). Huang et al.
    (2023) take boxes of 72 of 224 pixels.

    Args:
        maps: (N, P, h, w).
        size: (height, width) of the images.
        side: of the boxes, in pixels.

    Example:
        >>> maps = torch.zeros(1, 1, 2, 2)
        >>> maps[0, 0, 1, 0] = 1.0
        >>> peak_boxes(maps, (8, 8), 4)
        tensor([[[0., 4., 4., 8.]]], dtype=torch.float64)
    """
    rows, columns = maps.shape[2:]
    peak = maps.flatten(2).argmax(dim=2).double()
    y = ((peak / columns).floor() + 0.5) * size[0] / rows
    x = (peak % columns + 0.5) * size[1] / columns
    edges = torch.stack([x - side / 2, y - side / 2, x + side / 2, y + side / 2], dim=-1)
    limit = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float64)
    return edges.clamp(min=0).minimum(limit)


def parts_in_boxes(boxes: Tensor, points: Tensor, visible: Tensor) -> Tensor:
    """Whether each visible part's point lies in each prototype's box, bool (N, P, K).

    Args:
        boxes: (N, P, 4); the right and lower edges are outside.
        points: (N, K, 2).
        visible: bool (N, K).

    Example:
        >>> boxes = torch.tensor([[[0, 0, 4, 4]]])
        >>> parts_in_boxes(boxes, torch.tensor([[[1, 1], [4, 1]]]), torch.ones(1, 2, dtype=torch.bool))
        tensor([[[ True, False]]])
    """
    low, high, at = boxes[..., None, :2], boxes[..., None, 2:], points[:, None]
    return ((at >= low) & (at < high)).all(dim=-1) & visible[:, None]


def consistency(inside: Tensor, visible: Tensor, owners: Tensor, labels: Tensor, threshold: float = 0.8) -> Tensor:
    """1 for each prototype that finds one and the same part in most images of its class, else 0; NaN without images.

    A prototype is consistent if for some part, of its class's images that show the part, at least a share ``threshold``
    has it in the prototype's box: ``max_k(sum_n inside / sum_n visible) >= threshold``. Source: Huang et al., 2023
    (Evaluation and improvement of interpretability for self-explainable part-prototype networks).

    Args:
        inside, visible, owners, labels: see the module.
        threshold: share of images, in (0, 1].

    Example:
        >>> inside = torch.tensor([[[True, False]], [[True, True]]])
        >>> consistency(inside, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0]), torch.tensor([0, 0]))
        tensor([1.], dtype=torch.float64)
    """
    of_class = _of_class(inside, owners, labels)
    found = (inside.double() * of_class.unsqueeze(-1)).sum(dim=0)
    shown = torch.einsum("np,nk->pk", of_class, visible.double())
    best = torch.where(shown > 0, found / shown.clamp(min=1), -torch.inf).max(dim=1).values
    return (best >= threshold).double().masked_fill(best.isinf(), torch.nan)


def stability(inside: Tensor, perturbed: Tensor, owners: Tensor, labels: Tensor) -> Tensor:
    """The share of its class's images in which noise leaves a prototype on the same parts, [0, 1]; NaN without images.

    ``mean_n(all_k(inside == perturbed))``. Source: Huang et al., 2023.

    Args:
        inside, owners, labels: see the module.
        perturbed: (N, P, K), inside, of the same images with noise (Gaussian, deviation 0.2 in normalised pixels, at
            most 0.25).

    Example:
        >>> inside = torch.tensor([[[True, False]], [[True, True]]])
        >>> stability(inside, torch.tensor([[[True, False]], [[False, True]]]), torch.tensor([0]), torch.tensor([0, 0]))
        tensor([0.5000], dtype=torch.float64)
    """
    of_class = _of_class(inside, owners, labels)
    same = (inside == perturbed).all(dim=-1).double()
    return (same * of_class).sum(dim=0) / of_class.sum(dim=0)  # 0 / 0 is NaN


def purity(inside: Tensor, similarities: Tensor, top: int = 10) -> Tensor:
    """The largest share of a prototype's most similar patches that hold one and the same part, [0, 1].

    Over the ``top`` images, of any class, that the prototype is most similar to (the first of equals):
    ``max_k mean_n inside``. Source: Nauta et al., 2023 (PIP-Net), with the top ten.

    Args:
        inside: (N, P, K).
        similarities: (N, P).
        top: how many images.

    Example:
        >>> inside = torch.tensor([[[True, False]], [[True, True]], [[False, True]]])
        >>> purity(inside, torch.tensor([[0.9], [0.8], [0.7]]), top=2)
        tensor([1.], dtype=torch.float64)
    """
    if len(inside) != len(similarities) or not len(inside) or top < 1:
        raise InputError(
            f"{len(inside)} images, {len(similarities)} rows of similarities, top {top}; expected as many, at least one"
        )
    order = similarities.argsort(dim=0, descending=True, stable=True)[:top]
    nearest = inside.double().gather(0, order.unsqueeze(-1).expand(-1, -1, inside.shape[2]))
    return nearest.mean(dim=0).max(dim=1).values


def _overlaps(pixels: int, cells: int) -> Tensor:
    """The share of each cell that each pixel is, (cells, pixels), along an axis."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    start = torch.arange(pixels, dtype=torch.float64)
    common = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return common.clamp(min=0) * cells / pixels


def _positive_and_shares(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The maps' positive values and the masks' shares of the cells, both (N, h, w)."""
    _check(maps, masks)
    return maps.double().clamp(min=0), cell_shares(masks, (maps.shape[1], maps.shape[2]))


def _check(maps: Tensor, masks: Tensor) -> None:
    if maps.ndim != 3:
        raise InputError(f"maps of shape {tuple(maps.shape)}; expected (N, h, w)")
    if len(maps) != len(masks):
        raise InputError(f"{len(maps)} maps and {len(masks)} masks; expected one mask for each map")


def _of_class(inside: Tensor, owners: Tensor, labels: Tensor) -> Tensor:
    """1 where an image is of a prototype's class, float64 (N, P)."""
    if inside.ndim != 3 or inside.shape[:2] != (len(labels), len(owners)):
        raise InputError(
            f"inside of shape {tuple(inside.shape)} for {len(labels)} images and {len(owners)} prototypes; "
            "expected (N, P, K)"
        )
    return (labels.unsqueeze(1) == owners).double()
