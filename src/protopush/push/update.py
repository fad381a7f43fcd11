"""What a push does to the prototypes once their patches are known.

The step from the old prototypes to the new ones, which can be taken, changed and taken back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.push.protocol import PrototypeOwner, Slots


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
        prototypes: (..., D), unit norm.
        nearest: (..., D), unit norm: the patch of each prototype.
        momentum: 0 puts the prototype onto the patch, 1 leaves it where it is.

    Where prototype and patch are opposite, no great circle is the shortest, and the patch is taken.

    Source: spherical linear interpolation (Shoemake, 1985).

    Example:
        >>> slerp_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 2 / 3)
        tensor([0.8660, 0.5000])
    """
    # From chord lengths, because the arc cosine loses half of the digits near 1
    apart = torch.linalg.vector_norm(prototypes - nearest, dim=-1, keepdim=True)
    together = torch.linalg.vector_norm(prototypes + nearest, dim=-1, keepdim=True)
    angle = 2.0 * torch.atan2(apart, together)
    mixed = (momentum * angle).sin() * prototypes + ((1.0 - momentum) * angle).sin() * nearest
    # Near 0 both sines vanish: there the great circle is its chord.
    moved = torch.where(angle > 1e-4, F.normalize(mixed, dim=-1), momentum_update(prototypes, nearest, momentum))
    return torch.where(together > 1e-6, moved, nearest if momentum < 1 else prototypes)


def reset_moments(optimizer: torch.optim.Optimizer, prototypes: Tensor, rows: Tensor) -> None:
    """Zero the optimiser's running moments of the pushed rows: they speak of where the prototypes were.

    Args:
        optimizer: any optimiser that keeps state tensors of the parameter's shape (SGD, Adam, AdamW, ...).
        prototypes: the parameter (S, D).
        rows: int64, the rows that a push moved.
    """
    for value in optimizer.state.get(prototypes, {}).values():
        if isinstance(value, Tensor) and value.shape == prototypes.shape:
            value[rows.to(value.device)] = 0


INTERPOLATIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linear": momentum_update,
    "slerp": slerp_update,
}


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
