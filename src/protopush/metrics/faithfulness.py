"""Faithfulness of maps: parts of images are hidden, shown or changed, and the model is asked again.

``score`` is the model as a function: images (B, 3, H, W) and their places (B,) among the N images to one number for
each, (B,), of the thing that the maps are about (the probability of its predicted class, say). Relevance is (N, h, w),
on any grid: its cells are hidden and shown as a whole. All N images are in memory at once, and one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protopush._compat import ensure_torchvision
from protopush.errors import InputError

Score = Callable[[Tensor, Tensor], Tensor]
MapsOf = Callable[[Tensor, Tensor], Tensor]


def insertion_curve(
    score: Score, images: Tensor, relevance: Tensor, steps: int = 10, baseline: Tensor | None = None
) -> Tensor:
    """The score while the most relevant cells are shown first, in an image that is hidden at first; (N, steps + 1).

    Step ``s`` shows the ``round(s * cells / steps)`` most relevant cells (the first of equals). The area under the
    curve is RISE's insertion metric (Petsiuk et al., 2018); higher is better.

    Args:
        score, images, relevance: see the module.
        steps: at least 1; at most the number of cells are different.
        baseline: (N, 3, H, W), what is seen of a hidden cell; by default the blurred image.

    Example:
        >>> images, relevance = torch.ones(1, 3, 4, 4), torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
        >>> brightness = lambda images, places: images.mean(dim=(1, 2, 3))
        >>> insertion_curve(brightness, images, relevance, steps=4, baseline=torch.zeros(1, 3, 4, 4))
        tensor([[0.0000, 0.2500, 0.5000, 0.7500, 1.0000]])
    """
    hidden = _hidden(images, relevance, steps, baseline)
    rank = (
        relevance.flatten(1).cpu().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )  # 0: the most relevant
    cell = _cell_of(images.shape[2:], relevance.shape[1:])
    places = torch.arange(len(images))
    columns = []
    for step in range(steps + 1):
        shown = rank < round(step * rank.shape[1] / steps)  # (N, cells)
        columns.append(score(torch.where(shown[:, cell].unsqueeze(1).to(images.device), images, hidden), places).cpu())
    return torch.stack(columns, dim=1)


def deletion_curve(
    score: Score, images: Tensor, relevance: Tensor, steps: int = 10, baseline: Tensor | None = None
) -> Tensor:
    """The score while the most relevant cells are hidden first; (N, steps + 1).

    The area under the curve is RISE's deletion metric (Petsiuk et al., 2018); lower is better. Arguments are those of
    :func:`insertion_curve`.

    Example:
        >>> images, relevance = torch.ones(1, 3, 4, 4), torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
        >>> left = lambda images, places: images[..., :2].mean(dim=(1, 2, 3))
        >>> deletion_curve(left, images, relevance, steps=4, baseline=torch.zeros(1, 3, 4, 4))
        tensor([[1.0000, 0.5000, 0.5000, 0.0000, 0.0000]])
    """
    hidden = _hidden(images, relevance, steps, baseline)
    return insertion_curve(score, hidden, relevance, steps, baseline=images)


def area_under(curves: Tensor) -> Tensor:
    """The area under curves (N, steps + 1) over [0, 1], by trapezoids: (N,).

    Example:
        >>> area_under(torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def relevance_ordering(
    score: Score,
    images: Tensor,
    relevance: Tensor,
    steps: int = 10,
    random_orders: int = 3,
    seed: int = 0,
    baseline: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much earlier the score returns when cells are shown by relevance than in random order.

    The area of the insertion curve, less the mean of those of random orders: the relevance ordering test (Gautam et
    al., 2023, Enhancing self-explaining models by prototypical relevance propagation). Higher is better; 0 is
    chance, below 0 the map is worse than none.

    Args:
        score, images, relevance, steps, baseline: as for :func:`insertion_curve`.
        random_orders, seed: how many random orders, and the seed that they are drawn with.

    Returns:
        The difference (N,), and the mean area (N,) in random order.

    Example:
        >>> images = torch.ones(1, 3, 4, 4)
        >>> corner = lambda images, places: images[..., :2, :2].mean(dim=(1, 2, 3))
        >>> best = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> found, chance = relevance_ordering(corner, images, best, 4, 200, baseline=torch.zeros(1, 3, 4, 4))
        >>> round(float(found + chance), 3), round(float(chance), 1)
        (0.875, 0.5)
    """
    hidden = _hidden(images, relevance, steps, baseline)
    generator = torch.Generator().manual_seed(seed)
    orders = [relevance, *(torch.rand(relevance.shape, generator=generator) for _ in range(random_orders))]
    areas = [area_under(insertion_curve(score, images, order, steps, hidden)) for order in orders]
    chance = torch.stack(areas[1:]).mean(dim=0)
    return areas[0] - chance, chance


def location_misalignment(
    maps_of: MapsOf, images: Tensor, boxes: Tensor, epsilon: float, steps: int = 10, step_size: float | None = None
) -> dict[str, Tensor]:
    """How much changes outside a prototype's box change what the map says of the inside.

    Pixels outside the box are changed, each by at most ``epsilon``, so that the similarity at the peak becomes as small
    as can be (projected gradient descent; Madry et al., 2018); the box stays as it is. If the box showed all that the
    prototype sees, nothing could happen. Source: Sacha et al., 2024 (Interpretability benchmark for evaluating spatial
    misalignment of prototypical parts explanations), whose PLC and PAC are these, with the cell of the peak for their
    box around the highest activations.

    Args:
        maps_of: images (B, 3, H, W) and their places to the similarities of all patches (B, L) or (B, h, w),
            differentiable.
        images: (N, 3, H, W).
        boxes: int (N, 4), x0, y0, x1, y1 in pixels of the images: the boxes that the explanation shows.
        epsilon: the largest change of a pixel, in the images' units.
        steps: of the descent.
        step_size: of a step, by default ``2.5 * epsilon / steps``.

    Returns:
        ``location_change``: (N,), 1 less the intersection over union of the cells of the peak before and after: 1 where
        the peak moves, 0 where it stays (PLC); ``activation_change``: (N,), the share of the similarity that the
        changes take away, not below 0 (PAC); ``images``: what was changed.

    Example:
        >>> def in_cells(images, places):  # each cell sees its own pixels alone
        ...     return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2).squeeze(1)
        >>> images = torch.zeros(1, 3, 4, 4)
        >>> images[..., :2, :2] = 1.0
        >>> found = location_misalignment(in_cells, images, torch.tensor([[0, 0, 2, 2]]), epsilon=0.1)
        >>> found["location_change"].tolist(), found["activation_change"].tolist()
        ([0.0], [0.0])
    """
    if len(boxes) != len(images) or epsilon <= 0 or steps < 1:
        raise InputError(
            f"{len(boxes)} boxes for {len(images)} images, epsilon {epsilon}, {steps} steps; expected a box for each "
            "image, an epsilon above 0 and at least one step"
        )
    size = 2.5 * epsilon / steps if step_size is None else step_size
    places, free = torch.arange(len(images)), _outside(boxes, images)
    with torch.no_grad():
        before, peak = maps_of(images, places).flatten(1).max(dim=1)
    changed = images.clone()
    for _ in range(steps):
        changed.requires_grad_(True)
        with torch.enable_grad():
            total = maps_of(changed, places).flatten(1).max(dim=1).values.sum()
            (slope,) = torch.autograd.grad(total, changed)
        moved = changed.detach() - size * slope.sign() * free
        changed = moved.clamp(images - epsilon, images + epsilon)
    with torch.no_grad():
        after, new_peak = maps_of(changed, places).flatten(1).max(dim=1)
    lost = (before - after) / before.abs()
    return {
        "location_change": (peak != new_peak).double().cpu(),
        "activation_change": lost.clamp(min=0).double().cpu(),
        "images": changed,
    }


def blur(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) so blurred (Gaussian, deviation a tenth of the longer side) that little is left to see."""
    ensure_torchvision()
    from torchvision.transforms.functional import gaussian_blur

    sigma = max(images.shape[2:]) / 10
    # as wide as the filter can be in images of this size, three deviations at most
    across, down = (min(2 * round(3 * sigma) + 1, 2 * side - 1) for side in (images.shape[3], images.shape[2]))
    # one axis after the other: torchvision's filter of both at once costs their product
    blurred: Tensor = gaussian_blur(gaussian_blur(images, [across, 1], [sigma, sigma]), [1, down], [sigma, sigma])
    return blurred


def _hidden(images: Tensor, relevance: Tensor, steps: int, baseline: Tensor | None) -> Tensor:
    """What is seen of hidden cells, (N, 3, H, W), once the other arguments make sense."""
    if len(images) != len(relevance) or relevance.ndim != 3 or steps < 1:
        raise InputError(
            f"{len(images)} images, relevance of shape {tuple(relevance.shape)}, {steps} steps; expected (N, h, w), "
            "and at least one step"
        )
    if not relevance.isfinite().all():
        raise InputError("relevance that is NaN or infinite; expected finite numbers")
    return blur(images) if baseline is None else baseline


def _cell_of(size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The cell that the middle of each pixel lies in, (H, W)."""
    rows, columns = ((2 * torch.arange(n) + 1) * cells // (2 * n) for n, cells in zip(size, grid, strict=True))
    return rows.unsqueeze(1) * grid[1] + columns


def _outside(boxes: Tensor, images: Tensor) -> Tensor:
    """1 for each pixel outside its image's box, (N, 1, H, W)."""
    y, x = torch.arange(images.shape[2]).view(1, -1, 1), torch.arange(images.shape[3]).view(1, 1, -1)
    x0, y0, x1, y1 = (edge.view(-1, 1, 1) for edge in boxes.cpu().unbind(dim=1))
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return (~inside).unsqueeze(1).to(images)
