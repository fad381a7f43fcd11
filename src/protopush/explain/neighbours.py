"""What else in the training images a prototype likes: the next nearest patches of its class, and those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.backbones.create import FeatureReader, Features
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size, stored_features
from protopush.data.images import image_size
from protopush.data.regions import Regions
from protopush.data.transforms import Box
from protopush.nn.head import HeadOutput
from protopush.preserve_state import iterate_outputs

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel


@dataclass(frozen=True)
class Neighbour:
    """The patch of one training image that a prototype likes best.

    Attributes:
        sample: the image's place in the data set.
        name: its file, relative to the data's root.
        class_index: its label.
        similarity: cosine of the prototype and the patch.
        cell: the patch's number, from 0.
        box: the patch, in pixels of the upright original picture.
        sees: likewise, all that its feature can depend on.
    """

    sample: int
    name: str
    class_index: int
    similarity: float
    cell: int
    box: Box
    sees: Box | None = None


@dataclass(frozen=True)
class Neighbours:
    """A prototype's nearest training images, the nearest first, each with its best patch.

    Attributes:
        own: of the prototype's class, its anchor's image left out.
        others: of the other classes.
    """

    own: list[Neighbour]
    others: list[Neighbour]


def find_neighbours(
    model: ProtoModel,
    dataset: ImageDataset,
    device: str | torch.device = "cpu",
    own: int = 3,
    others: int = 2,
    num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[Neighbours | None]]:
    """The training images that each prototype likes best, in one pass; nothing but the best is kept.

    Order is (similarity, place in the data set), so that it doesn't depend on batches. Where a training left features
    of these images in the cache they are read instead of computed; similarities are then right to about 0.001.

    Args:
        model: a :class:`ProtoModel` on ``device``.
        dataset: the training images, read without augmentation.
        device: where the model is.
        own, others: how many images of the prototype's class, and of all other classes.
        num_workers: processes that read images.
        advance: called with the number of images done (a progress bar's step).

    Returns:
        For each class and slot the neighbours, None where the slot isn't in use.
    """
    device, view = torch.device(device), dataset.eval_view()
    head = model.head
    manager = head.proto_manager
    shape = (manager.num_classes, manager.max_prototypes)
    place = {sample.name: i for i, sample in enumerate(view.samples)}
    anchored = [place.get(str(anchor.sample_id), -1) if anchor is not None else -1 for anchor in manager.anchors]
    anchor_of, class_of = torch.tensor(anchored).view(shape), torch.arange(shape[0]).unsqueeze(1)
    best = _Best(shape, own), _Best(shape, others)
    regions = Regions.whole((1, 1))
    stored = stored_features(model.backbone, view)
    images, backbone = (view, model.backbone) if stored is None else (stored, FeatureReader(stored.regions))
    loader: DataLoader[Any] = DataLoader(images, inference_batch_size(device), num_workers=num_workers)
    features: Features
    with iterate_outputs(model, loader, device, advance, call=backbone) as outputs:
        for features, labels, ids in outputs:
            output: HeadOutput = head(features)
            regions = head.compared(features.regions)
            found, cells = output.maps.amax(dim=-1).float().cpu(), output.cells.cpu()  # of one patch, as it is shown
            of_class = labels.view(-1, 1, 1) == class_of
            best[0].add(found.masked_fill(~of_class | (ids.view(-1, 1, 1) == anchor_of), -torch.inf), cells, ids)
            best[1].add(found.masked_fill(of_class, -torch.inf), cells, ids)
    used = manager.mask().tolist()
    return [
        [
            Neighbours(*(some.neighbours(view, c, k, regions) for some in best)) if used[c][k] else None
            for k in range(shape[1])
        ]
        for c in range(shape[0])
    ]


class _Best:
    """The ``keep`` most similar images of each prototype, and their best cells: each (keep, C, K)."""

    def __init__(self, shape: tuple[int, int], keep: int) -> None:
        self.keep = keep
        self.similarities = torch.full((keep, *shape), -torch.inf)
        self.cells = torch.zeros((keep, *shape), dtype=torch.int64)
        self.ids = torch.zeros((keep, *shape), dtype=torch.int64)

    def add(self, similarities: Tensor, cells: Tensor, ids: Tensor) -> None:
        """A batch: similarities and cells (B, C, K), ids (B,), larger than all before."""
        every = torch.cat([self.similarities, similarities])
        order = every.argsort(dim=0, descending=True, stable=True)[: self.keep]  # the earlier first among equals
        self.similarities = every.gather(0, order)
        self.cells = torch.cat([self.cells, cells]).gather(0, order)
        self.ids = torch.cat([self.ids, ids.view(-1, 1, 1).expand_as(cells)]).gather(0, order)

    def neighbours(self, view: ImageDataset, c: int, k: int, regions: Regions) -> list[Neighbour]:
        """Those of one prototype, with their boxes."""
        columns = (some[:, c, k].tolist() for some in (self.similarities, self.cells, self.ids))
        found = []
        for similarity, cell, i in zip(*columns, strict=True):
            if similarity > -torch.inf:
                sample = view.samples[i]
                back = view.eval_transform.view(image_size(sample.image)).original_box
                box, sees = back(regions.boxes[cell]), back(regions.sees[cell])
                found.append(Neighbour(i, sample.name, sample.label, similarity, cell, box, sees))
        return found
