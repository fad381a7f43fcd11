"""The step from the old prototypes to the new ones, which can be taken, changed and taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from protopush.push.contract import PrototypeOwner, Slots
from protopush.push.update import INTERPOLATIONS, reset_moments


class Move:
    """Writes prototypes; until it is kept, :meth:`undo` brings back every bit.

    Args:
        manager: whose prototypes move.
        slots: where they were.
        hit: bool (C, K), prototypes that have a patch; the others stay.
        nearest: (C, K, D), unit norm: the patches.
        interpolation: a key of :data:`INTERPOLATIONS`.
        anchored: where prototypes are live, the backbone's features at the patches (C, K, W), and int64 (C, K) the
            samples and cells that they come from.
    """

    def __init__(
        self,
        manager: PrototypeOwner,
        slots: Slots,
        hit: Tensor,
        nearest: Tensor,
        interpolation: str = "linear",
        anchored: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        self.slots = slots
        self.nearest = nearest
        self.interpolation = INTERPOLATIONS[interpolation]
        self.hit = hit.to(slots.rows.device)
        self.rows = slots.rows[self.hit]
        self.parameter = manager.prototypes
        self.live: list[tuple[Tensor, Tensor]] = []
        if anchored is not None:
            targets = (getattr(manager, name) for name in ("anchor_features", "anchor_ids", "anchor_cells"))
            self.live = [
                (target, values.to(target)[self.hit.to(target.device)])
                for target, values in zip(targets, anchored, strict=True)
            ]
        self._before = [target.detach()[self.rows].clone() for target in self._targets()]

    def at(self, momentum: float) -> Tensor:
        """Where prototypes lie for a momentum, (C, K, D)."""
        moved = self.interpolation(self.slots.unit, self.nearest, momentum)
        return torch.where(self.hit.unsqueeze(-1), moved, self.slots.unit)

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
        for target, values in zip(self._targets(), self._before, strict=True):
            target.data[self.rows] = values

    def keep(self, momentum: float, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the prototypes for good: their optimiser's moments speak of where they were."""
        self.to(momentum)
        if optimizer is not None and momentum < 1:
            reset_moments(optimizer, self.parameter, self.rows)

    def _targets(self) -> list[Tensor]:
        return [self.parameter, *(target for target, _ in self.live)]
