"""Whether a prototype means one part of the object: consistency, stability, purity, where parts are marked by points.

Shapes, with N images, P prototypes and K parts: points (N, K, 2) are x and y in pixels, visible (N, K) says which parts
an image shows, boxes (N, P, 4) are x0, y0, x1, y1 in pixels, inside (N, P, K) says whether a visible part's point lies
in the box of a prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protopush.errors import InputError


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
    has it in the prototype's box: ``max_k(sum_n inside / sum_n visible) >= threshold``. The published score is the mean
    over prototypes. Source: Huang et al., 2023 (Evaluation and improvement of interpretability for self-explainable
    part-prototype networks).

    Args:
        inside: (N, P, K).
        visible: (N, K).
        owners: int (P,), the class of each prototype.
        labels: int (N,).
        threshold: share of images, in (0, 1].

    Returns:
        float64 (P,).

    Example:
        >>> inside = torch.tensor([[[True, False]], [[True, True]]])
        >>> consistency(inside, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0]), torch.tensor([0, 0]))
        tensor([1.], dtype=torch.float64)
    """
    _check(inside, owners, labels)
    own = _own(owners, labels)
    found = (inside.double() * own.unsqueeze(-1)).sum(dim=0)
    shown = torch.einsum("np,nk->pk", own, visible.double())
    shares = torch.where(shown > 0, found / shown.clamp(min=1), -torch.inf)
    best = shares.max(dim=1).values
    return (best >= threshold).double().masked_fill(best.isinf(), torch.nan)


def stability(inside: Tensor, perturbed: Tensor, owners: Tensor, labels: Tensor) -> Tensor:
    """The share of its class's images in which noise leaves a prototype on the same parts, [0, 1]; NaN without images.

    ``mean_n(all_k(inside == perturbed))``; the published score is the mean over prototypes. Source: Huang et al., 2023.

    Args:
        inside: (N, P, K), of the images.
        perturbed: (N, P, K), of the same images with noise (Gaussian, deviation 0.2 in normalised pixels, at most
            0.25).
        owners: int (P,), the class of each prototype.
        labels: int (N,).

    Returns:
        float64 (P,).

    Example:
        >>> inside = torch.tensor([[[True, False]], [[True, True]]])
        >>> stability(inside, torch.tensor([[[True, False]], [[False, True]]]), torch.tensor([0]), torch.tensor([0, 0]))
        tensor([0.5000], dtype=torch.float64)
    """
    _check(inside, owners, labels)
    own = _own(owners, labels)
    same = (inside == perturbed).all(dim=-1).double()
    return (same * own).sum(dim=0) / own.sum(dim=0)  # 0 / 0 is NaN


def purity(inside: Tensor, similarities: Tensor, top: int = 10) -> Tensor:
    """The largest share of a prototype's most similar patches that hold one and the same part, [0, 1].

    Over the ``top`` images, of any class, that the prototype is most similar to (the first of equals):
    ``max_k mean_n inside``. The published score is the mean over prototypes. Source: Nauta et al., 2023 (PIP-Net), with
    the top ten.

    Args:
        inside: (N, P, K).
        similarities: (N, P).
        top: how many images.

    Returns:
        float64 (P,).

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
    chosen = inside.double().gather(0, order.unsqueeze(-1).expand(-1, -1, inside.shape[2]))
    return chosen.mean(dim=0).max(dim=1).values


def _own(owners: Tensor, labels: Tensor) -> Tensor:
    """1 where an image is of a prototype's class, float64 (N, P)."""
    return (labels.unsqueeze(1) == owners).double()


def _check(inside: Tensor, owners: Tensor, labels: Tensor) -> None:
    if inside.ndim != 3 or inside.shape[:2] != (len(labels), len(owners)):
        raise InputError(
            f"inside of shape {tuple(inside.shape)} for {len(labels)} images and {len(owners)} prototypes; "
            "expected (N, P, K)"
        )
