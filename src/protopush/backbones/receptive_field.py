"""Receptive field of a model's cells: the pixels whose change can change a cell, measured."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from protopush.data.regions import Region
from protopush.preserve_state import preserve_state

if TYPE_CHECKING:
    from protopush.backbones.create import Backbone

TRIES = 2  # random images: a unit that is silent in one of them may not be in the other
AT_ONCE = 16  # rows or columns of cells in one backward pass


def receptive_fields(backbone: Backbone, size: tuple[int, int]) -> tuple[Region, ...]:
    """The smallest rectangle of pixels outside which no change can change each cell: L regions, at most the image.

    The derivatives of a cell with respect to the pixels are exact zeros where no path leads from the pixel to the cell
    (on the CPU, whose convolutions are direct sums). Those of a row of cells together give the rows that its cells
    see, those of a column the columns. Where cells of a row see different rows (shifted windows of attention), each
    counts as seeing what all of them see. Measured with random weights, since a path that a weight of 0 closes today
    (layer scale, the last norm of a residual block) is open after a step of training.

    Source: the theoretical receptive field (Luo et al., 2016), here by measurement, whatever the layers.

    Args:
        backbone: any; it stays as it is (a copy is measured).
        size: (height, width) of the images.

    Example:
        >>> from torch import nn
        >>> from protopush.backbones.create import create_backbone
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1))  # 7 pixels in steps of 4
        >>> receptive_fields(create_backbone(net, size=(16, 16)), (16, 16))[5]
        (1.0, 1.0, 8.0, 8.0)
    """
    generator = torch.Generator().manual_seed(0)
    with preserve_state(backbone):
        net = deepcopy(backbone).cpu().float().eval().requires_grad_(False)
        _randomise(net, generator)
        rows, columns = _extents(net, torch.randn(1, 3, *size, generator=generator))
        for _ in range(TRIES - 1):
            more = _extents(net, torch.randn(1, 3, *size, generator=generator))
            rows, columns = rows | more[0], columns | more[1]
    down, across = ([_extent(line) for line in lines] for lines in (rows, columns))
    return tuple((x0, y0, x1, y1) for y0, y1 in down for x0, x1 in across)


def _randomise(net: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the scale of what goes through, scales of 1, biases of 0, plain statistics of batch norms."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, (parameter.shape[0] / parameter.numel()) ** 0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def _extents(net: Backbone, image: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of pixels each row of cells depends on, bool (h, H); which columns each column, bool (w, W)."""
    lines = sum(net.regions.raster)
    found = [_slopes(net, image, some) for some in torch.split(torch.arange(lines), AT_ONCE)]
    changed = torch.cat(found)  # (h + w, H, W)
    rows, columns = torch.split(changed, list(net.regions.raster))
    return rows.any(dim=2), columns.any(dim=1)


def _slopes(net: Backbone, image: Tensor, lines: Tensor) -> Tensor:
    """For each row, or column behind all rows, of cells the pixels with a derivative other than 0, bool (n, H, W)."""
    images = image.repeat(len(lines), 1, 1, 1).requires_grad_(True)
    with torch.enable_grad():
        cells = net(images).patches.reshape(len(lines), *net.regions.raster, -1)  # (n, h, w, C)
        weights = torch.rand(cells.shape[1:], generator=torch.Generator().manual_seed(1)) + 0.5
        cells = (cells * weights).sum(dim=-1)
        totals = torch.cat([cells.sum(dim=2), cells.sum(dim=1)], dim=1)  # of each row, then of each column
        (slope,) = torch.autograd.grad(totals[torch.arange(len(lines)), lines].sum(), images)
    return (slope != 0).any(dim=1)


def _extent(line: Tensor) -> tuple[float, float]:
    """From the first to behind the last True; (0, 0) where there is none."""
    found = line.nonzero().flatten().tolist()
    return (float(found[0]), float(found[-1] + 1)) if found else (0.0, 0.0)
