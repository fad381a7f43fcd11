"""Whether a run's maps tell the truth: the measures of :mod:`protopush.metrics.faithfulness`, for its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protopush.backbones import Features
from protopush.data.dataset import ImageDataset
from protopush.head_optimal import HeadOutput
from protopush.metrics.faithfulness import area_under, blur, deletion_curve, location_misalignment, relevance_ordering
from protopush.training.progress import bar
from protopush.training.run import Run
from protopush.untouched import untouched

STEPS = 10
RANDOM_ORDERS = 2
CHANGE = 0.02  # of the range of a pixel: about 5 of 255 levels, which nobody sees
BATCH = 8


def measure_faithfulness(
    run: Run,
    dataset: ImageDataset,
    evidence: Tensor,
    strongest: Tensor,
    predicted: Tensor,
    device: torch.device | str,
    count: int,
    seed: int,
) -> dict[str, Any] | None:
    """Insertion, deletion, relevance ordering and misalignment, each the mean over ``count`` images.

    Args:
        run: its model is on ``device``.
        dataset: N images.
        evidence: (N, h, w), the maps that are tested, of the predicted class.
        strongest: int (N,), the predicted class's prototype with the largest contribution, whose box is tested.
        predicted: int (N,).
        device: of the model.
        count: how many of the images, drawn once for all runs of a seed; 0: None is returned.
        seed: of the choice and of the random orders.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if not len(chosen):
        return None
    view, rows = dataset.eval_view(), list[Tensor]()
    with untouched(run.model), bar("Faithfulness", len(chosen)) as advance:
        for some in torch.split(chosen, BATCH):
            images = torch.stack([view[i][0] for i in some.tolist()]).to(device)
            target = _Target(run, predicted[some].to(device), strongest[some].to(device))
            rows.append(_of_batch(target, images, evidence[some], seed))
            advance(len(some))
    names = ("insertion", "deletion", "random_insertion", "relevance_ordering", "location_change", "activation_change")
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {"images": len(chosen), **dict(zip(names, means, strict=True))}


class _Target:
    """A batch's predicted classes and strongest prototypes, as functions of its (changed) images."""

    def __init__(self, run: Run, predicted: Tensor, strongest: Tensor) -> None:
        self.run, self.predicted, self.strongest = run, predicted, strongest

    def probability(self, images: Tensor, places: Tensor) -> Tensor:
        """(B,) of the class that was predicted for the whole image."""
        output: HeadOutput = self.run.model(images)
        return output.logits.float().softmax(dim=1)[torch.arange(len(images)), self.predicted[places]]

    def maps(self, images: Tensor, places: Tensor) -> Tensor:
        """(B, h, w): the similarity of every cell to the strongest prototype."""
        features: Features = self.run.model.backbone(images)
        prototypes = self.run.head.prototypes()[self.predicted[places], self.strongest[places]]
        cells = self.run.head.embed(features.patches) @ prototypes.unsqueeze(-1)
        return cells.view(-1, *features.grid)


def _of_batch(target: _Target, images: Tensor, evidence: Tensor, seed: int) -> Tensor:
    """The six numbers (6, B) of a batch."""
    hidden = blur(images)
    ordering, chance = relevance_ordering(target.probability, images, evidence, STEPS, RANDOM_ORDERS, seed, hidden)
    deletion = area_under(deletion_curve(target.probability, images, evidence, STEPS, hidden))
    maps = target.maps(images, torch.arange(len(images)))
    preprocessing = target.run.transform.preprocessing
    change = CHANGE / max(preprocessing.std)
    moved = location_misalignment(target.maps, images, _peak_boxes(maps, images.shape[2:]), change)
    numbers = (ordering + chance, deletion, chance, ordering, moved["location_change"], moved["activation_change"])
    return torch.stack([values.double() for values in numbers])


def _peak_boxes(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """The cells of the peaks, in pixels, outward where a cell ends within a pixel: int (B, 4)."""
    rows, columns = maps.shape[1:]
    peak = maps.flatten(1).argmax(dim=1)
    y, x = peak // columns, peak % columns
    low = (x * size[1] // columns, y * size[0] // rows)
    high = (-(-(x + 1) * size[1] // columns), -(-(y + 1) * size[0] // rows))
    return torch.stack([*low, *high], dim=1)
