"""Updates of prototypes: the step towards their patches, slots that are filled and freed, live anchors refreshed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.data.transforms import as_pixels
from protopush.distributed import all_reduce_sum
from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.facility_location import Gain
from protopush.push.nearest_patches import Candidates
from protopush.push.options import OptimizerLike, PushOptions, resolve
from protopush.push.protocol import Pushable, Slots, connections_of, live_features_of, resolve_device, unwrap
from protopush.push.reader import Reader, read_by_index

POOLED = -1  # in place of a cell: the anchor is the pooled feature

Interpolation = Callable[[Tensor, Tensor, float], Tensor]


def momentum_update(prototypes: Tensor, nearest: Tensor, momentum: float) -> Tensor:
    """``normalise(momentum * p + (1 - momentum) * f)``, in the precision of the inputs.

    Args:
        prototypes: (..., D), unit norm.
        nearest: (..., D), unit norm: the patch of each prototype.
        momentum: 0 puts the prototype onto the patch (hard push), 1 leaves it where it is.

    Where prototype and patch cancel out (opposite, momentum 0.5), the patch is taken.

    Example:
        >>> momentum_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    mixed = momentum * prototypes + (1.0 - momentum) * nearest
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return torch.where(norm > 1e-6, F.normalize(mixed, dim=-1), nearest)


def slerp_update(prototypes: Tensor, nearest: Tensor, momentum: float) -> Tensor:
    """A step of ``1 - momentum`` of the angle, along the great circle from the prototype to its patch.

    :func:`momentum_update` goes along the chord: nearly the same for near patches, less far in angle for distant ones.

    Args:
        prototypes, nearest, momentum: as of :func:`momentum_update`.

    Where prototype and patch are opposite, no great circle is the shortest, and the patch is taken.

    Source: spherical linear interpolation (Shoemake, 1985).

    Example:
        >>> slerp_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 2 / 3)
        tensor([0.8660, 0.5000])
    """
    # From chord lengths, because the arc cosine loses half of the digits near 1
    apart = torch.linalg.vector_norm(prototypes - nearest, dim=-1, keepdim=True)
    summed = torch.linalg.vector_norm(prototypes + nearest, dim=-1, keepdim=True)
    angle = 2.0 * torch.atan2(apart, summed)
    mixed = (momentum * angle).sin() * prototypes + ((1.0 - momentum) * angle).sin() * nearest
    # Near 0 both sines vanish: there the great circle is its chord.
    moved = torch.where(angle > 1e-4, F.normalize(mixed, dim=-1), momentum_update(prototypes, nearest, momentum))
    return torch.where(summed > 1e-6, moved, nearest if momentum < 1 else prototypes)


