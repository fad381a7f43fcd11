"""Proof of locality: everything outside a patch's region is replaced, and the similarity measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.backbones.create import Features
from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image
from protopush.data.regions import Region
from protopush.data.shards import is_file
from protopush.models.stored_run import Run
from protopush.nn.head import HeadOutput
from protopush.preserve_state import preserve_state
from protopush.push.certificate import file_within

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

TOLERANCE = 1e-6  # of a similarity: what rounding may change
BATCH = 8


@dataclass(frozen=True)
class Place:
    """A patch of an image, and the prototype whose similarity to it is tested.

    Attributes:
        name: of the place, for people.
        image: (3, H, W), the model's input.
        cell: the patch.
        prototype: (class, slot).
    """

    name: str
    image: Tensor
    cell: int
    prototype: tuple[int, int]


@dataclass(frozen=True)
class Locality:
    """How much of a similarity is decided by the pixels outside the patch's box.

    Attributes:
        name: of the place.
        similarity: of prototype and patch.
        changes: by how much it changes where noise, black or another image takes the place of all outside the box.
        beyond: the largest change where they take the place of all that the patch does not see; 0 if that is nothing.
    """

    name: str
    similarity: float
    changes: dict[str, float]
    beyond: float = 0.0

    @property
    def largest(self) -> float:
        """The largest of the changes."""
        return max(self.changes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_locality(
    model: ProtoModel,
    places: Sequence[Place],
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _: None,
) -> list[Locality]:
    """Replace everything outside the box of each place, and measure its similarity again.

    For a local model (windows) nothing can change; for any other it shows how much of "this part" lies elsewhere.

    Args:
        model: on ``device``.
        places: patches; "another image" is that of the next place.
        device: of the model.
        advance: called with the number of places done.
    """
    found = list[Locality]()
    generator = torch.Generator().manual_seed(0)
    with preserve_state(model):
        for start in range(0, len(places), BATCH):
            some = [places[i % len(places)] for i in range(start, start + BATCH)]  # batches of one size: equal sums
            images = torch.stack([place.image for place in some])
            fillings = {
                "noise": torch.randn(images.shape, generator=generator),
                "black": _black(model).expand_as(images),
                "another image": torch.stack([places[(start + i + 1) % len(places)].image for i in range(BATCH)]),
            }
            before, boxes, sees = _similarities(model, images.to(device), some)
            inputs = images, fillings, some, before, device
            changes = _changes(model, *inputs, boxes)
            beyond = changes if sees == boxes else _changes(model, *inputs, sees)
            for i, place in enumerate(some[: len(places) - start]):
                of_place = {name: float(values[i]) for name, values in changes.items()}
                found.append(
                    Locality(
                        place.name, float(before[i]), of_place, max(float(values[i]) for values in beyond.values())
                    )
                )
            advance(min(BATCH, len(places) - start))
    return found


def measure_run(
    run: Run,
    root: Path,
    dataset: ImageDataset,
    images: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Locality]:
    """The locality of each anchor, and of the strongest prototype's best patch in some images.

    Args:
        run: its model is on ``device``.
        root: the folder that the anchors' files are relative to; anchors whose file is not there are left out.
        dataset: images that are predicted.
        images: how many of them, drawn with ``seed``.
        device, advance: as for :func:`measure_locality`.
    """
    manager, places = run.head.proto_manager, list[Place]()
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        file = file_within(root, anchor.file) if anchor is not None and anchor.file is not None else None
        if anchor is not None and file is not None and is_file(file):
            image = run.transform(read_image(file))
            places.append(Place(f"{run.class_names[c]}:{k} {anchor.file}", image, anchor.cell, (c, k)))
    view = dataset.eval_view()
    chosen = torch.randperm(len(view), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    with preserve_state(run.model):
        for i in sorted(chosen):
            image = view[i][0]
            output: HeadOutput = run.model(image.unsqueeze(0).to(device))
            c = int(output.logits[0].argmax())
            place = (c, int(output.contributions[0, c].argmax()))
            places.append(Place(view.samples[i].name, image, int(output.cells[0][place]), place))
    return measure_locality(run.model, places, device, advance)


def _changes(
    model: ProtoModel, images: Tensor, fillings: Mapping[str, Tensor], places: Sequence[Place], before: Tensor,
    device: torch.device | str, kept: Sequence[Region],
) -> dict[str, Tensor]:  # fmt: skip
    """By how much the similarities change, (B,) each, where a filling takes the place of all outside a region."""
    outside = torch.stack([_outside(region, images.shape[2:]) for region in kept]).unsqueeze(1)
    if not outside.any():
        return dict.fromkeys(fillings, torch.zeros_like(before))
    mixed = {name: torch.where(outside, filling, images).to(device) for name, filling in fillings.items()}
    return {name: (_similarities(model, one, places)[0] - before).abs() for name, one in mixed.items()}


def _similarities(
    model: ProtoModel, images: Tensor, places: Sequence[Place]
) -> tuple[Tensor, list[Region], list[Region]]:
    """The similarities (B,) of the places' patches, float64, their boxes and what they see."""
    features: Features = model.backbone(images)
    embeddings, prototypes = model.head.embed_features(features).double(), model.head.prototypes().double()
    cells = [place.cell for place in places]
    wanted = torch.stack([prototypes[place.prototype] for place in places])
    patches = embeddings[torch.arange(len(places)), torch.tensor(cells)]
    regions, similarities = model.head.compared(features.regions), (patches * F.normalize(wanted, dim=1)).sum(dim=1)
    return similarities.cpu(), [regions.boxes[cell] for cell in cells], [regions.sees[cell] for cell in cells]


def _outside(box: Region, size: Sequence[int]) -> Tensor:
    """The pixels (H, W) outside a box, which is widened to whole pixels."""
    outside = torch.ones(tuple(size), dtype=torch.bool)
    x0, y0, x1, y1 = box
    outside[int(y0) : int(-(-y1 // 1)), int(x0) : int(-(-x1 // 1))] = False
    return outside


def _black(model: ProtoModel) -> Tensor:
    preprocessing = model.backbone.preprocessing
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (-mean / std).view(1, 3, 1, 1)
