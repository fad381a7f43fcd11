"""Proof of locality: everything outside a patch's region is replaced, and the similarity measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.backbones.create import Features
from protopush.preserve_state import preserve_state

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

TOLERANCE = 1e-6
BATCH = 8


@dataclass(frozen=True)
class Place:
    """A patch of an image, and the prototype whose similarity to it is tested.

    Attributes:
        name: of the place, for people.
        image: (3, H, W), the model's input.
        cell: the patch; None: the one that the prototype is most similar to.
        prototype: (class, slot).
    """

    name: str
    image: Tensor
    cell: int | None
    prototype: tuple[int, int]


@dataclass(frozen=True)
class Locality:
    """How much of a similarity the pixels outside the patch's box decide.

    Attributes:
        name: of the place.
        similarity: of prototype and patch.
        changes: the largest change of it (absolute) with noise, with black and with another image in place of all
            outside the box.
    """

    name: str
    similarity: float
    changes: dict[str, float]

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

    For a local model (windows) nothing can change; for any other it shows how much of "this part" is elsewhere.

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
            others = torch.stack([places[(start + i + 1) % len(places)].image for i in range(BATCH)])
            fillings = {
                "noise": torch.randn(images.shape, generator=generator),
                "black": _black(model).expand_as(images),
                "another image": others,
            }
            cells, before, boxes = _similarities(model, images.to(device), some)
            outside = torch.stack([_outside(boxes[cell], images.shape[2:]) for cell in cells]).unsqueeze(1)
            changes = {
                name: (
                    _similarities(model, torch.where(outside, filling, images).to(device), some, cells)[1] - before
                ).abs()
                for name, filling in fillings.items()
            }
            found += [
                Locality(place.name, float(before[i]), {name: float(values[i]) for name, values in changes.items()})
                for i, place in enumerate(some[: len(places) - start])
            ]
            advance(len(some))
    return found


def _similarities(
    model: ProtoModel, images: Tensor, places: Sequence[Place], cells: Sequence[int] | None = None
) -> tuple[list[int], Tensor, Sequence[tuple[float, float, float, float]]]:
    """The patches, their similarities (B,) to the prototypes of their places, float64, and the boxes of all patches."""
    features: Features = model.backbone(images)
    embeddings, prototypes = model.head.embed_features(features).double(), model.head.prototypes().double()
    wanted = torch.stack([prototypes[place.prototype] for place in places])
    every = (embeddings @ F.normalize(wanted, dim=1).unsqueeze(2)).squeeze(2)  # (B, L)
    if cells is None:
        cells = [int(every[i].argmax()) if place.cell is None else place.cell for i, place in enumerate(places)]
    found = every[torch.arange(len(places)), torch.tensor(cells)].cpu()
    return list(cells), found, model.head.compared(features.regions).boxes


def _outside(box: tuple[float, float, float, float], size: Sequence[int]) -> Tensor:
    """The pixels (H, W) outside a box, which is widened to whole pixels."""
    outside = torch.ones(tuple(size), dtype=torch.bool)
    x0, y0, x1, y1 = box
    outside[int(y0) : int(-(-y1 // 1)), int(x0) : int(-(-x1 // 1))] = False
    return outside


def _black(model: ProtoModel) -> Tensor:
    preprocessing = model.backbone.preprocessing
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (-mean / std).view(1, 3, 1, 1)
