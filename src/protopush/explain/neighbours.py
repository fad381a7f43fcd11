"""What else in the training images a prototype likes: the next nearest patches of its class, and those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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

# What a similarity may be off by: batches differ, and stored features are float16 (at most 0.0003 on HAM10000).
COMPUTED, STORED = 1e-5, 1e-3


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


class BestImages:
    """The ``keep`` most similar images of each prototype, and their best cells.

    Order is (similarity, place in the data set), whatever the batches.

    Attributes:
        similarities: float32 (keep, C, K), of one patch, as it is shown; -inf where there are fewer.
        cells, ids: int64 (keep, C, K).
    """

    def __init__(self, similarities: Tensor, cells: Tensor, ids: Tensor) -> None:
        self.similarities, self.cells, self.ids = similarities, cells, ids

    @classmethod
    def none(cls, keep: int, shape: tuple[int, int]) -> BestImages:
        """Nothing yet, for (C, K) prototypes."""
        cells = torch.zeros((keep, *shape), dtype=torch.int64)
        return cls(torch.full((keep, *shape), -torch.inf), cells, cells.clone())

    def add(self, similarities: Tensor, cells: Tensor, ids: Tensor) -> None:
        """A batch: similarities and cells (B, C, K), ids (B,), larger than all before."""
        every = torch.cat([self.similarities, similarities])
        order = every.argsort(dim=0, descending=True, stable=True)[: len(self.ids)]  # the earlier first among equals
        self.similarities = every.gather(0, order)
        self.cells = torch.cat([self.cells, cells]).gather(0, order)
        self.ids = torch.cat([self.ids, ids.view(-1, 1, 1).expand_as(cells)]).gather(0, order)

    def neighbours(
        self, view: ImageDataset, c: int, k: int, regions: Regions, most: int, anchor: str | None = None
    ) -> list[Neighbour]:
        """Those of one prototype, with their boxes, but for its ``anchor``'s image."""
        columns = (some[: most + 1, c, k].tolist() for some in (self.similarities, self.cells, self.ids))
        found = list[Neighbour]()
        for similarity, cell, i in zip(*columns, strict=True):
            sample = view.samples[i]
            if similarity > -torch.inf and sample.name != anchor and len(found) < most:
                back = view.eval_transform.view(image_size(sample.image)).original_box
                box, sees = back(regions.boxes[cell]), back(regions.sees[cell])
                found.append(Neighbour(i, sample.name, sample.label, similarity, cell, box, sees))
        return found


class RankedImages(NamedTuple):
    """The images that each prototype likes best.

    Attributes:
        own: of its class.
        others: of all other classes.
        regions: where their patches lie.
        error: what a similarity may be off by.
    """

    own: BestImages
    others: BestImages
    regions: Regions
    error: float

    def neighbours(
        self, model: ProtoModel, dataset: ImageDataset, own: int = 3, others: int = 2
    ) -> list[list[Neighbours | None]]:
        """The first of them, as :func:`find_neighbours` gives them: of the own class one fewer than were ranked."""
        manager, view = model.head.proto_manager, dataset.eval_view()
        found: list[list[Neighbours | None]] = [[None] * manager.max_prototypes for _ in range(manager.num_classes)]
        for c, k in manager.used_slots():
            anchor = manager.anchor(c, k)
            name = None if anchor is None else str(anchor.sample_id)
            of_class = self.own.neighbours(view, c, k, self.regions, own, name)
            found[c][k] = Neighbours(of_class, self.others.neighbours(view, c, k, self.regions, others))
        return found


def rank_images(
    model: ProtoModel, dataset: ImageDataset, device: str | torch.device, own: int, others: int, num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> RankedImages:  # fmt: skip
    """The images that each prototype likes best, in one pass.

    Where a training left features of these images in the cache they are read instead of computed.
    """
    device, view, head = torch.device(device), dataset.eval_view(), model.head
    shape = (head.proto_manager.num_classes, head.proto_manager.max_prototypes)
    class_of = torch.arange(shape[0]).unsqueeze(1)
    best, regions = (BestImages.none(own, shape), BestImages.none(others, shape)), Regions.whole((1, 1))
    stored = stored_features(model.backbone, view)
    images, backbone = (view, model.backbone) if stored is None else (stored, FeatureReader(stored.regions))
    loader: DataLoader[Any] = DataLoader(images, inference_batch_size(device), num_workers=num_workers)
    features: Features
    with iterate_outputs(model, loader, device, advance, call=backbone) as outputs:
        for features, labels, ids in outputs:
            output: HeadOutput = head(features)
            regions = head.compared(features.regions)
            similarities, cells = output.maps.amax(dim=-1).float().cpu(), output.cells.cpu()
            of_class = labels.view(-1, 1, 1) == class_of
            best[0].add(similarities.masked_fill(~of_class, -torch.inf), cells, ids)
            best[1].add(similarities.masked_fill(of_class, -torch.inf), cells, ids)
    return RankedImages(*best, regions, COMPUTED if stored is None else STORED)


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
    ranked = rank_images(model, dataset, device, own + 1, others, num_workers, advance)
    return ranked.neighbours(model, dataset, own, others)