def reset_moments(optimizer: OptimizerLike, parameter: Tensor, *index: Tensor) -> None:
    """Zero the optimiser's running moments of what a push moved: they belong to where it was.

    Args:
        optimizer: any that keeps state tensors of the parameter's shape (SGD, Adam, AdamW, ...).
        parameter: the prototypes (S, D), or what belongs to them.
        index: int64, the rows that moved; with more of them, the entries.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[tuple(places.to(value.device) for places in index)] = 0


class Move:
    """Writes prototypes; until it is kept, :meth:`undo` brings back every bit.

    Args:
        net, slots: the model, and where its prototypes were.
        chosen: the patches that they take; prototypes without one stay.
        options: ``interpolation`` and ``use_local`` are read.

    Attributes:
        hit: bool (C, K), prototypes that have a patch.
        nearest: (C, K, D), unit norm: the embeddings of the patches.
    """

    def __init__(self, net: Pushable, slots: Slots, chosen: Candidates, options: PushOptions) -> None:
        manager: Any = net.head.proto_manager
        features = live_features_of(net)
        vectors = chosen.taken_vectors()
        embeddings = vectors if features is None else net.head.proj(vectors.to(features.dtype))
        self.nearest = F.normalize(embeddings.to(slots.unit.dtype), dim=-1)
        self.hit = chosen.of_taken(chosen.ranked.similarity).isfinite()
        self.interpolation = resolve(INTERPOLATIONS, options.interpolation, "interpolation")
        self.unit, self.parameter, self.rows = slots.unit, manager.prototypes, slots.rows[self.hit]
        self.live: list[tuple[Tensor, Tensor]] = []
        if features is not None:
            cells = chosen.of_taken(chosen.ranked.cells)
            cells = cells if options.use_local else torch.full_like(cells, POOLED)
            targets = (features, manager.anchor_ids, manager.anchor_cells)
            anchored = (vectors, chosen.of_taken(chosen.ranked.ids), cells)
            self.live = [(old, new[self.hit].to(old)) for old, new in zip(targets, anchored, strict=True)]
        targets = (self.parameter, *(old for old, _ in self.live))
        self._before = [(old, old.detach()[self.rows].clone()) for old in targets]

    def at(self, momentum: float) -> Tensor:
        """Where prototypes lie for a momentum, (C, K, D)."""
        moved = self.interpolation(self.unit, self.nearest, momentum)
        return torch.where(self.hit.unsqueeze(-1), moved, self.unit)

    def to(self, momentum: float) -> None:
        """Write them; at 1 nothing moves, not even by rounding."""
        if momentum == 1:
            return self.undo()
        self.parameter.data[self.rows] = self.at(momentum)[self.hit].to(self.parameter.dtype)
        for target, values in self.live:
            target[self.rows] = values
        return None

    def undo(self) -> None:
        """Write what was there before."""
        for target, values in self._before:
            target.data[self.rows] = values

    def keep(self, momentum: float, optimizer: OptimizerLike | None) -> None:
        """Write the prototypes for good: their optimiser's moments belong to where they were."""
        self.to(momentum)
        if optimizer is not None and momentum < 1:
            reset_moments(optimizer, self.parameter, self.rows)


def refresh_anchors(model: nn.Module, dataloader: Iterable[Any], device: str | int | torch.device) -> int:
    """Embed the images of live anchors again, and store their features.

    While the backbone is trained they grow old; after the last step, this makes the saved prototypes exact. Under
    ``torch.distributed`` every rank must call it: the ranks divide the images.

    Args:
        model, dataloader, device: as for :func:`protopush.push_prototypes`, with live anchors; over the dataset of the
            push, whose indices they keep.

    Returns:
        The number of images that were embedded; 0 where there is no live anchor.

    Raises:
        InputError: the model's anchors aren't live, or the loader can't be read by index.
    """
    net = unwrap(model)
    resolve_device(net, device)
    manager: Any = net.head.proto_manager
    if live_features_of(net) is None:
        raise InputError("the model's anchors are not live; expected a head with anchoring='live'")
    rows = (manager.anchor_ids >= 0).nonzero().flatten()
    with preserve_state(model, dataloader):
        store_crops(net, read_by_index(dataloader), rows)
        held: Tensor | None = getattr(net, "anchor_features", lambda: None)()
        features = features_at(net, read_by_index(dataloader), rows) if held is None else held[rows]
    manager.anchor_features[rows] = features.to(manager.anchor_features.dtype)
    manager.anchors = [anchor and replace(anchor, similarity_after=1.0) for anchor in manager.anchors]
    net.head.sync_prototypes()  # type: ignore[attr-defined]
    return len(manager.anchor_ids[rows].unique())


