"""What belongs to a slot - vector, mask, anchor, connection, moments - when a prototype moves in or out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.nn.prototypes import Anchor
from protopush.push.protocol import PrototypeOwner, Pushable, Slots
from protopush.push.reader import Reader
from protopush.push.resize.facility_location import Gain
from protopush.push.update import POOLED, features_at, reset_moments


def slot_mask(manager: PrototypeOwner, what: str) -> Tensor:
    """The manager's ``valid_mask``, flat (S,), to be written to.

    Raises:
        InputError: it has none, so that every slot is in use for ever.
    """
    mask = getattr(manager, "valid_mask", None)
    if not isinstance(mask, Tensor):
        raise InputError(
            f"{type(manager).__name__} has no valid_mask, so that its prototypes cannot {what}; expected a bool tensor "
            "of the slots in use, as protopush.PrototypeManager has"
        )
    return mask.view(-1)


def connections_of(net: Pushable, slots: Slots) -> Tensor | None:
    """The head's weight of each prototype, (C, K), where it has such a parameter beside ``weights()``."""
    found = getattr(net.head, "connections", None)
    is_one = isinstance(found, Tensor) and found.shape == slots.rows.shape and hasattr(type(net.head), "weights")
    return found if is_one else None


@contextmanager
def all_or_nothing(net: Pushable, slots: Slots) -> Iterator[None]:
    """Bring back every bit of the prototypes, and of what belongs to them, where the block fails."""
    manager: Any = net.head.proto_manager
    names = ("prototypes", "valid_mask", "anchor_features", "anchor_ids", "anchor_cells")
    written = [getattr(manager, name, None) for name in names] + [connections_of(net, slots)]
    before = [(target, target.detach().clone()) for target in written if target is not None]
    anchors = getattr(manager, "anchors", None)
    told = None if anchors is None else list(anchors)
    try:
        yield
    except BaseException:
        for target, values in before:
            target.data.copy_(values)
        if anchors is not None:
            anchors[:] = told
        raise


def _at(slots: Slots, gains: list[Gain]) -> Tensor:
    """The parameter's rows of the new prototypes, (G,)."""
    return torch.stack([slots.rows[gain.class_index, gain.slot] for gain in gains])


def live_features(net: Pushable, source: Reader, slots: Slots, gains: list[Gain], use_local: bool) -> Tensor:
    """The backbone's features at the new anchors, (G, C), the same on every rank."""
    rows, ids, cells = _at(slots, gains), *_live_anchors(slots, gains, use_local)
    manager: Any = net.head.proto_manager
    every_id = torch.full_like(manager.anchor_ids, -1)
    every_cell = torch.zeros_like(manager.anchor_cells)
    every_id[rows], every_cell[rows] = ids, cells
    samples = sorted({gain.sample for gain in gains})
    return features_at(net, source, samples, every_id, every_cell, slots.rows.device)[rows]


def _live_anchors(slots: Slots, gains: list[Gain], use_local: bool) -> tuple[Tensor, Tensor]:
    """Sample and cell of each new anchor, int64 (G,), as a manager keeps them."""
    ids = torch.tensor([gain.sample for gain in gains], device=slots.rows.device)
    cells = [gain.cell if use_local else POOLED for gain in gains]
    return ids, torch.tensor(cells, device=slots.rows.device)


def move_in(
    net: Pushable, slots: Slots, gains: list[Gain], anchors: list[Anchor], features: Tensor | None, use_local: bool
) -> None:
    """Put the new prototypes into their slots, with all that belongs to them."""
    manager: Any = net.head.proto_manager
    rows = _at(slots, gains)
    vectors = torch.stack([gain.unit for gain in gains]).to(rows.device)
    if features is not None:
        ids, cells = _live_anchors(slots, gains, use_local)
        manager.anchor_features[rows] = features.to(manager.anchor_features.dtype)
        manager.anchor_ids[rows], manager.anchor_cells[rows] = ids, cells
        vectors = net.head.proj(manager.anchor_features[rows])
    unit = F.normalize(vectors.to(slots.unit.dtype), dim=-1)
    manager.prototypes.data[rows] = unit.to(manager.prototypes.dtype)
    slot_mask(manager, "grow")[rows] = True
    if getattr(manager, "anchors", None) is not None:
        for row, anchor in zip(rows.tolist(), anchors, strict=True):
            manager.anchors[row] = anchor
    connections = connections_of(net, slots)
    if connections is not None:
        for c, k in ((gain.class_index, gain.slot) for gain in gains):
            if slots.used[c].any():
                connections.data[c, k] = connections.data[c][slots.used[c]].mean()


def forget(optimizer: torch.optim.Optimizer, net: Pushable, slots: Slots, gains: list[Gain]) -> None:
    """Zero the optimiser's moments of the new prototypes and of their connections."""
    reset_moments(optimizer, net.head.proto_manager.prototypes, _at(slots, gains))
    connections = connections_of(net, slots)
    if connections is not None:
        for value in optimizer.state.get(connections, {}).values():
            if isinstance(value, Tensor) and value.shape == connections.shape:
                for gain in gains:
                    value[gain.class_index, gain.slot] = 0


def move_out(net: Pushable, slots: Slots, leaving: list[tuple[int, int]]) -> None:
    """Free the slots of some prototypes (class, slot); a vector stays where it is, and counts for nothing."""
    manager: Any = net.head.proto_manager
    rows = torch.stack([slots.rows[c, k] for c, k in leaving])
    slot_mask(manager, "leave")[rows] = False
    if getattr(manager, "anchor_ids", None) is not None:
        manager.anchor_ids[rows] = -1
    if getattr(manager, "anchors", None) is not None:
        for row in rows.tolist():
            manager.anchors[row] = None
