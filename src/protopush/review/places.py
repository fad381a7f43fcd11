"""Where a prototype stands, exactly: enough to put it back bit for bit."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protopush.prototypes import Anchor, PrototypeManager
from protopush.push.live import POOLED
from protopush.review.decisions import Replacement


@dataclass(frozen=True)
class Place:
    """One prototype's anchor and numbers.

    Attributes:
        anchor: what it stands for.
        vector: base64 of D float32, little-endian.
        features: of a live anchor, base64 of C float32; None where anchors aren't live, or weren't kept.
        index: of a live anchor, its place in the training data.
    """

    anchor: Anchor
    vector: str
    features: str | None = None
    index: int | None = None

    @classmethod
    def of(cls, manager: PrototypeManager, row: int) -> Place:
        """Where a prototype, that has an anchor, stands now; live ones must be in sync."""
        anchor = manager.anchors[row]
        if anchor is None:
            raise ValueError(f"prototype {row} has no anchor")
        vector = _text_of(manager.prototypes[row])
        if manager.anchor_features is None or manager.anchor_ids is None or int(manager.anchor_ids[row]) < 0:
            return cls(anchor, vector)
        return cls(anchor, vector, _text_of(manager.anchor_features[row]), int(manager.anchor_ids[row]))

    @classmethod
    def before(cls, move: Replacement) -> Place:
        """Where a prototype stood before it was replaced."""
        return cls(move.old, move.old_vector, move.old_features, move.old_index)

    @classmethod
    def made_of(cls, anchor: Anchor, vector: Tensor, features: Tensor, index: int) -> Place:
        """A live anchor's place, from what was computed of its image."""
        return cls(anchor, _text_of(vector), _text_of(features), index)

    @torch.no_grad()
    def take(self, manager: PrototypeManager, row: int) -> None:
        """Put a prototype here."""
        manager.anchors[row] = self.anchor
        manager.prototypes[row] = _vector_of(self.vector).to(manager.prototypes)
        if manager.anchor_features is None or manager.anchor_ids is None or manager.anchor_cells is None:
            return
        if self.features is not None:
            manager.anchor_features[row] = _vector_of(self.features).to(manager.anchor_features)
        manager.anchor_ids[row] = -1 if self.features is None or self.index is None else self.index
        manager.anchor_cells[row] = self.anchor.cell if self.anchor.grid != (1, 1) else POOLED

    def replacement(self, class_name: str, manager: PrototypeManager, row: int) -> Replacement:
        """The record of a prototype that stood here and has another anchor now."""
        c, k = divmod(row, manager.max_prototypes)
        new = Place.of(manager, row).anchor
        return Replacement(c, class_name, k, self.anchor, new, self.vector, self.features, self.index)


def _text_of(vector: Tensor) -> str:
    values = vector.detach().float().cpu().numpy().astype("<f4")
    return base64.b64encode(values.tobytes()).decode()


def _vector_of(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