def store_crops(net: Pushable, reader: Reader, rows: Tensor) -> None:
    """Let a model of windows hold the pixels of live anchors that it does not hold yet; nothing for any other model."""
    manager: Any = net.head.proto_manager
    if getattr(manager, "anchor_crops", None) is None:
        return
    rows = rows[~manager.has_crop()[rows]]
    ids, cells = manager.anchor_ids[rows].cpu(), manager.anchor_cells[rows].tolist()
    side, preprocessing = manager.anchor_crops.shape[3], net.backbone.preprocessing  # type: ignore[attr-defined]
    found, sizes = (
        torch.zeros(len(rows), 3, side, side, dtype=torch.int64),
        torch.zeros(len(rows), 2, dtype=torch.int64),
    )
    for images, _, numbers in reader.subset(sorted(set(ids.tolist()))).batches():
        boxes = net.regions_of(images).boxes  # type: ignore[attr-defined]
        for row, image in (ids.unsqueeze(1) == numbers.unsqueeze(0)).nonzero().tolist():
            x0, y0, x1, y1 = map(int, boxes[cells[row]])
            found[row, :, : y1 - y0, : x1 - x0] = as_pixels(images[image, :, y0:y1, x0:x1], preprocessing)
            sizes[row] = torch.tensor([y1 - y0, x1 - x0])
    device = manager.anchor_crops.device
    manager.anchor_crops[rows] = all_reduce_sum(found.to(device)).to(torch.uint8)
    places = torch.stack([manager.anchor_ids[rows], manager.anchor_cells[rows]], dim=1)
    manager.crops_of[rows] = torch.cat([places, all_reduce_sum(sizes.to(device))], dim=1)


def features_at(net: Pushable, reader: Reader, rows: Tensor) -> Tensor:
    """The backbone's features (R, C) at the live anchors of some prototypes (R,), the same on every rank."""
    manager: Any = net.head.proto_manager
    ids, cells = manager.anchor_ids[rows].cpu(), manager.anchor_cells[rows]
    found = torch.zeros(len(rows), manager.anchor_features.shape[1], device=rows.device)
    for images, _, numbers in reader.subset(sorted(set(ids.tolist()))).batches():
        pooled, patches = net.extract_features(images.to(rows.device))
        every = torch.cat([patches, pooled], dim=1)  # so that the last, -1, is the pooled one
        row, image = (ids.unsqueeze(1) == numbers.unsqueeze(0)).nonzero(as_tuple=True)
        found[row] = every[image, cells[row.to(cells.device)]].float()
    return all_reduce_sum(found)


def move_in(
    net: Pushable, source: Reader, slots: Slots, gains: list[Gain], anchors: list[Anchor], use_local: bool
) -> None:
    """Put new prototypes, and what belongs to each, into their slots; a connection starts as its class's mean."""
    manager: Any = net.head.proto_manager
    index = partial(torch.tensor, dtype=torch.int64, device=slots.rows.device)
    classes, places = index([gain.class_index for gain in gains]), index([gain.slot for gain in gains])
    rows = slots.rows[classes, places]
    vectors = torch.stack([gain.unit for gain in gains]).to(rows.device)
    if live_features_of(net) is not None:
        manager.anchor_ids[rows] = index([gain.sample for gain in gains])
        manager.anchor_cells[rows] = index([gain.cell if use_local else POOLED for gain in gains])
        manager.anchor_features[rows] = features_at(net, source, rows).to(manager.anchor_features.dtype)
        vectors = net.head.proj(manager.anchor_features[rows])
    unit = F.normalize(vectors.to(slots.unit.dtype), dim=-1)
    manager.prototypes.data[rows] = unit.to(manager.prototypes.dtype)
    manager.valid_mask.view(-1)[rows] = True
    if getattr(manager, "anchors", None) is not None:
        for row, anchor in zip(rows.tolist(), anchors, strict=True):
            manager.anchors[row] = anchor
    connections = connections_of(net, slots)
    if connections is not None:
        for gain in gains:
            if slots.used[gain.class_index].any():
                of_class = connections.data[gain.class_index]
                of_class[gain.slot] = of_class[slots.used[gain.class_index]].mean()


def move_out(manager: Any, rows: Tensor) -> None:
    """Free the slots of prototypes (rows of the parameter); a vector stays where it is, and counts for nothing."""
    manager.valid_mask.view(-1)[rows] = False
    if getattr(manager, "anchor_ids", None) is not None:
        manager.anchor_ids[rows] = -1
    if getattr(manager, "anchors", None) is not None:
        for row in rows.tolist():
            manager.anchors[row] = None


INTERPOLATIONS: dict[str, Interpolation] = {
    "linear": momentum_update,
    "slerp": slerp_update,
}
